"""Health rules, and when they speak."""

"""The value head, and its part of training."""

"""Credit assignment: advantages from rewards and values."""

"""Scores of a policy: during training, after it, and as pictures."""

"""How a policy is scored during training and after it, and how the scores are shown."""

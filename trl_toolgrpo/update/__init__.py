"""The policy update: how a rollout batch is divided, scored and turned into a loss."""

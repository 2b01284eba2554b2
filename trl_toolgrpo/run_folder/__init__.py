"""What a run leaves in its output folder: settings, metrics, rollouts."""

"""What a run says while it goes on: metrics, trackers, progress, health."""

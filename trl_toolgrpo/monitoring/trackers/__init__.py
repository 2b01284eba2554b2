"""What trackers get in addition to metrics: conversations and alerts, a file a tracker."""

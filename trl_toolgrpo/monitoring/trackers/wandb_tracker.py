"""Weights & Biases: faults as alerts."""

from ...types import JSONObject
from .tracker import Tracker


class WandbTracker(Tracker):
    """Sends to the run under way, if there is one."""

    def alert(self, line: JSONObject) -> None:
        """Show a fault as an alert."""
        import wandb

        if wandb.run is not None:
            level = wandb.AlertLevel.ERROR if line["level"] == "error" else wandb.AlertLevel.WARN
            wandb.alert(title=line["rule"], text=line["message"], level=level)

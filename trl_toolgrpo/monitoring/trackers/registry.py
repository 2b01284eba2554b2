"""The trackers that get more than metrics, by their names in `report_to`."""

from .tensorboard_tracker import TensorBoardTracker
from .tracker import Tracker
from .trackio_tracker import TrackioTracker
from .wandb_tracker import WandbTracker


TRACKERS: dict[str, type[Tracker]] = {
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}
"""Add a tracker of your own here."""

"""trackio: conversations as traces, faults as alerts."""

from collections.abc import Sequence
from typing import Any

from ...types import JSONObject
from .tracker import Tracker


class TrackioTracker(Tracker):
    """Sends to the trackio run under way, if there is one."""

    shows_conversations = True

    def conversations(self, records: Sequence[JSONObject], step: int) -> None:
        """Show rollouts as traces."""
        if (trackio := _under_way()) is not None:
            trackio.log({"conversations": [trackio.Trace(**record) for record in records]}, step=step)

    def alert(self, line: JSONObject) -> None:
        """Show a fault as an alert."""
        if (trackio := _under_way()) is not None:
            level = trackio.AlertLevel.ERROR if line["level"] == "error" else trackio.AlertLevel.WARN
            trackio.alert(title=line["rule"], text=line["message"], level=level)


def _under_way() -> Any:
    """Return the module, if it has a run."""
    import trackio

    return None if trackio.context_vars.current_run.get() is None else trackio

"""What a tracker is given in addition to the metrics that transformers sends it."""

from collections.abc import Sequence

from ...trl_hooks import Run
from ...types import JSONObject


class Tracker:
    """
    A tracker of `report_to`. A subclass overrides what its tracker can show, and is registered in `registry.py`. Only
    the main process calls it; what it raises is logged once and ends no run.

    Args:
        run ([`Run`]):
            The run.
    """

    shows_conversations = False
    """Whether conversations are gathered for it."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @classmethod
    def is_used(cls, run: Run, name: str) -> bool:
        """Return whether a run reports to the tracker that is registered under a name."""
        return name in (run.args.report_to or ())

    def conversations(self, records: Sequence[JSONObject], step: int) -> None:
        """
        Show a few rollouts of a logged step.

        Args:
            records (`Sequence[dict]`):
                Each with `messages`, and `metadata`: `step`, `reward`, `stop_reason`, `turns`, `tokens`. No secrets.
            step (`int`):
                Optimizer steps taken.
        """

    def alert(self, line: JSONObject) -> None:
        """
        Show a fault that a health rule has found.

        Args:
            line (`dict`):
                As in `health.jsonl`: `step`, `rule`, `level` (`"warning"` or `"error"`), `message`, `value` and
                `threshold`. A message holds figures and advice, and no text of a rollout.
        """

    def recovered(self, line: JSONObject) -> None:
        """
        Show that a fault is over.

        Args:
            line (`dict`):
                `step`, `rule`, and `level`, which is `"ok"`.
        """

"""TensorBoard: conversations and faults as text."""

import json
from collections.abc import Sequence

from transformers.integrations import TensorBoardCallback

from ...trl_hooks import Run
from ...types import JSONObject
from .tracker import Tracker


class TensorBoardTracker(Tracker):
    """Writes texts with the writer of transformers' callback."""

    shows_conversations = True

    @classmethod
    def is_used(cls, run: Run, name: str) -> bool:
        """Return whether a run has the callback, by `report_to` or as one that was passed."""
        return any(isinstance(callback, TensorBoardCallback) for callback in run.callback_handler.callbacks)

    def conversations(self, records: Sequence[JSONObject], step: int) -> None:
        """Show rollouts as JSON."""
        for record in records:
            self._write("conversations", json.dumps(record, indent=1, ensure_ascii=False), step)

    def alert(self, line: JSONObject) -> None:
        """Show a fault as text."""
        self._write("health", f"{line['rule']}: {line['message']}", line["step"])

    def _write(self, tag: str, text: str, step: int) -> None:
        for callback in self._run.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(tag, f"```\n{text}\n```", step)

"""The reward function of a recipe, and the record of its held-out success rates.

A held-out evaluation is the trainer's own (`trainer.evaluate()`). So its rollouts are sampled exactly as in training,
at the training temperature, once for each question. The rates are also kept in the output folder, for a run that is
resumed from one of its checkpoints.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_toolgrpo import earlier_runs
from trl_toolgrpo.types import Message

from ..task import Task, Verdict
from .results import SETTINGS, RunSettings, TaskResult


logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations.json"

ScoredRow: TypeAlias = tuple[str, int, Verdict]
"""Row id, difficulty and verdict of a rollout."""


@dataclass(frozen=True)
class Rates:
    """
    Success rates of one evaluation.

    Args:
        overall (`float`):
            Share of the questions that succeeded.
        by_difficulty (`dict[int, float]`):
            The same for each difficulty.
        valid_calls (`float`):
            Share of the questions with a call that matches its tool's schema.
        step (`int`):
            Optimizer steps taken before the evaluation.
    """

    overall: float
    by_difficulty: dict[int, float]
    valid_calls: float
    step: int = 0


class Scoreboard(TrainerCallback):
    """
    Reward function of a task, and the record of its held-out evaluations.

    Pass it to the trainer as reward function and as callback.

    Args:
        task ([`Task`]):
            Its judge gives the rewards.

    Attributes:
        settings ([`RunSettings`], *optional*):
            Settings of the run, saved in the output folder.
        evaluations (`list[Rates]`):
            Rates of each evaluation so far, the same in every process.
        sample (`tuple`, *optional*):
            Prompt, completion and verdict of the first rollout of the last training batch of this process.
    """

    def __init__(self, task: Task) -> None:
        self.__name__ = "task_reward"
        self.settings: RunSettings | None = None
        self.evaluations: list[Rates] = []
        self.records: list[ScoredRow] = []
        self.sample: tuple[list[Message], list[Message], Verdict] | None = None
        self._judge = task.judge
        self._held_out: list[ScoredRow] = []

    def __call__(
        self,
        prompts: list[list[Message]],
        completions: list[list[Message]],
        log_metric: Callable[[str, float], None],
        environments: list | None = None,
        mcp_sessions: list | None = None,
        **columns: object,
    ) -> list[float]:
        """Return the rewards of a batch of rollouts, and record the held-out ones."""
        size = len(completions)
        worlds = environments or mcp_sessions or [None] * size
        lists = {name: values for name, values in columns.items() if isinstance(values, list) and len(values) == size}
        rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        verdicts = [
            self._judge(completion, world, row)
            for completion, world, row in zip(completions, worlds, rows, strict=True)
        ]
        for row, verdict in zip(rows, verdicts, strict=True):
            if row["split"] == "held_out":
                self._held_out.append((row["row_id"], row["difficulty"], verdict))
        if rows[0]["split"] == "train":
            self.sample = prompts[0], completions[0], verdicts[0]
        log_metric("success", sum(verdict.success for verdict in verdicts) / size)
        log_metric("valid_calls", sum(verdict.valid_call for verdict in verdicts) / size)
        return [verdict.reward for verdict in verdicts]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the record in the output folder, without entries of an earlier run."""
        self._keep(args, state, new=state.global_step == 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluate at the end of an assisted warm-up, except in a replay, which samples nothing."""
        if state.global_step == args.assist_warmup_steps and args.replay is None:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Turn what was recorded since the last evaluation into rates, over all processes."""
        records, self._held_out = gather_object(self._held_out), []
        if records:
            self.records = records
            self.evaluations.append(success_rates(records, state.global_step))
            self._keep(args, state)

    def _keep(self, args: TrainingArguments, state: TrainerState, new: bool = False) -> None:
        if not state.is_world_process_zero:
            return
        file = Path(str(args.output_dir)) / EVALUATIONS
        try:
            if new:
                _set_aside(file)
            if self.settings is not None:
                self.settings.save(file.parent)
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps([asdict(rates) for rates in self.evaluations]), encoding="utf-8")
            os.replace(unfinished, file)  # in one step, so that a kill leaves no half-written file
        except OSError as error:
            logger.warning(
                "The rates of the evaluations so far could not be saved in %s: %s. The run continues; after a "
                "resume they may be missing.",
                file,
                error,
            )

    def recall(self, checkpoint: Path) -> bool:
        """
        Read the evaluations that the run of a checkpoint had made by then. The main process reads them; every process
        must call this.

        Args:
            checkpoint (`Path`):
                Checkpoint folder in the output folder of its run.

        Returns:
            `bool`: whether there was one, the same in every process.
        """
        (self.evaluations,) = broadcast_object_list([_read(checkpoint) if PartialState().is_main_process else None])
        return bool(self.evaluations)


def _read(checkpoint: Path) -> list[Rates]:
    checkpoint = checkpoint.resolve()
    try:
        step = int(checkpoint.name.rpartition("-")[2])
        known = json.loads((checkpoint.parent / EVALUATIONS).read_text(encoding="utf-8"))
        found = [
            Rates(**{**kept, "by_difficulty": {int(name): rate for name, rate in kept["by_difficulty"].items()}})
            for kept in known
        ]
        return [rates for rates in found if rates.step <= step]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "The rates before %s are not known (%s: %s). Those at its step are used as the rates before training.",
            checkpoint,
            type(error).__name__,
            error,
        )
        return []


def _set_aside(file: Path) -> None:
    """Move the record of an earlier run to the folder to which the trainer has just moved that run's files."""
    folders = earlier_runs(file.parent)
    for name in (EVALUATIONS, SETTINGS) if folders else ():
        if (file.parent / name).is_file() and not (folders[-1] / name).exists():
            os.replace(file.parent / name, folders[-1] / name)
    file.unlink(missing_ok=True)


def success_rates(records: list[ScoredRow], step: int = 0) -> Rates:
    """
    Return the rates of the given rollouts.

    Args:
        records (`list[ScoredRow]`):
            Row id, difficulty and verdict of each rollout. A row that several processes got, because the last batch
            was filled up, counts once.
        step (`int`, *optional*, defaults to `0`):
            Optimizer steps taken before the evaluation.

    Returns:
        [`Rates`]: the rates.
    """
    result = TaskResult.of("", records)
    by_difficulty = {difficulty: rate.rate for difficulty, rate in result.by_difficulty.items()}
    return Rates(result.success.rate, by_difficulty, result.valid_calls.rate, step)


def comparison(before: Rates, after: Rates, assisted: Rates | None = None) -> str:
    """
    Return the last lines of a run: the rates by difficulty, then overall.

    For a run with an assisted warm-up, they also give the valid-call rate and the accuracy before it, after it and at
    the end.

    Args:
        before, after ([`Rates`]):
            Rates before and after training.
        assisted ([`Rates`], *optional*):
            Rates at the end of the assisted warm-up.

    Returns:
        `str`: the lines, without a newline at the end.
    """
    lines = [
        f"difficulty {difficulty}: {rate:.2f} -> {after.by_difficulty[difficulty]:.2f}"
        for difficulty, rate in before.by_difficulty.items()
    ]
    lines.append(f"held-out success: {before.overall:.2f} -> {after.overall:.2f}")
    if assisted is not None:
        stages = (before, assisted, after)
        lines.append("valid-call rate: " + " -> ".join(f"{rates.valid_calls:.2f}" for rates in stages))
        lines.append("accuracy: " + " -> ".join(f"{rates.overall:.2f}" for rates in stages))
    return "\n".join(lines)

"""How often the policy succeeds: the reward function of a recipe and its held-out rates.

Owns the reward function that keeps score, and the callback that turns each evaluation into rates; fed by the task's
judge and by the trainer. A held-out evaluation is the trainer's own (`trainer.evaluate()`), so its rollouts are
sampled exactly as in training, at the training temperature, once per question.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from task import Task, Verdict
from transformers import TrainerCallback


FILE = "evaluations.json"


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
            Share of the questions to which a call was made that matches its tool's schema.
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
            Gives the judge.

    Attributes:
        evaluations (`list[Rates]`):
            Rates of every evaluation so far, the same in every process.
        sample (`tuple`, *optional*):
            Prompt, completion and verdict of the first rollout of the last training batch of this process.
    """

    def __init__(self, task: Task) -> None:
        self.__name__ = "task_reward"
        self.evaluations: list[Rates] = []
        self.records: list[tuple[str, int, Verdict]] = []
        self.sample: tuple | None = None
        self._judge = task.judge
        self._held_out: list[tuple[str, int, Verdict]] = []

    def __call__(
        self,
        prompts: list,
        completions: list,
        log_metric: Any,
        environments: list | None = None,
        mcp_sessions: list | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards of a batch of rollouts; held-out ones also go on record."""
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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate where an assisted warm-up ends, except in a replay, which samples nothing."""
        if state.global_step == args.assist_warmup_steps and args.replay is None:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Turn what was recorded since the last evaluation into rates, over all processes."""
        records, self._held_out = gather_object(self._held_out), []
        if records:
            self.records = records
            self.evaluations.append(success_rates(records, state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the record beside a checkpoint."""
        if state.is_world_process_zero:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            if file.parent.is_dir():  # not if the disk was full
                file.write_text(json.dumps([asdict(rates) for rates in self.evaluations]), encoding="utf-8")

    def recall(self, checkpoint: Path) -> bool:
        """Take up the record of a checkpoint; returns whether it holds an evaluation."""
        file = checkpoint / FILE
        for kept in json.loads(file.read_text(encoding="utf-8")) if file.is_file() else ():
            kept["by_difficulty"] = {int(name): rate for name, rate in kept["by_difficulty"].items()}
            self.evaluations.append(Rates(**kept))
        return bool(self.evaluations)


def success_rates(records: list[tuple[str, int, Verdict]], step: int = 0) -> Rates:
    """
    Rates of the given rollouts.

    Args:
        records (`list[tuple[str, int, Verdict]]`):
            Row id, difficulty and verdict of each rollout. A row that several processes were given, because the last
            batch was filled up, counts once.
        step (`int`, *optional*, defaults to `0`):
            Optimizer steps taken before.

    Returns:
        [`Rates`]: the rates.
    """
    rows = {row_id: (difficulty, verdict) for row_id, difficulty, verdict in reversed(records)}
    groups = defaultdict(list)
    for difficulty, verdict in rows.values():
        groups[difficulty].append(verdict.success)
    overall = sum(verdict.success for _, verdict in rows.values()) / len(rows)
    valid_calls = sum(verdict.valid_call for _, verdict in rows.values()) / len(rows)
    by_difficulty = {difficulty: sum(group) / len(group) for difficulty, group in sorted(groups.items())}
    return Rates(overall, by_difficulty, valid_calls, step)


def comparison(before: Rates, after: Rates, assisted: Rates | None = None) -> str:
    """
    The last lines of a run: the rates by difficulty, then overall; of a run with an assisted warm-up also the rate of
    valid calls and the accuracy before it, after it and at the end.

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

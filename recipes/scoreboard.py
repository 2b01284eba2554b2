"""How often the policy succeeds: the reward function of a recipe and its held-out rates.

Owns the reward function that keeps score, and the callback that turns each evaluation into rates; fed by the task's
judge and by the trainer. A held-out evaluation is the trainer's own (`trainer.evaluate()`), so its rollouts are
sampled exactly as in training, at the training temperature, once per question.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object
from task import Task
from transformers import TrainerCallback


@dataclass(frozen=True)
class Rates:
    """
    Success rates of one evaluation.

    Args:
        overall (`float`):
            Share of the questions that succeeded.
        by_difficulty (`dict[int, float]`):
            The same for each difficulty.
    """

    overall: float
    by_difficulty: dict[int, float]


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
        self.sample: tuple | None = None
        self._judge = task.judge
        self._held_out: list[tuple[str, int, bool]] = []

    def __call__(
        self, prompts: list, completions: list, environments: list, log_metric: Any, **columns: Any
    ) -> list[float]:
        """Rewards of a batch of rollouts; held-out ones also go on record."""
        size = len(completions)
        lists = {name: values for name, values in columns.items() if isinstance(values, list) and len(values) == size}
        rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        verdicts = [
            self._judge(completion, environment, row)
            for completion, environment, row in zip(completions, environments, rows, strict=True)
        ]
        for row, verdict in zip(rows, verdicts, strict=True):
            if row["split"] == "held_out":
                self._held_out.append((row["row_id"], row["difficulty"], verdict.success))
        if rows[0]["split"] == "train":
            self.sample = prompts[0], completions[0], verdicts[0]
        log_metric("success", sum(verdict.success for verdict in verdicts) / size)
        return [verdict.reward for verdict in verdicts]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Turn what was recorded since the last evaluation into rates, over all processes."""
        records, self._held_out = gather_object(self._held_out), []
        if records:
            self.evaluations.append(success_rates(records))


def success_rates(records: list[tuple[str, int, bool]]) -> Rates:
    """
    Rates of the given rollouts.

    Args:
        records (`list[tuple[str, int, bool]]`):
            Row id, difficulty and success of each rollout. A row that several processes were given, because the last
            batch was filled up, counts once.

    Returns:
        [`Rates`]: the rates.
    """
    rows = {row_id: (difficulty, success) for row_id, difficulty, success in reversed(records)}
    groups = defaultdict(list)
    for difficulty, success in rows.values():
        groups[difficulty].append(success)
    overall = sum(success for _, success in rows.values()) / len(rows)
    return Rates(overall, {difficulty: sum(group) / len(group) for difficulty, group in sorted(groups.items())})


def comparison(before: Rates, after: Rates) -> str:
    """
    The last lines of a run: the rates by difficulty, then overall.

    Args:
        before, after ([`Rates`]):
            Rates before and after training.

    Returns:
        `str`: the lines, without a newline at the end.
    """
    lines = [
        f"difficulty {difficulty}: {rate:.2f} -> {after.by_difficulty[difficulty]:.2f}"
        for difficulty, rate in before.by_difficulty.items()
    ]
    return "\n".join([*lines, f"held-out success: {before.overall:.2f} -> {after.overall:.2f}"])

"""The results of an evaluation, as rates with confidence intervals, and the settings of the evaluated run."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rich.table import Table

from trl_toolgrpo.types import JSONObject

from ..task import Verdict


SETTINGS = "recipe.json"


@dataclass(frozen=True)
class RunSettings:
    """
    What a trained model was trained on, and how its rollouts were sampled.

    Args:
        task (`str`, *optional*):
            The task.
        held_out_size, question_seed, difficulty (`int`, *optional*):
            Its held-out questions.
        temperature, max_completion_length, max_tool_calling_iterations, chat_template_kwargs (*optional*):
            As in [`ToolGRPOConfig`].
        load_in_4bit, load_in_8bit, bnb_4bit_quant_type, use_bnb_nested_quant (*optional*):
            Quantization of the base model, as in TRL's [`~trl.ModelConfig`].
    """

    task: str = "workspace"
    held_out_size: int = 120
    question_seed: int = 0
    difficulty: int | None = None
    temperature: float = 1.0
    max_completion_length: int = 512
    max_tool_calling_iterations: int | None = 8
    chat_template_kwargs: JSONObject | None = field(default_factory=lambda: {"enable_thinking": False})
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    use_bnb_nested_quant: bool = False

    @classmethod
    def of(cls, *sources: object) -> "RunSettings":
        """Return the settings found among the attributes of other records."""
        found = {f.name: getattr(source, f.name) for source in sources for f in fields(cls) if hasattr(source, f.name)}
        return cls(**found)

    @classmethod
    def load(cls, folder: str | Path) -> "RunSettings":
        """Read the settings in a run's output folder, also for its checkpoints; without any, return the defaults."""
        file = Path(folder) / SETTINGS
        if not file.is_file() and Path(folder).name.startswith("checkpoint-"):
            file = Path(folder).parent / SETTINGS
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return cls(**{name: value for name, value in known.items() if name in {f.name for f in fields(cls)}})

    def save(self, folder: str | Path) -> None:
        """Write the settings to an output folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / SETTINGS).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Rate:
    """
    A share of questions with its 95% confidence interval.

    Args:
        successes, questions (`int`):
            How many of how many.
        rate, low, high (`float`):
            The share and the bounds of its interval.
    """

    successes: int
    questions: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> "Rate":
        """Return the rate of at least one outcome."""
        return cls(sum(outcomes), len(outcomes), sum(outcomes) / len(outcomes), *wilson(sum(outcomes), len(outcomes)))

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int, questions: int, z: float = 1.959964) -> tuple[float, float]:
    """
    Compute Wilson's score interval for a share (https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        successes, questions (`int`):
            How many of how many; at least one question.
        z (`float`, *optional*, defaults to `1.959964`):
            Normal quantile; the default is for 95%.

    Returns:
        `tuple[float, float]`: lower and upper bound.
    """
    share, spread = successes / questions, z * z / questions
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / questions + spread / (4 * questions))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class TaskResult:
    """
    The result of an evaluation on one task.

    Args:
        task (`str`):
            Its name.
        success, valid_calls ([`Rate`]):
            Share of the questions that succeeded, and of those with a call that matches its tool's schema.
        by_difficulty (`dict[int, Rate]`):
            Success for each difficulty.
        outcomes (`dict[str, bool]`):
            Success of each question by its id.
    """

    task: str
    success: Rate
    valid_calls: Rate
    by_difficulty: dict[int, Rate]
    outcomes: dict[str, bool]

    @classmethod
    def of(cls, task: str, records: Sequence[tuple[str, int, Verdict]]) -> "TaskResult":
        """
        Return the result of some rollouts.

        Args:
            task (`str`):
                Name of the task.
            records (`Sequence[tuple[str, int, Verdict]]`):
                Row id, difficulty and verdict of each; a row that occurs twice counts once.
        """
        rows = {row_id: (difficulty, verdict) for row_id, difficulty, verdict in reversed(records)}
        verdicts = [verdict for _, verdict in rows.values()]
        groups = {
            difficulty: [verdict.success for kind, verdict in rows.values() if kind == difficulty]
            for difficulty in sorted({difficulty for difficulty, _ in rows.values()})
        }
        return cls(
            task,
            Rate.of([verdict.success for verdict in verdicts]),
            Rate.of([verdict.valid_call for verdict in verdicts]),
            {difficulty: Rate.of(group) for difficulty, group in groups.items()},
            {row_id: verdict.success for row_id, (_, verdict) in sorted(rows.items())},
        )


def as_table(model: str, results: Sequence[TaskResult]) -> Table:
    """
    Return the results as a table for the console.

    Args:
        model (`str`):
            What was evaluated.
        results (`Sequence[TaskResult]`):
            The results.

    Returns:
        `rich.table.Table`: the table.
    """
    table = Table(title=model)
    for name in ("task", "difficulty", "questions", "success [95% interval]", "valid calls"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for result in results:
        success = result.success
        table.add_row(result.task, "all", str(success.questions), str(success), f"{result.valid_calls.rate:.3f}")
        for difficulty, rate in result.by_difficulty.items():
            table.add_row("", str(difficulty), str(rate.questions), str(rate), "")
        table.add_section()
    return table


def write_json(file: Path, model: str, settings: JSONObject, results: Sequence[TaskResult]) -> None:
    """
    Write the results as JSON.

    Args:
        file (`Path`):
            File to write.
        model (`str`):
            What was evaluated.
        settings (`dict`):
            How it was evaluated.
        results (`Sequence[TaskResult]`):
            The results.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"model": model, "settings": settings, "results": [asdict(result) for result in results]}
    file.write_text(json.dumps(record, indent=1), encoding="utf-8")

"""Checks of the data sets at construction: they have prompts, in a form that can be trained on, and enough of them."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from datasets import Dataset, IterableDataset

from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError, DatasetError
from ..types import Row


logger = logging.getLogger(__name__)

Data: TypeAlias = Dataset | IterableDataset

ROWS_CHECKED = 20_000
"""Rows of each data set whose prompts are searched for tools that do not exist."""
STREAMED_ROWS_CHECKED = 100
"""The same for a data set that is streamed, where each row may cost a download."""


def named_datasets(train: Data | None, evaluation: Data | Mapping[str, Data] | None) -> Iterator[tuple[str, Data]]:
    """Yield every data set of a trainer with a name for messages."""
    several = evaluation if isinstance(evaluation, Mapping) else {}
    named = {"train_dataset": train, **{f"eval_dataset[{name!r}]": dataset for name, dataset in several.items()}}
    named |= {} if isinstance(evaluation, Mapping) else {"eval_dataset": evaluation}
    yield from ((name, dataset) for name, dataset in named.items() if dataset is not None)


def column_names(dataset: Data) -> list[str]:
    """Return the columns of the rows of a data set; a transform may make others than are stored."""
    columns = list(dataset.column_names or ())
    if "prompt" not in columns or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        columns += next(iter(_rows(dataset, 1)), {})
    return list(dict.fromkeys(columns))


def check_dataset(name: str, dataset: object, has_tools: bool, has_environment: bool) -> None:
    """
    Check that a data set has prompts, and conversational ones where tools are called.

    Raises:
        DatasetError: for a data set without `prompt` where no environment gives it, string prompts with tools, and a
            format such as that of pandas.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DatasetError(
            f"You passed `{name}` without a single row.", remedy="Pass a data set that has prompts in it."
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom", "torch"):
        raise DatasetError(
            f"You passed `{name}` in the format {dataset.format['type']!r}, which gives prompts as something else "
            "than text or lists of messages.",
            remedy="Pass `dataset.with_format(None)`.",
        )
    columns = column_names(dataset)
    if "tools" in columns and not (has_tools or has_environment):
        logger.warning(
            "`%s` has a column `tools`, but you passed neither `tools` nor an `environment_factory`: no tool is shown "
            "to the policy and none can be called.",
            name,
        )
    if "prompt" not in columns and not has_environment:
        raise DatasetError(
            f"You passed `{name}` with the columns {', '.join(columns) or '(none)'}, and none of them is `prompt`.",
            remedy="Rename the column that holds the prompt, or pass an `environment_factory` whose `reset` returns "
            "it.",
        )
    if not (has_tools or has_environment) or "prompt" not in columns:
        return
    for row in _rows(dataset, 1):
        if not isinstance(row["prompt"], list):
            raise DatasetError(
                f"You passed tools and `{name}`, whose prompts are of type {type(row['prompt']).__name__}. A tool "
                "call is a message, so prompts have to be conversations.",
                remedy=f"Write them as [{{'role': 'user', 'content': {str(row['prompt'])[:60]!r}}}].",
            )


def check_rows(args: ToolGRPOConfig, dataset: object) -> None:
    """
    Check that the training data is enough for one rollout batch, without which training ends at once.

    Args:
        args ([`ToolGRPOConfig`]):
            Batch sizes.
        dataset (`Dataset` or `IterableDataset`):
            The training data; of a stream as many rows are read as a rollout batch takes.

    Raises:
        DatasetError: for too few rows, with both numbers.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    size, count = int(args.generation_batch_size or 0), int(args.num_generations or 1)
    needed = size // count
    rows = len(dataset) if isinstance(dataset, Dataset) else sum(1 for _ in itertools.islice(dataset, needed))
    if rows < needed:
        raise DatasetError(
            f"`train_dataset` has {rows} row{'' if rows == 1 else 's'}, and a rollout batch takes {needed} prompts "
            f"({size} rollouts in groups of `num_generations={count}`): no batch would ever be whole, and training "
            "would end after 0 steps.",
            remedy="Add rows, or make batches smaller: lower `per_device_train_batch_size`, "
            "`gradient_accumulation_steps`, `steps_per_generation` or `generation_batch_size`, or raise "
            "`num_generations`.",
        )


def check_best_metric(args: ToolGRPOConfig, eval_dataset: object) -> None:
    """
    Check that the metric which chooses the best model is one of some evaluation set.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            What is evaluated.

    Raises:
        ConfigError: if there are several sets, and the metric is of none of them.
    """
    metric = args.metric_for_best_model
    if not isinstance(eval_dataset, dict) or metric is None or args.eval_strategy == "no":
        return
    bare = metric.removeprefix("eval_")
    if any(bare.startswith(f"{name}_") for name in eval_dataset):
        return
    choices = " or ".join(repr(f"eval_{name}_{bare}") for name in eval_dataset)
    raise ConfigError(
        f"You passed `eval_dataset` as a dict, and the best model is chosen by `metric_for_best_model={metric!r}`. "
        f"Each set has figures of its own, so that there is no `eval_{bare}`.",
        remedy=f"Pass {choices}.",
    )


def prompt_rows(dataset: object) -> list[Row]:
    """
    Return prompts and `tools` columns of the first rows of a data set, as many as are checked.

    Args:
        dataset (`object`):
            A data set; of anything but a `Dataset` or an `IterableDataset` no row is read.
    """
    return list(_rows(dataset, ROWS_CHECKED)) if isinstance(dataset, (Dataset, IterableDataset)) else []


def _rows(dataset: Data, count: int) -> Iterable[Row]:
    """Return the first rows of a data set; without a transform only the columns read here, since images are slow."""
    if not isinstance(dataset, Dataset):
        return itertools.islice(iter(dataset), min(count, STREAMED_ROWS_CHECKED))
    if dataset.format["type"] == "custom":
        return (dataset[index] for index in range(min(count, len(dataset))))
    read = [name for name in ("prompt", "tools") if name in dataset.column_names]
    batch = dataset.select_columns(read)[:count] if read else {}  # at once: row by row takes ten times as long
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))

"""Checks of what reward functions ask for and what they return, whose errors name the function and what there is."""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn

from .errors import ConfigError, RewardError
from .tools.results import encodable
from .tools.types import is_async_callable


logger = logging.getLogger(__name__)

GIVEN = (
    *("prompts", "completions", "completion_ids", "trajectories", "environments", "mcp_sessions"),
    *("trainer_state", "log_extra", "log_metric"),
)
"""What reward functions may get in addition to the columns of the data."""
_ALWAYS_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_NOT_GIVEN = ("prompt", "completion")  # columns that TRL keeps back


def check_columns(
    name: str, dataset: Any, reward_funcs: Iterable[Any], names: Iterable[str], absent: Collection[str] = ()
) -> None:
    """
    Check that a data set has the columns that reward functions ask for.

    Args:
        name (`str`):
            Name of the data set, for messages.
        dataset (`Dataset` or `IterableDataset`):
            The data set; of others nothing is known.
        reward_funcs (`Iterable[Callable | nn.Module]`):
            The reward functions.
        names (`Iterable[str]`):
            Their names.
        absent (`Collection[str]`, *optional*, defaults to `()`):
            What of [`GIVEN`] this run has not.

    Raises:
        ConfigError: for a column that is not there, with those that are, and a function that does not take what
            every one is given.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    columns = dict.fromkeys(dataset.column_names or ())
    if not columns or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        columns |= dict.fromkeys(next(iter(dataset), {}))  # of a transform
    for function, function_name in zip(reward_funcs, names, strict=True):
        missing = _missing(function, {*columns, *(g for g in GIVEN if g not in absent)}.difference(_NOT_GIVEN))
        if missing:
            raise ConfigError(_missing_columns(function_name, missing, f"`{name}`", columns))
        refused = _refused(function, {*columns, *_ALWAYS_GIVEN}.difference(_NOT_GIVEN))
        if refused is not None:
            raise ConfigError(
                f"The reward function `{function_name}` {refused}. Every argument is passed by keyword, all columns "
                "of the data among them.",
                remedy="Name those it needs, and end its parameters with `**kwargs`.",
            )


def checked(function: Any, name: str) -> Any:
    """
    Return a reward function that checks what it is asked with and what it returns; a model as it is.

    Args:
        function (`Callable` or `nn.Module`):
            The reward function.
        name (`str`):
            Its name.
    """
    if isinstance(function, nn.Module):
        return function
    say_once = functools.partial(_say_once, set())

    def given(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        missing = _missing(function, kwargs)
        if missing and "prompts" in kwargs:
            raise RewardError(_missing_columns(name, missing, "the data", set(kwargs).difference(GIVEN)))
        return {**kwargs, **_loggers(name, kwargs, say_once)}

    def rewards_of(result: Any, kwargs: Mapping[str, Any]) -> Any:
        if "prompts" not in kwargs:  # asked by a script, of which nothing is known
            return result
        rewards = _rewards(name, result, len(kwargs["prompts"]))
        nan = next((row for row, reward in enumerate(rewards) if reward is not None and math.isnan(reward)), None)
        if nan is not None:
            say_once(
                "NaN",
                "The reward function `%s` returned NaN for rollout %d. It counts as a rollout that the function "
                "cannot score, as None does; if it can, look for a division by zero or a logarithm of it.",
                *(name, nan),
            )
        return rewards

    if is_async_callable(function):

        async def reward_async(*args: Any, **kwargs: Any) -> Any:
            kwargs = given(kwargs)
            return rewards_of(await function(*args, **kwargs), kwargs)

        return functools.wraps(function)(reward_async)

    def reward(*args: Any, **kwargs: Any) -> Any:
        kwargs = given(kwargs)
        return rewards_of(function(*args, **kwargs), kwargs)

    return functools.wraps(function)(reward)


def _parameters(function: Any) -> list[inspect.Parameter]:
    """Parameters of a function as it is called: a decorator's own, which may leave out or add what it likes."""
    try:
        return list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):  # of a built-in
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _say_once(said: set[str], what: str, message: str, *values: Any) -> None:
    if what not in said:
        said.add(what)
        logger.warning(message, *values)


def _loggers(function: str, kwargs: Mapping[str, Any], say_once: Callable[..., None]) -> dict[str, Any]:
    """What a reward function logs with, in place of TRL's."""
    makers = {"log_metric": _metric_logger, "log_extra": _column_logger}
    return {key: make(function, kwargs[key], say_once) for key, make in makers.items() if callable(kwargs.get(key))}


def _metric_logger(function: str, log: Callable[..., Any], say_once: Callable[..., None]) -> Callable[..., None]:
    """TRL's `log_metric` for a reward function; what is no number is left out, since it would end the run."""

    def log_metric(name: Any, value: Any) -> None:
        metric = encodable(str(name))
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            log(metric, float(value))
        except Exception:  # of a value of any kind
            say_once(
                f"metric {metric}",
                "The reward function `%s` logs %s as the metric `%s`, which is no number: it is left out. Pass one "
                "number to `log_metric`.",
                *(function, _short(value), metric),
            )

    return log_metric


def _column_logger(function: str, log: Callable[..., Any], say_once: Callable[..., None]) -> Callable[..., None]:
    """TRL's `log_extra` for a reward function; what is no list is left out, since it would end the run."""

    def log_extra(column: Any, values: Any) -> None:
        column = encodable(str(column))
        listed = values.tolist() if hasattr(values, "tolist") else values
        if isinstance(listed, str | bytes | Mapping) or not isinstance(listed, Iterable):
            return say_once(
                f"column {column}",
                "The reward function `%s` logs %s in the column `%s`, which is no list: it is left out. Pass one "
                "value for each completion to `log_extra`.",
                *(function, _short(values), column),
            )
        log(column, list(listed))
        return None

    return log_extra


def _missing(function: Any, given: Collection[str]) -> list[str]:
    """Arguments without which a function cannot be called by keyword."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in _parameters(function) if p.kind in by_name and p.default is p.empty]
    return [name for name in needed if name not in given]


def _refused(function: Any, given: Collection[str]) -> str | None:
    """What a function does not take although it is given by keyword, in words."""
    parameters = _parameters(function)
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    refused = [] if takes_all else sorted({*given}.difference(p.name for p in parameters))
    if not by_place and not refused:
        return None
    named = ", ".join(f"`{argument}`" for argument in by_place or refused)
    return f"takes {named} by position alone" if by_place else f"does not take {named}"


def _missing_columns(name: str, missing: list[str], where: str, columns: Iterable[str]) -> str:
    asked = ", ".join(f"`{argument}`" for argument in missing)
    held = ", ".join(f"`{column}`" for column in sorted(columns)) or "none"
    kept_back = " `prompt` is given as `prompts`, a list." if "prompt" in missing else ""
    return (
        f"The reward function `{name}` asks for {asked}, and {where} has no such column; its columns are {held}."
        f"{kept_back} Every reward function also gets {', '.join(f'`{given}`' for given in GIVEN)}, where there are "
        f"any. Correct the argument's name, give it a default, or add the column."
    )


def _rewards(name: str, result: Any, count: int) -> list[float | None]:
    """What a reward function returned, as numbers."""
    result = result.tolist() if hasattr(result, "tolist") else result  # of a tensor or an array at once
    if isinstance(result, str | bytes | Mapping | Set) or not isinstance(result, Iterable):
        raise RewardError(
            f"The reward function `{name}` returned {_short(result)} instead of a list of {count} rewards, one for "
            "each completion.",
            remedy="Return a list of numbers, with None for a rollout that it cannot score.",
        )
    values = list(result)
    if len(values) != count:
        raise RewardError(
            f"The reward function `{name}` returned {len(values)} rewards for {count} completions.",
            remedy="Return one for each, with None for a rollout that it cannot score.",
        )
    rewards: list[float | None] = []
    for rollout, value in enumerate(values):
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            rewards.append(None if value is None else float(value))
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(
                f"The reward function `{name}` returned {_short(value)} for rollout {rollout}, which is no number.",
                remedy="Return a number for each completion, or None for a rollout that it cannot score.",
            ) from error
    return rewards


def _short(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:80] + '...'} of type {type(value).__name__}"

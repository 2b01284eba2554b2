"""Checks of what reward functions ask for and what they return, whose errors name the function and what there is."""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from torch import nn

from ..errors import ConfigError, RewardError, ToolGRPOError
from ..tools.results import encodable
from ..tools.tool import is_async_callable
from ..types import Row
from .data import column_names


logger = logging.getLogger(__name__)

WarnOnce: TypeAlias = Callable[..., None]
RewardFunction: TypeAlias = Callable[..., Any] | nn.Module

GIVEN = (
    *("prompts", "completions", "completion_ids", "trajectories", "environments", "mcp_sessions"),
    *("trainer_state", "log_extra", "log_metric"),
)
"""What reward functions may get in addition to the columns of the data."""
_ALWAYS_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_NOT_GIVEN = ("prompt", "completion")  # columns that TRL keeps back


def check_columns(
    name: str,
    dataset: object,
    reward_funcs: Iterable[str | RewardFunction],
    names: Iterable[str],
    absent: Collection[str] = (),
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
    columns = column_names(dataset)
    available = {*columns, *set(GIVEN).difference(absent)}.difference(_NOT_GIVEN)
    for function, function_name in zip(reward_funcs, names, strict=True):
        missing = _missing_arguments(function, available)
        if missing:
            raise _missing_columns(ConfigError, function_name, missing, f"`{name}`", columns)
        refused = _refusal(function, {*columns, *_ALWAYS_GIVEN}.difference(_NOT_GIVEN))
        if refused is not None:
            raise ConfigError(
                f"The reward function `{function_name}` {refused}. Every argument is passed by keyword, all columns "
                "of the data among them.",
                remedy="Name those it needs, and end its parameters with `**kwargs`.",
            )


def checked(function: str | RewardFunction, name: str) -> str | RewardFunction:
    """
    Return a reward function that checks what it is asked with and what it returns; a model as it is.

    Args:
        function (`Callable` or `nn.Module`):
            The reward function.
        name (`str`):
            Its name.
    """
    if isinstance(function, str | nn.Module):
        return function
    warn_once = functools.partial(_warn_once, set())

    def given(kwargs: Mapping[str, object]) -> dict[str, object]:
        missing = _missing_arguments(function, kwargs)
        if missing and "prompts" in kwargs:
            raise _missing_columns(RewardError, name, missing, "the data", set(kwargs).difference(GIVEN))
        return {**kwargs, **_loggers(name, kwargs, warn_once)}

    def rewards_of(result: object, kwargs: Row) -> object:
        if "prompts" not in kwargs:  # asked by a script, of which nothing is known
            return result
        rewards = _rewards(name, result, len(kwargs["prompts"]))
        nan = next((row for row, reward in enumerate(rewards) if reward is not None and math.isnan(reward)), None)
        if nan is not None:
            warn_once(
                "NaN",
                "The reward function `%s` returned NaN for rollout %d. It counts as a rollout that the function "
                "cannot score, as None does; if it can, look for a division by zero or a logarithm of it.",
                *(name, nan),
            )
        return rewards

    def reward(*args: object, **kwargs: object) -> object:
        kwargs = given(kwargs)
        return rewards_of(function(*args, **kwargs), kwargs)

    async def reward_async(*args: object, **kwargs: object) -> object:
        kwargs = given(kwargs)
        return rewards_of(await function(*args, **kwargs), kwargs)

    return functools.wraps(function)(reward_async if is_async_callable(function) else reward)


def _parameters(function: str | RewardFunction) -> list[inspect.Parameter]:
    """Return the parameters of a function as it is called: a decorator's own, which may leave out or add some."""
    if isinstance(function, str):  # a model that TRL loads
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
    try:
        return list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):  # of a built-in
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _warn_once(said: set[str], what: str, message: str, *values: object) -> None:
    if what not in said:
        said.add(what)
        logger.warning(message, *values)


def _loggers(function: str, kwargs: Mapping[str, object], warn_once: WarnOnce) -> dict[str, Callable[..., None]]:
    """Return what a reward function logs with in place of TRL's: what would end the run is left out."""
    given = {name: log for name in ("log_metric", "log_extra") if callable(log := kwargs.get(name))}

    def log_metric(name: object, value: object) -> None:
        metric = encodable(str(name))
        try:
            given["log_metric"](metric, _number(value))
        except Exception:  # of a value of any kind
            warn_once(
                f"metric {metric}",
                "The reward function `%s` logs %s as the metric `%s`, which is no number: it is left out. Pass one "
                "number to `log_metric`.",
                *(function, _excerpt(value), metric),
            )

    def log_extra(column: object, values: object) -> None:
        column, listed = encodable(str(column)), _items(values)
        if listed is not None:
            return given["log_extra"](column, listed)
        return warn_once(
            f"column {column}",
            "The reward function `%s` logs %s in the column `%s`, which is no list: it is left out. Pass one "
            "value for each completion to `log_extra`.",
            *(function, _excerpt(values), column),
        )

    own: dict[str, Callable[..., None]] = {"log_metric": log_metric, "log_extra": log_extra}
    return {name: own[name] for name in given}


def _number(value: object) -> float:
    """Return a number, of which text is none; raise where there is none."""
    if isinstance(value, str | bytes):
        raise TypeError
    return float(value)  # type: ignore[arg-type]


def _items(values: object) -> list[object] | None:
    """Return the items of a list, an array or a tensor, which is read at once; `None` for what has none."""
    found: object = values.tolist() if hasattr(values, "tolist") else values
    return list(found) if isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping) else None


def _missing_arguments(function: str | RewardFunction, given: Collection[str]) -> list[str]:
    """Return the arguments without which a function cannot be called by keyword."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in _parameters(function) if p.kind in by_name and p.default is p.empty]
    return [name for name in needed if name not in given]


def _refusal(function: str | RewardFunction, given: Collection[str]) -> str | None:
    """Return a text about the arguments that a function does not take although it is given them by keyword."""
    parameters = _parameters(function)
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    refused = [] if takes_all else sorted({*given}.difference(p.name for p in parameters))
    if not by_place and not refused:
        return None
    named = ", ".join(f"`{argument}`" for argument in by_place or refused)
    return f"takes {named} by position alone" if by_place else f"does not take {named}"


def _missing_columns(
    kind: type[ToolGRPOError], name: str, missing: list[str], where: str, columns: Iterable[str]
) -> ToolGRPOError:
    wanted = ", ".join(f"`{argument}`" for argument in missing)
    held = ", ".join(f"`{column}`" for column in sorted(columns)) or "none"
    kept_back = " `prompt` is given as `prompts`, a list." if "prompt" in missing else ""
    return kind(
        f"The reward function `{name}` asks for {wanted}, and {where} has no such column; its columns are {held}."
        f"{kept_back} Every reward function also gets {', '.join(f'`{given}`' for given in GIVEN)}, where there are "
        f"any.",
        remedy="Correct the argument's name, give it a default, or add the column.",
    )


def _rewards(name: str, result: object, count: int) -> list[float | None]:
    """Return what a reward function returned as numbers."""
    values = None if isinstance(result, Set) else _items(result)
    if values is None:
        raise RewardError(
            f"The reward function `{name}` returned {_excerpt(result)} instead of a list of {count} rewards, one for "
            "each completion.",
            remedy="Return a list of numbers, with None for a rollout that it cannot score.",
        )
    if len(values) != count:
        raise RewardError(
            f"The reward function `{name}` returned {len(values)} rewards for {count} completions.",
            remedy="Return one for each, with None for a rollout that it cannot score.",
        )
    rewards: list[float | None] = []
    for rollout, value in enumerate(values):
        try:
            rewards.append(None if value is None else _number(value))
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(
                f"The reward function `{name}` returned {_excerpt(value)} for rollout {rollout}, which is no number.",
                remedy="Return a number for each completion, or None for a rollout that it cannot score.",
            ) from error
    return rewards


def _excerpt(value: object) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:80] + '...'} of type {type(value).__name__}"

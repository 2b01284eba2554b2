"""Environments that live on threads of their own, seen from the training thread as if they lived there.

TRL constructs, resets and scores environments on the training thread; tools run off it, and a `sqlite3` connection
refuses every thread but the one that opened it. So an environment is constructed on its own thread, and what the
trainer and reward functions ask of it (`reset`, `get_reward`, any attribute) is run there, within a time limit. One
that does not keep the limit has failed, and with it its rollout, not the run.
"""

import asyncio
import contextlib
import functools
import inspect
import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from ..errors import ConfigError, EnvironmentTimeoutError, ToolRuntimeError, TransientToolError
from .execute import ToolExecutor
from .types import is_async_callable


logger = logging.getLogger(__name__)

_THREAD_BOUND = (sqlite3.Connection, sqlite3.Cursor)
_FAILURES = (TimeoutError, TransientToolError)  # of an environment that fails as data; other errors end the run
_SCORING: ContextVar[bool] = ContextVar("scoring", default=False)  # whether a reward function runs, on any thread


class FailedEnvironment:
    """What a rollout has in place of an environment whose constructor did not return."""

    def reset(self, **row: Any) -> None:
        """Do nothing."""


class EnvironmentFailures:
    """
    The environments of the current rollout batch that failed, and how many in a row did.

    Args:
        most_in_row (`int`, *optional*, defaults to `8`):
            Failures of the same kind in a row that stop the run.
    """

    def __init__(self, most_in_row: int = 8) -> None:
        self.most_in_row = most_in_row
        self.of_batch: list[Any] = []
        self._in_row: Counter[str] = Counter()

    def includes(self, environment: object) -> bool:
        """Whether an environment has failed."""
        return any(environment is failed for failed in self.of_batch)

    def add(self, environment: object, name: str, error: BaseException) -> None:
        """
        Count a failure.

        Args:
            environment (`object`):
                What failed, and is not used again.
            name (`str`):
                What was asked of it: `constructor`, `reset` or another attribute.
            error (`BaseException`):
                What it raised.

        Raises:
            ToolRuntimeError: after too many failures in a row.
        """
        if not self.includes(environment):
            self.of_batch.append(environment)
        self._in_row[name] += 1
        count = self._in_row[name]
        said = f"{str(error) or type(error).__name__}"
        if count >= self.most_in_row:
            raise ToolRuntimeError(
                f"{count} environments in a row failed, the last of them: {said} Mend the environment's `{name}`, or "
                f"allow more time (`environment_timeout`)."
            ) from error
        logger.warning("An environment failed: %s Its rollout is not scored, and it is not used again.", said)

    def succeeded(self, name: str) -> None:
        """Note that an environment did what was asked, which ends a row of failures."""
        self._in_row.pop(name, None)


def on_own_thread(
    factory: Any, executor: ToolExecutor, failures: EnvironmentFailures | None = None, limits_tools: bool = True
) -> Any:
    """
    Wrap an environment factory, or a dict of them, so that each instance belongs to a thread of its own.

    The instances are of a subclass of the environment's class with the same name. From the thread that called
    `on_own_thread`, and in reward functions on any thread ([`scoring_without_failed`]), attributes are read and
    methods run on the environment's thread; `sqlite3` connections and cursors come back as stand-ins that do the same.
    Coroutine functions run on the event loop of tools; `reset` is awaited. From any other thread they are plain
    objects.

    Args:
        factory (`Callable` or `dict[str, Callable]`, *optional*):
            Gives a new environment; `None` is passed through.
        executor ([`ToolExecutor`]):
            Runs the environment's threads, and has the time limit.
        failures ([`EnvironmentFailures`], *optional*):
            Gets the instances that fail.
        limits_tools (`bool`, *optional*, defaults to `True`):
            Whether methods have the time limit also outside of reward functions, where TRL calls them as tools.

    Raises:
        ConfigError: if a factory cannot be called.
    """
    if factory is None:
        return None
    access = _Access(executor, failures or EnvironmentFailures(), limits_tools)
    for make in factory.values() if isinstance(factory, dict) else [factory]:
        if not callable(make):
            raise ConfigError(f"You passed the environment factory {make!r}, which cannot be called. Pass a class.")
    if isinstance(factory, dict):
        return {name: _factory(make, access) for name, make in factory.items()}
    return _factory(factory, access)


def scoring_plain_instances(reward_func: Any) -> Any:
    """
    TRL's reward of an environment's class, extended to instances that live on no thread of their own.

    TRL compares types, and scripts may call this reward with an environment they made themselves. Any other reward
    function is given back as it is.

    Args:
        reward_func (`Callable`):
            One of the trainer's.
    """
    kind = (getattr(reward_func, "__defaults__", None) or (None,))[0]
    plain: Any = getattr(kind, "_plain_class", None)
    if plain is None:
        return reward_func

    def class_of(environments: list[Any]) -> Any:
        return plain if any(type(environment) is plain for environment in environments) else kind

    if inspect.iscoroutinefunction(reward_func):

        async def get_reward_async(environments: list[Any], **kwargs: Any) -> Any:
            return await reward_func(environments, class_of(environments), **kwargs)

        return functools.wraps(reward_func)(get_reward_async)

    def get_reward(environments: list[Any], **kwargs: Any) -> Any:
        return reward_func(environments, class_of(environments), **kwargs)

    return functools.wraps(reward_func)(get_reward)


def scoring_without_failed(reward_func: Any, failures: EnvironmentFailures) -> Any:
    """
    A reward function that is not asked about rollouts whose environment has failed: they get 0.0.

    The trainer replaces that by no reward. TRL would take a `None` for a fault of the reward functions, and say so.

    What it reads of the other environments is read on their own threads, also by a coroutine function. If one of them
    does not answer, its rollout has failed too, and the function is called again without it; what it logged before
    that is dropped.

    Args:
        reward_func (`Callable`):
            One of the trainer's, no module.
        failures ([`EnvironmentFailures`]):
            The environments that failed.
    """
    if is_async_callable(reward_func):

        async def scored_async(*args: Any, **kwargs: Any) -> Any:
            while True:
                call = _ScoringCall(kwargs, failures)
                if not call.kept:
                    return call.result([])
                with call.attempt():
                    return call.result(await reward_func(*args, **call.arguments))

        return functools.wraps(reward_func)(scored_async)

    def scored(*args: Any, **kwargs: Any) -> Any:
        while True:
            call = _ScoringCall(kwargs, failures)
            if not call.kept:
                return call.result([])
            with call.attempt():
                return call.result(reward_func(*args, **call.arguments))

    return functools.wraps(reward_func)(scored)


class _ScoringCall:
    """A call of a reward function on the rollouts whose environment has not failed."""

    def __init__(self, arguments: dict[str, Any], failures: EnvironmentFailures) -> None:
        environments = arguments.get("environments") or [None]
        self._failures = failures
        self._environments = environments
        self._count = len(environments)
        self._logged: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.kept = [row for row, environment in enumerate(environments) if not failures.includes(environment)]
        self.arguments = {name: self._argument(name, value) for name, value in arguments.items()}

    def _argument(self, name: str, value: Any) -> Any:
        if name == "log_metric":
            return lambda *args: self._logged.append((value, args))
        if name == "log_extra":
            return lambda column, values: self._logged.append((value, (column, self._in_all_rows(values))))
        whole = len(self.kept) == self._count or not isinstance(value, list) or len(value) != self._count
        return value if whole else [value[row] for row in self.kept]

    def _in_all_rows(self, values: Any) -> Any:
        if len(self.kept) == self._count or not hasattr(values, "__len__") or len(values) != len(self.kept):
            return values
        found = dict(zip(self.kept, values, strict=True))
        return [found.get(row) for row in range(self._count)]

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Run the call; an environment that does not answer makes its rollout a failed one."""
        token = _SCORING.set(True)
        try:
            yield
        except EnvironmentTimeoutError as error:
            if not any(error.environment is self._environments[row] for row in self.kept):
                raise
            if not self._failures.includes(error.environment):  # held by a tool's call
                self._failures.of_batch.append(error.environment)
        finally:
            _SCORING.reset(token)

    def result(self, rewards: Any) -> Any:
        """The rewards of all rollouts, once the call has succeeded; 0.0 for those whose environment has failed."""
        for log, args in self._logged:
            log(*args)
        found = self._in_all_rows(rewards)
        if not self._failures.of_batch or not hasattr(found, "__len__") or len(found) != self._count:
            return found
        pairs = zip(self._environments, found, strict=True)
        return [0.0 if self._failures.includes(environment) else reward for environment, reward in pairs]


class _Access:
    """How the training thread and reward functions reach what lives on an environment's thread."""

    def __init__(self, executor: ToolExecutor, failures: EnvironmentFailures, limits_tools: bool) -> None:
        self.executor = executor
        self.failures = failures
        self.limits_tools = limits_tools
        self.classes: dict[type, type] = {}  # shared by all factories, since TRL gives each class one reward
        self._home = threading.get_ident()

    @property
    def is_outside(self) -> bool:
        """Whether the caller is the trainer or a reward function, and not the environment itself."""
        return threading.get_ident() == self._home or _SCORING.get()

    def read(self, owner: Any, name: str) -> Any:
        """An attribute of an environment, as its caller outside gets to see it."""
        lost = self.failures.includes(owner)
        if lost or self.executor.is_abandoned(owner):  # its thread hangs or is not to be trusted
            if name in ("reset", "get_reward"):
                asked = name == "get_reward" and is_async_callable(getattr(type(owner), name, None))
                return _nothing_async if asked else _nothing
            if lost:
                raise EnvironmentTimeoutError(f"The environment {type(owner).__name__} has failed before.", owner)
            value = self._noting(owner, name, functools.partial(self.executor.run_beside_owner, owner, name))
            return _ThreadBound(value, owner, self) if isinstance(value, _THREAD_BOUND) else value
        value = self.run(owner, name, functools.partial(getattr, owner, name))
        if name == "reset" and callable(value):
            return functools.partial(self._reset, owner, value)
        return self.stand_in(value, owner, name)

    def run(self, owner: Any, name: str, work: "functools.partial[Any]") -> Any:
        """Run something on the environment's thread and wait."""
        return self._noting(owner, name, lambda: self._start(owner, name, work).result())

    def _start(self, owner: Any, name: str, work: "functools.partial[Any]", limited: bool = True) -> Any:
        limit = self.executor.environment_timeout if limited else None
        return self.executor.start_on_owner(owner, work, name, limit)

    def _noting(self, owner: Any, name: str, work: Callable[[], Any]) -> Any:
        try:
            value = work()
        except EnvironmentTimeoutError as error:
            self.failures.add(owner, name, error)
            raise
        if not callable(value):  # a method has not yet done anything
            self.failures.succeeded(name)
        return value

    def stand_in(self, value: Any, owner: Any, name: str) -> Any:
        """What the caller outside gets to see of something that lives on the environment's thread."""
        if isinstance(value, _THREAD_BOUND):
            return _ThreadBound(value, owner, self)
        if isinstance(value, functools.partial):
            found = functools.partial(self.stand_in(value.func, owner, name), *value.args, **value.keywords)
            vars(found).update({"__name__": name, **vars(value)})  # TRL asks tools for their names
            return found
        is_own = inspect.ismethod(value) and value.__self__ is owner
        if not is_own and not (name == "get_reward" and callable(value)):
            return value

        def start(*args: Any, **kwargs: Any) -> Any:
            limited = self.limits_tools or _SCORING.get() or name == "get_reward"
            return self._start(owner, name, functools.partial(value, *args, **kwargs), limited)

        if inspect.iscoroutinefunction(value):

            async def method_async(*args: Any, **kwargs: Any) -> Any:
                if self.executor.is_within_call(owner):  # as a tool, whose call has the thread
                    return await value(*args, **kwargs)
                with self._failing(owner, name):
                    return self.stand_in(await asyncio.wrap_future(start(*args, **kwargs)), owner, name)

            return functools.wraps(value)(method_async)

        def method(*args: Any, **kwargs: Any) -> Any:
            if self.executor.is_within_call(owner):
                return value(*args, **kwargs)
            with self._failing(owner, name):
                return self.stand_in(start(*args, **kwargs).result(), owner, name)

        return functools.wraps(value)(method)

    @contextlib.contextmanager
    def _failing(self, owner: Any, name: str) -> Iterator[None]:
        """Count failures; those of `get_reward` leave the rollout without a reward, and others are raised."""
        try:
            yield
            self.failures.succeeded(name)
        except EnvironmentTimeoutError as error:
            self.failures.add(owner, name, error)
            if name != "get_reward":
                raise
        except _FAILURES as error:
            if name != "get_reward":
                raise
            self._give_up(owner, name, error)

    def _give_up(self, owner: Any, name: str, error: BaseException) -> None:
        """Count a failure that the environment has raised by itself."""
        self.executor.give_up(owner)
        of = f"`{name}` of the environment {type(owner).__name__} raised {type(error).__name__}"
        self.failures.add(owner, name, EnvironmentTimeoutError(f"{of}: {error}", owner))

    def _reset(self, owner: Any, reset: Callable[..., Any], /, *args: Any, **row: Any) -> Any:
        """Reset an environment; one that fails has nothing to say, and its rollout is not run."""
        try:
            observation = self._start(owner, "reset", functools.partial(reset, *args, **row)).result()
        except EnvironmentTimeoutError as error:
            self.failures.add(owner, "reset", error)
            return None
        except _FAILURES as error:
            self._give_up(owner, "reset", error)
            return None
        self.failures.succeeded("reset")
        if observation is not None and not isinstance(observation, (str, list)):
            raise ToolRuntimeError(
                f"`reset` of the environment {type(owner).__name__} returned {observation!r:.200}, of type "
                f"{type(observation).__name__}. Return what is added to the prompt, as text or as a list of content "
                f"blocks, or None."
            )
        return observation


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


async def _nothing_async(*args: Any, **kwargs: Any) -> None:
    return None


def _factory(factory: Callable[[], Any], access: _Access) -> Callable[[], Any]:
    made_before = False

    def make() -> Any:
        nonlocal made_before
        try:
            environment = access.executor.construct_on_own_thread(factory)
        except _FAILURES as error:
            name = getattr(factory, "__name__", None) or type(factory).__name__
            failure = EnvironmentTimeoutError(f"The constructor of the environment {name} did not succeed: {error}")
            if not made_before:  # the one that TRL reads the tools from
                raise failure from error
            failed = FailedEnvironment()
            access.failures.add(failed, "constructor", failure)
            return failed
        access.failures.succeeded("constructor")
        made_before = True
        kind = type(environment)
        if kind in access.classes.values():  # a factory that hands out the same instance again
            return environment
        if kind not in access.classes:
            access.classes[kind] = _threaded(kind, access)
        # A class may have a `__setattr__` of its own
        object.__setattr__(environment, "__class__", access.classes[kind])
        return environment

    return functools.update_wrapper(make, factory) if inspect.isroutine(factory) else make


def _threaded(kind: type, access: _Access) -> type:
    _refuse_generators(kind)
    plain: Any = kind.__getattribute__

    def look_up(self: Any, name: str) -> Any:
        if name.startswith("__") or not access.is_outside:
            return plain(self, name)
        return access.read(self, name)

    shown: Any = kind.__repr__

    def described(self: Any) -> Any:
        try:
            return shown(self)
        except EnvironmentTimeoutError:  # which the attributes of one that failed raise; logs show it all the same
            return object.__repr__(self)

    body = {"__getattribute__": look_up, "__repr__": described, "__slots__": ()}
    body |= {"__doc__": kind.__doc__, "__module__": kind.__module__}
    body["_plain_class"] = kind
    missing: Any = getattr(kind, "__getattr__", None)
    if missing is not None:  # Python asks it, on the caller's thread, where `look_up` has found nothing

        def look_up_missing(self: Any, name: str) -> Any:
            if name.startswith("__") or not access.is_outside:
                return missing(self, name)
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}", name=name, obj=self)

        body["__getattr__"] = look_up_missing
    return type(kind.__name__, (kind,), body)


def _refuse_generators(kind: type) -> None:
    for name in ("reset", "get_reward"):
        function = inspect.unwrap(getattr(kind, name, None) or _nothing)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigError(
                f"`{name}` of the environment {kind.__name__} is a generator function (it has a `yield`): a call "
                f"gives a generator, and nothing of its body runs. Return what it yields."
            )


class _ThreadBound:
    """A `sqlite3` object whose methods run on the thread that opened it."""

    def __init__(self, target: Any, owner: Any, access: _Access):
        self._target, self._owner, self._access = target, owner, access

    def _run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        name = type(self._target).__name__
        if self._access.executor.is_abandoned(self._owner):
            raise EnvironmentTimeoutError(
                f"A tool call on the environment {type(self._owner).__name__} did not return within its time limit "
                f"and still holds the environment's thread, which alone may use its {name}. A reward function that "
                f"does not catch this is called again without the rollout.",
                self._owner,
            )
        return self._access.run(self._owner, name, functools.partial(function, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        value = self._run(getattr, self._target, name)
        if not callable(value):
            return value

        def method(*args: Any, **kwargs: Any) -> Any:
            result = self._run(value, *args, **kwargs)
            return self if result is self._target else self._access.stand_in(result, self._owner, name)

        return method

    def __iter__(self) -> Any:
        return iter(self._run(list, self._target))

    def __enter__(self) -> "_ThreadBound":
        self._run(self._target.__enter__)
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._run(self._target.__exit__, *error)

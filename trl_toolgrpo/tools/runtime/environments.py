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
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, TypeAlias

from ...errors import ConfigError, EnvironmentTimeoutError, ToolRuntimeError, TransientToolError
from ..tool import is_async_callable, refuse_generator
from .executor import ToolExecutor
from .worker_threads import Work


logger = logging.getLogger(__name__)

Factory: TypeAlias = Callable[[], object]

_THREAD_BOUND = (sqlite3.Connection, sqlite3.Cursor)
_DATA_ERRORS = (TimeoutError, TransientToolError)  # of an environment that fails as data; other errors end the run
_FORGIVEN = ("reset", "get_reward")  # methods whose failure costs the rollout, and is not raised
_SCORING: ContextVar[bool] = ContextVar("scoring", default=False)  # whether a reward function runs, on any thread


class FailedEnvironment:
    """What a rollout has in place of an environment whose constructor did not return."""

    def reset(self, **row: object) -> None:
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
        self.of_batch: list[object] = []
        self._in_row: Counter[str] = Counter()

    def includes(self, environment: object) -> bool:
        """Return whether an environment has failed."""
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
        reason = str(error) or type(error).__name__
        if count >= self.most_in_row:
            raise ToolRuntimeError(
                f"{count} environments in a row failed, the last of them: {reason}",
                remedy=f"Mend the environment's `{name}`, or allow more time (`environment_timeout`).",
            ) from error
        logger.warning("An environment failed: %s Its rollout is not scored, and it is not used again.", reason)

    def succeeded(self, name: str) -> None:
        """Note that an environment did what was asked, which ends a row of failures."""
        self._in_row.pop(name, None)


def on_own_thread(
    factory: Factory | dict[str, Factory] | None,
    executor: ToolExecutor,
    failures: EnvironmentFailures | None = None,
    limits_tools: bool = True,
) -> Factory | dict[str, Factory] | None:
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
    access = _Access(executor, failures or EnvironmentFailures(), limits_tools)
    if isinstance(factory, dict):
        return {name: _factory(make, access) for name, make in factory.items()}
    return None if factory is None else _factory(factory, access)


def scoring_without_failed(reward_func: Any, failures: EnvironmentFailures) -> Callable[..., Any]:
    """
    Wrap a reward function so that it is not asked about rollouts whose environment has failed: they get 0.0.

    The trainer replaces that by no reward. TRL would take a `None` for a fault of the reward functions, and say so.

    What the function reads of the other environments is read on their own threads, also by a coroutine function. If
    one of them does not answer, its rollout has failed too, and the function is called again without it; what it
    logged before that is dropped.

    TRL's reward of an environment's class also scores instances that scripts have made themselves and that live on no
    thread of their own.

    Args:
        reward_func (`Callable`):
            One of the trainer's, no module.
        failures ([`EnvironmentFailures`]):
            The environments that failed.
    """
    scored_class = (getattr(reward_func, "__defaults__", None) or (None,))[0]
    plain_class = getattr(scored_class, "_plain_class", None)

    async def scored_async(*args: object, **kwargs: Any) -> object:
        while True:
            call = _ScoringCall(kwargs, failures, plain_class)
            with call.attempt():
                return call.result(await reward_func(*args, **call.arguments) if call.kept else [])

    def scored(*args: object, **kwargs: Any) -> object:
        while True:
            call = _ScoringCall(kwargs, failures, plain_class)
            with call.attempt():
                return call.result(reward_func(*args, **call.arguments) if call.kept else [])

    return functools.wraps(reward_func)(scored_async if is_async_callable(reward_func) else scored)


class _ScoringCall:
    """A call of a reward function on the rollouts whose environment has not failed."""

    def __init__(self, arguments: dict[str, Any], failures: EnvironmentFailures, plain_class: type | None) -> None:
        self._environments = arguments.get("environments") or [None]
        self._failures = failures
        self._logged: list[Callable[[], object]] = []
        self.kept = [row for row, found in enumerate(self._environments) if not failures.includes(found)]
        self.arguments = {name: self._argument(name, value) for name, value in arguments.items()}
        if plain_class is not None and any(type(environment) is plain_class for environment in self._environments):
            self.arguments["_env_type"] = plain_class  # which TRL compares with the type of each environment

    def _argument(self, name: str, value: Any) -> object:
        if name == "log_metric":
            return lambda *args: self._logged.append(functools.partial(value, *args))
        if name == "log_extra":
            return lambda column, values: self._logged.append(
                functools.partial(value, column, self._in_all_rows(values))
            )
        count = len(self._environments)
        whole = len(self.kept) == count or not isinstance(value, list) or len(value) != count
        return value if whole else [value[row] for row in self.kept]

    def _in_all_rows(self, values: Any) -> Any:
        count = len(self._environments)
        if len(self.kept) == count or not hasattr(values, "__len__") or len(values) != len(self.kept):
            return values
        found = dict(zip(self.kept, values, strict=True))
        return [found.get(row) for row in range(count)]

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

    def result(self, rewards: object) -> object:
        """Return the rewards of all rollouts after a call that succeeded; 0.0 where the environment has failed."""
        for log in self._logged:
            log()
        found = self._in_all_rows(rewards)
        if not self._failures.of_batch or not hasattr(found, "__len__") or len(found) != len(self._environments):
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

    def read(self, owner: object, name: str) -> object:
        """Return an attribute of an environment as its caller outside gets to see it."""
        failed = self.failures.includes(owner)
        abandoned = failed or self.executor.is_abandoned(owner)  # its thread hangs or is not to be trusted
        if abandoned and name in _FORGIVEN:
            is_async = name == "get_reward" and is_async_callable(getattr(type(owner), name, None))
            return _no_op_async if is_async else _no_op
        if failed:
            raise EnvironmentTimeoutError(f"The environment {type(owner).__name__} has failed before.", owner)
        value = self.run(owner, name, functools.partial(getattr, owner, name), on_other_thread=abandoned)
        if abandoned and not isinstance(value, _THREAD_BOUND):
            return value
        return self.stand_in(value, owner, name)

    def run(self, owner: object, name: str, work: Work, on_other_thread: bool = False) -> object:
        """Run something on the environment's thread, or on another while that hangs, and wait."""
        with self._counting_failures(owner, name):
            limit = self.executor.environment_timeout
            value = self.executor.start_on_owner(owner, work, name, limit, on_other_thread=on_other_thread).result()
        if not callable(value):  # a method has not yet done anything
            self.failures.succeeded(name)
        return value

    def stand_in(self, value: object, owner: object, name: str) -> object:
        """Return what the caller outside gets to see of something that lives on the environment's thread."""
        if isinstance(value, _THREAD_BOUND):
            return _ThreadBound(value, owner, self)
        if isinstance(value, functools.partial):
            function: Any = self.stand_in(value.func, owner, name)
            found = functools.partial(function, *value.args, **value.keywords)
            vars(found).update({"__name__": name, **vars(value)})  # TRL asks tools for their names
            return found
        is_own = inspect.ismethod(value) and value.__self__ is owner
        if callable(value) and (is_own or name in _FORGIVEN):
            return self._method(value, owner, name)
        return value

    def _method(self, plain: Callable[..., Any], owner: object, name: str) -> Callable[..., object]:
        """Return a method that runs on the environment's thread."""

        def start(*args: object, **kwargs: object) -> "Future[object]":
            limited = self.limits_tools or _SCORING.get() or name in _FORGIVEN
            limit = self.executor.environment_timeout if limited else None
            return self.executor.start_on_owner(owner, functools.partial(plain, *args, **kwargs), name, limit)

        async def method_async(*args: object, **kwargs: object) -> object:
            if self.executor.is_within_call(owner):  # as a tool, whose call has the thread
                return await plain(*args, **kwargs)
            value = None
            with self._counting_failures(owner, name, forgiven=name in _FORGIVEN):
                value = await asyncio.wrap_future(start(*args, **kwargs))
                self.failures.succeeded(name)
            return self.stand_in(value, owner, name)

        def method(*args: object, **kwargs: object) -> object:
            if self.executor.is_within_call(owner):
                return plain(*args, **kwargs)
            value = None
            with self._counting_failures(owner, name, forgiven=name in _FORGIVEN):
                value = start(*args, **kwargs).result()
                self.failures.succeeded(name)
            if name == "reset":
                _check_observation(value, owner)
            return self.stand_in(value, owner, name)

        is_async = inspect.iscoroutinefunction(plain) and name != "reset"
        return functools.wraps(plain)(method_async if is_async else method)

    @contextlib.contextmanager
    def _counting_failures(self, owner: object, name: str, forgiven: bool = False) -> Iterator[None]:
        """Count failures, and raise those that are not forgiven; a forgiven one may be of the environment's making."""
        try:
            yield
        except EnvironmentTimeoutError as error:
            self.failures.add(owner, name, error)
            if not forgiven:
                raise
        except _DATA_ERRORS as error:
            if not forgiven:
                raise
            self.executor.give_up(owner)
            raised = f"`{name}` of the environment {type(owner).__name__} raised {type(error).__name__}"
            self.failures.add(owner, name, EnvironmentTimeoutError(f"{raised}: {error}", owner))


def _check_observation(observation: object, owner: object) -> None:
    if observation is not None and not isinstance(observation, (str, list)):
        raise ToolRuntimeError(
            f"`reset` of the environment {type(owner).__name__} returned {observation!r:.200}, of type "
            f"{type(observation).__name__}.",
            remedy="Return what is added to the prompt, as text or as a list of content blocks, or None.",
        )


def _no_op(*args: object, **kwargs: object) -> None:
    return None


async def _no_op_async(*args: object, **kwargs: object) -> None:
    return None


def _factory(factory: Factory, access: _Access) -> Factory:
    if not callable(factory):
        raise ConfigError(
            f"You passed the environment factory {factory!r}, which cannot be called.", remedy="Pass a class."
        )
    made_before = False

    def make() -> object:
        nonlocal made_before
        try:
            environment = access.executor.construct_on_own_thread(factory)
        except _DATA_ERRORS as error:
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
        if kind not in access.classes.values():  # else the factory has handed out the same instance again
            if kind not in access.classes:
                access.classes[kind] = _threaded_class(kind, access)
            # A class may have a `__setattr__` of its own
            object.__setattr__(environment, "__class__", access.classes[kind])
        return environment

    return functools.update_wrapper(make, factory) if inspect.isroutine(factory) else make


def _threaded_class(kind: Any, access: _Access) -> type:
    """Return a subclass whose attributes are read on the thread of each instance."""
    for name in _FORGIVEN:
        function = inspect.unwrap(getattr(kind, name, None) or _no_op)
        refuse_generator(f"`{name}` of the environment {kind.__name__}", function, ConfigError)
    read, missing, shown = kind.__getattribute__, getattr(kind, "__getattr__", None), kind.__repr__

    def look_up(self: object, name: str) -> object:
        return access.read(self, name) if access.is_outside and not name.startswith("__") else read(self, name)

    def look_up_missing(self: object, name: str) -> object:
        # Python asks for it, on the caller's thread, what `look_up` has not found
        if missing is not None and (name.startswith("__") or not access.is_outside):
            return missing(self, name)
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def described(self: object) -> str:
        try:
            return shown(self)
        except EnvironmentTimeoutError:  # which the attributes of one that failed raise; logs show it all the same
            return object.__repr__(self)

    members = {"__getattribute__": look_up, "__repr__": described, "__slots__": (), "_plain_class": kind}
    if missing is not None:
        members["__getattr__"] = look_up_missing
    return type(kind.__name__, (kind,), {**members, "__doc__": kind.__doc__, "__module__": kind.__module__})


class _ThreadBound:
    """A `sqlite3` object whose methods run on the thread that opened it."""

    def __init__(self, target: object, owner: object, access: _Access) -> None:
        self._target, self._owner, self._access = target, owner, access

    def _run(self, function: Callable[..., object], /, *args: object, **kwargs: object) -> Any:
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

        def method(*args: object, **kwargs: object) -> object:
            result = self._run(value, *args, **kwargs)
            return self if result is self._target else self._access.stand_in(result, self._owner, name)

        return method

    def __iter__(self) -> Iterator[object]:
        return iter(self._run(list, self._target))

    def __enter__(self) -> object:
        return self.__getattr__("__enter__")()

    def __exit__(self, *error: object) -> object:
        return self.__getattr__("__exit__")(*error)

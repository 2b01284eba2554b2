"""Environments that live on threads of their own, seen from the training thread as if they lived there.

Owns `on_own_thread`. TRL constructs, resets and scores environments on the training thread; tools run off it, and a
`sqlite3` connection refuses every thread but the one that opened it. So an environment is constructed on its own
thread, and what the training thread asks of it (`reset`, `get_reward`, any attribute) is run there. Fed by the
trainer.
"""

import functools
import inspect
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError, ToolTimeoutError
from .execute import ToolExecutor


_THREAD_BOUND = (sqlite3.Connection, sqlite3.Cursor)


def on_own_thread(factory: Any, executor: ToolExecutor) -> Any:
    """
    Wrap an environment factory, or a dict of them, so that each instance belongs to a thread of its own.

    The instances are of a subclass of the environment's class with the same name. From the thread that called
    `on_own_thread`, attributes are read and methods run on the environment's thread; `sqlite3` connections and cursors
    come back as stand-ins that do the same. From any other thread they are plain objects.

    Args:
        factory (`Callable` or `dict[str, Callable]`, *optional*):
            Gives a new environment; `None` is passed through.
        executor ([`ToolExecutor`]):
            Runs the environment's threads.

    Raises:
        ConfigError: if a factory cannot be called.
    """
    if factory is None:
        return None
    classes: dict[type, type] = {}  # shared by all names, since TRL gives each class one reward
    for make in factory.values() if isinstance(factory, dict) else [factory]:
        if not callable(make):
            raise ConfigError(f"You passed the environment factory {make!r}, which cannot be called. Pass a class.")
    if isinstance(factory, dict):
        return {name: _factory(make, executor, classes) for name, make in factory.items()}
    return _factory(factory, executor, classes)


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


def _factory(factory: Callable[[], Any], executor: ToolExecutor, classes: dict[type, type]) -> Callable[[], Any]:
    home = threading.get_ident()

    def make() -> Any:
        environment = executor.construct_on_own_thread(factory)
        kind = type(environment)
        if kind in classes.values():  # a factory that hands out the same instance again
            return environment
        if kind not in classes:
            classes[kind] = _threaded(kind, executor, home)
        environment.__class__ = classes[kind]
        return environment

    return functools.update_wrapper(make, factory) if inspect.isroutine(factory) else make


def _threaded(kind: type, executor: ToolExecutor, home: int) -> type:
    plain: Any = kind.__getattribute__

    def look_up(self: Any, name: str) -> Any:
        if name.startswith("__") or threading.get_ident() != home:
            return plain(self, name)
        if executor.is_abandoned(self):  # its thread hangs: its state is read from here, and it earns nothing
            if name == "get_reward":
                return lambda: None
            value = plain(self, name)
            return _ThreadBound(value, self, executor) if isinstance(value, _THREAD_BOUND) else value
        return _stand_in(executor.run_on_owner(self, getattr, self, name), self, executor)

    body = {"__getattribute__": look_up, "__slots__": (), "__doc__": kind.__doc__, "__module__": kind.__module__}
    body["_plain_class"] = kind
    return type(kind.__name__, (kind,), body)


def _stand_in(value: Any, owner: Any, executor: ToolExecutor) -> Any:
    """What the training thread gets to see of something that lives on the owner's thread."""
    if isinstance(value, _THREAD_BOUND):
        return _ThreadBound(value, owner, executor)
    if inspect.ismethod(value) and value.__self__ is owner and not inspect.iscoroutinefunction(value):

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            return _stand_in(executor.run_on_owner(owner, value, *args, **kwargs), owner, executor)

        return method
    return value


class _ThreadBound:
    """A `sqlite3` object whose methods run on the thread that opened it."""

    def __init__(self, target: Any, owner: Any, executor: ToolExecutor):
        self._target, self._owner, self._executor = target, owner, executor

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._executor.is_abandoned(self._owner):
            raise ToolTimeoutError(
                f"A tool call on the environment {type(self._owner).__name__} did not return within its time limit "
                f"and still holds the environment's thread, which alone may use its {type(self._target).__name__}. In "
                f"a reward function, catch this ToolTimeoutError and return None for the rollout."
            )
        return self._executor.run_on_owner(self._owner, function, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = self._run(getattr, self._target, name)
        if not callable(value):
            return value

        def method(*args: Any, **kwargs: Any) -> Any:
            result = self._run(value, *args, **kwargs)
            return self if result is self._target else _stand_in(result, self._owner, self._executor)

        return method

    def __iter__(self) -> Any:
        return iter(self._run(list, self._target))

    def __enter__(self) -> "_ThreadBound":
        self._run(self._target.__enter__)
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._run(self._target.__exit__, *error)

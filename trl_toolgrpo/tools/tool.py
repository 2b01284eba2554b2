"""The records of a tool call: what can be called, what was called, what came back."""

import inspect
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import ToolGRPOError, ToolSchemaError
from ..types import JSONObject, JSONSchema
from .schema_forms import inline_references


_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


@dataclass(frozen=True)
class Tool:
    """
    Something the policy can call.

    Args:
        name (`str`):
            The one name of the tool: in the prompt, in the call and in the environment.
        description (`str`):
            What the tool does, in words the policy reads.
        parameters (`dict`):
            JSON schema of the arguments, an `"object"` schema.
        function (`Callable`):
            Function or coroutine function, called with the arguments as keywords.
        thread_safe (`bool`, *optional*, defaults to `True`):
            `False` runs one call of this tool at a time over the whole batch.
        timeout (`float`, *optional*):
            Time limit of one call in seconds, instead of `ToolGRPOConfig.tool_timeout`.
        returns (`dict`, *optional*):
            JSON schema of the return value, for the chat templates that render one.
        ends_rollout (`bool`, *optional*, defaults to `False`):
            `True` for a tool such as `submit_answer`: a call of it that succeeds ends the rollout with stop reason
            `"stop"`, and its result is on record in the trajectory but not in the conversation. A call that fails is
            answered like any other. TRL's own rollouts (`record_sample_logprobs=False`) do not know of it.
        isolation (`str`, *optional*, defaults to `"thread"`):
            Where a call runs: on a `"thread"` of the run, or in a `"process"` that ends with all it has started when
            the call exceeds its time limit or crashes. A process has to be able to import the function; it is used
            again for later calls of the tool, after calls that returned or raised an exception and left no thread
            running. TRL's own rollouts run the function on their thread.

    Raises:
        ToolSchemaError: if the name is empty or not an identifier, the parameters are no object schema, the
            function cannot be called, is a generator function or cannot be sent to a process, or the time limit is
            not positive.
    """

    name: str
    description: str
    parameters: JSONSchema
    function: Callable[..., Any]
    thread_safe: bool = True
    timeout: float | None = None
    returns: JSONSchema | None = None
    ends_rollout: bool = False
    isolation: str = "thread"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _TOOL_NAME.fullmatch(self.name):
            raise ToolSchemaError(
                f"You passed a tool named {self.name!r}, which is not a valid tool name.",
                remedy="Begin it with a letter or an underscore, and use only letters, digits, '_', '-' and '.'.",
            )
        if not isinstance(self.parameters, dict) or self.parameters.get("type", "object") != "object":
            raise ToolSchemaError(
                f"The parameters of tool {self.name!r} are no JSON schema of type 'object': {self.parameters!r}.",
                remedy="Pass a schema such as {'type': 'object', 'properties': {...}, 'required': [...]}.",
            )
        if not callable(self.function):
            raise ToolSchemaError(f"The function of tool {self.name!r} is {self.function!r}, which cannot be called.")
        refuse_generator(f"The function of tool {self.name!r}", self.function)
        if self.timeout is not None and not self.timeout > 0:
            raise ToolSchemaError(
                f"You passed `timeout={self.timeout}` for the tool {self.name!r}, and a time limit is positive.",
                remedy="Pass a number of seconds, or None for the limit of the configuration.",
            )
        if self.isolation not in ("thread", "process"):
            raise ToolSchemaError(
                f"You passed `isolation={self.isolation!r}` for the tool {self.name!r}.",
                remedy="Pass 'thread' or 'process'.",
            )
        if self.isolation == "process":
            self._check_sendable()

    def _check_sendable(self) -> None:
        try:
            reason = "it is defined in the main script" if b"__main__" in pickle.dumps(self.function) else None
        except Exception as error:
            reason = str(error)
        if os.name != "posix":
            reason = f"processes of tools need a POSIX system, not {os.name}"
        if reason is not None:
            raise ToolSchemaError(
                f"The function of tool {self.name!r} cannot run with isolation='process': {reason}.",
                remedy="Define it at the top level of a module that can be imported (no lambda, no inner function, "
                "not the script that is run), or use isolation='thread'.",
            )

    @property
    def is_async(self) -> bool:
        """Whether calling the tool gives an awaitable to run on the event loop."""
        return is_async_callable(self.function)

    @property
    def schema(self) -> JSONSchema:
        """
        The tool as chat templates expect it, `{"type": "function", "function": {...}}`; references within the
        parameters are replaced by what they refer to, as most templates show none.
        """
        parameters = inline_references(self.parameters)
        function: JSONSchema = {"name": self.name, "description": self.description, "parameters": parameters}
        if self.returns is not None:
            function["return"] = self.returns
        return {"type": "function", "function": function}


def is_async_callable(function: object) -> bool:
    """
    Return whether calling something gives a coroutine.

    Args:
        function (`Callable`):
            Function, method, `functools.partial` or an object with `__call__`.
    """
    return _is_or_calls(function, inspect.iscoroutinefunction)


def refuse_generator(what: str, function: object, error: type[ToolGRPOError] = ToolSchemaError) -> None:
    """
    Refuse a function whose calls give a generator, asynchronous or not.

    Args:
        what (`str`):
            The function, as the message names it.
        function (`Callable`):
            Function, method, `functools.partial` or an object with `__call__`.
        error (`type`, *optional*, defaults to [`ToolSchemaError`]):
            What is raised for a generator function.
    """
    if _is_or_calls(function, inspect.isgeneratorfunction) or _is_or_calls(function, inspect.isasyncgenfunction):
        raise error(
            f"{what} is a generator function (it has a `yield`): a call gives a generator, and its body does not run.",
            remedy="Return what it yields.",
        )


def _is_or_calls(function: object, kind: Callable[[object], bool]) -> bool:
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004


@dataclass
class ToolCall:
    """
    One call the policy wrote.

    Args:
        id (`str`):
            Identifier of the call within its rollout; the tool message that answers it carries it as `tool_call_id`.
        name (`str`):
            Name the policy wrote (empty if it could not be read).
        arguments (`dict`):
            Arguments the policy wrote, by name.
        error (`str`, *optional*):
            Why the call is malformed; `None` for a call that can be tried.
    """

    id: str
    name: str
    arguments: JSONObject = field(default_factory=dict)
    error: str | None = None


@dataclass
class ToolResult:
    """
    What came back from a call. A tool may return one itself, to set a reward or to mark an error as data.

    Args:
        content (`object`):
            Text, or anything JSON can hold; dicts and lists reach the policy as JSON.
        is_error (`bool`, *optional*, defaults to `False`):
            Whether the call failed.
        error_type (`str`, *optional*):
            `"error"`, `"timeout"`, `"unknown_tool"`, `"malformed"`, `"invalid_arguments"` or `"abandoned"`.
        reward (`float`, *optional*):
            Reward of the turn that made the call.
        transient (`bool`, *optional*, defaults to `False`):
            Whether the same call may work if it is tried again.
        truncated (`bool`, *optional*, defaults to `False`):
            Whether the text was cut to `max_tool_output_tokens`.
        seconds (`float`, *optional*, defaults to `0.0`):
            Wall-clock time of the call, retries included.
    """

    content: object
    is_error: bool = False
    error_type: str | None = None
    reward: float | None = None
    transient: bool = False
    truncated: bool = False
    seconds: float = 0.0

"""Python callables and methods of environments as `Tool`s.

Plain functions and methods go through `transformers.utils.get_json_schema` untouched, so that a prompt has the very
tokens that TRL renders.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import get_type_hints

from transformers.utils import get_json_schema

from ..errors import ToolNameError, ToolSchemaError
from .tool import Tool, refuse_generator


_NO_TOOLS = {classmethod: "a class method", functools.cached_property: "a cached property"}
_SECTIONS = ("Args:", "Returns:", "Raises:")


def as_tool(function_or_tool: Callable[..., object] | Tool) -> Tool:
    """
    Describe a callable to the policy. A `Tool` is passed through.

    Args:
        function_or_tool (`Callable` or [`Tool`]):
            Function, coroutine function, bound method, `functools.partial` (the arguments it binds are hidden from the
            policy) or an object with `__call__`, with type hints and a Google-style docstring.

    Returns:
        [`Tool`]: The tool; its `schema` is what `apply_chat_template(tools=[function])` renders.

    Raises:
        ToolSchemaError: if it cannot be called, its schema cannot be derived, it cannot be called by keyword, or it is
            a generator function.
    """
    if isinstance(function_or_tool, Tool):
        return function_or_tool
    if not callable(function_or_tool):
        raise ToolSchemaError(
            f"You passed {function_or_tool!r} as a tool, which cannot be called.",
            remedy="Pass a function, a method, a callable object or a `Tool`.",
        )
    name = _name(function_or_tool)
    refuse_generator(f"The function of tool {name!r}", function_or_tool)
    try:
        readable = _readable(function_or_tool)
        _refuse_what_has_no_name(name, inspect.signature(readable))
        described = get_json_schema(readable)["function"]
    except ToolSchemaError:
        raise
    except Exception as error:
        raise ToolSchemaError(
            f"The tool {name!r} cannot be described to the policy: {error}",
            remedy="Add type hints and a Google-style docstring with an `Args:` section that names every argument, or "
            "pass Tool(name=..., description=..., parameters=..., function=...).",
        ) from error
    function = function_or_tool
    if isinstance(function, functools.partial):
        function = _Partial(function.func, *function.args, **function.keywords)
    return Tool(function=function, returns=described.pop("return", None), **described)


class _Partial(functools.partial):
    """A partial whose keywords a call cannot override."""

    def __call__(self, /, *args: object, **arguments: object) -> object:
        for name in self.keywords.keys() & arguments:
            raise TypeError(f"{_name(self)}() got an unexpected keyword argument {name!r}")
        return super().__call__(*args, **arguments)


def _refuse_what_has_no_name(name: str, signature: inspect.Signature) -> None:
    """Refuse arguments that the schema of a tool cannot show or that cannot be given by keyword."""
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            raise ToolSchemaError(
                f"The tool {name!r} takes any keyword (`**{parameter.name}`), which its schema cannot show.",
                remedy="Name its arguments, give it one argument of type dict, or pass Tool(name=..., "
                "description=..., parameters={..., 'additionalProperties': ...}, function=...).",
            )
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise ToolSchemaError(
                f"The argument {parameter.name!r} of tool {name!r} can only be given by position; calls use keywords.",
                remedy="Make it a plain argument.",
            )


def environment_tools(environment: object) -> list[Tool]:
    """
    Return the tools of one environment: the public methods of its class, as TRL chooses them, then those of its own.

    An environment whose attribute or property `tools` is a list of callables or [`Tool`]s gives each rollout its own
    tools, decided at `reset`. A `tools` that holds nothing callable is the environment's own business.

    Args:
        environment (`object`):
            The environment instance.

    Returns:
        `list[Tool]`: The tools, bound to the instance.

    Raises:
        ToolSchemaError: if one of them has no usable schema.
    """
    tools = []
    # On the class, as TRL does: on the instance it would evaluate properties.
    for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction):
        if _may_be_tool(name):
            tool = as_tool(getattr(environment, name))
            member = inspect.getattr_static(type(environment), name)
            # Its partial has the name of another method
            tools.append(replace(tool, name=name) if isinstance(member, functools.partialmethod) else tool)
    own = getattr(environment, "tools", None)
    if isinstance(own, list) and any(callable(entry) or isinstance(entry, Tool) for entry in own):
        # One method of the instance may come wrapped here and bare there.
        methods = [inspect.unwrap(tool.function) for tool in tools]
        tools += [as_tool(entry) for entry in own if not callable(entry) or inspect.unwrap(entry) not in methods]
    for tool in tools:
        if tool.isolation == "process":
            raise ToolSchemaError(
                f"The environment {type(environment).__name__} has the tool {tool.name!r} with isolation='process', "
                f"but tools of an environment run on the environment's own thread.",
                remedy="Use isolation='thread', or pass the tool to the trainer (`tools=[...]`).",
            )
    return tools


def left_out_of_tools(environment: object) -> dict[str, str]:
    """
    Return what an environment has that can be called and is none of its tools, each with what it is.

    TRL takes plain methods and static methods alone. Whoever wrote a documented method of another kind may think that
    the policy can call it.

    Args:
        environment (`object`):
            The environment instance; its properties are not read.
    """
    found = {}
    tools = {tool.name for tool in environment_tools(environment)}
    for name in dir(type(environment)):
        member = inspect.getattr_static(type(environment), name, None)
        if not _may_be_tool(name) or name in tools or inspect.isfunction(member):
            continue
        known = [what for kind, what in _NO_TOOLS.items() if isinstance(member, kind)]
        if known or hasattr(member, "cache_info"):
            found[name] = known[0] if known else "a cached method"
        elif _described_name(getattr(type(environment), name)) not in {None, *tools}:
            found[name] = f"a {type(member).__name__}"
    for name, value in vars(environment).items() if hasattr(environment, "__dict__") else ():
        if _may_be_tool(name) and name not in tools and _described_name(value) not in {None, *tools}:
            found[name] = "an attribute of the instance"
    return found


def _may_be_tool(name: str) -> bool:
    return not name.startswith("_") and name not in ("reset", "get_reward")


def _described_name(value: object) -> str | None:
    """Return the name of a callable that has all a tool needs, as only what is meant for a tool does."""
    if not callable(value) or inspect.isclass(value):
        return None
    try:
        return as_tool(value).name
    except Exception:
        return None


def index_tools(tools: Iterable[Callable[..., object] | Tool]) -> dict[str, Tool]:
    """
    Return tools by name.

    Args:
        tools (`Iterable[Callable or Tool]`):
            The tools one rollout can call.

    Returns:
        `dict[str, Tool]`: The tools by name, in the order given.

    Raises:
        ToolNameError: if two of them share a name.
    """
    index: dict[str, Tool] = {}
    for entry in tools:
        tool = as_tool(entry)
        if tool.name in index:
            raise ToolNameError(
                f"Two tools are named {tool.name!r}: {_origin(index[tool.name])} and {_origin(tool)}.",
                remedy="Rename or remove one, so that the policy can tell them apart.",
            )
        index[tool.name] = tool
    return index


def _readable(function: Callable[..., object]) -> Callable[..., object]:
    """Return what `get_json_schema` can read: the callable, or a function that looks like a partial or an object."""
    if isinstance(function, functools.partial):
        like = _readable(function.func)
        signature = inspect.signature(functools.partial(like, *function.args, **function.keywords))
        left = [parameter for name, parameter in signature.parameters.items() if name not in function.keywords]
        signature = signature.replace(parameters=left)
        doc = vars(function).get("__doc__") or inspect.getdoc(like)
    elif inspect.isroutine(function) or inspect.isclass(function) or hasattr(function, "__wrapped__"):
        return function
    else:
        like = type(function).__call__.__get__(function)
        signature, doc = inspect.signature(like), _object_doc(function, like)

    def looks_alike() -> None: ...

    hints = get_type_hints(like)
    looks_alike.__name__, looks_alike.__doc__ = _name(function), doc
    looks_alike.__annotations__ = {name: hints[name] for name in hints if name in {*signature.parameters, "return"}}
    vars(looks_alike)["__signature__"] = signature
    return looks_alike


def _name(function: object) -> str:
    if isinstance(function, functools.partial):
        return vars(function).get("__name__") or _name(function.func)
    return getattr(function, "__name__", None) or type(function).__name__


def _object_doc(function: object, call: Callable[..., object]) -> str | None:
    of_class = inspect.getdoc(type(function))
    of_call = inspect.getdoc(call)
    if of_call and of_class and of_call.lstrip().startswith(_SECTIONS):
        return f"{of_class.strip().splitlines()[0]}\n\n{of_call}"
    return of_call or of_class


def _origin(tool: Tool) -> str:
    function = getattr(tool.function, "func", tool.function)  # of a partial
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', _name(function))}"

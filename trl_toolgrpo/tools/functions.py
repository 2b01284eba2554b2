"""Python callables and environment methods as `Tool`s.

Owns how a callable becomes a schema; fed by the trainer's `tools` and by environment instances. Plain functions and
methods go through `transformers.utils.get_json_schema` untouched, so a prompt has the very tokens TRL renders.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, get_type_hints

from transformers.utils import get_json_schema

from ..errors import ToolNameError, ToolSchemaError
from .types import Tool, refuse_generator


_SECTIONS = ("Args:", "Returns:", "Raises:")


def as_tool(function_or_tool: Callable[..., Any] | Tool) -> Tool:
    """
    Describes a callable to the policy. A `Tool` is passed through.

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
            f"You passed {function_or_tool!r} as a tool, which cannot be called. Pass a function, a method, a "
            f"callable object or a `Tool`."
        )
    name = _name(function_or_tool)
    refuse_generator(name, function_or_tool)
    try:
        function = _plain(function_or_tool)
        _refuse_what_has_no_name(name, inspect.signature(function))
        described = get_json_schema(function)["function"]
    except ToolSchemaError:
        raise
    except Exception as error:
        raise ToolSchemaError(
            f"The tool {name!r} cannot be described to the policy: {error} Add type hints and a Google-style "
            f"docstring with an `Args:` section that names every argument, or pass "
            f"Tool(name=..., description=..., parameters=..., function=...)."
        ) from error
    return Tool(
        name=described["name"],
        description=described["description"],
        parameters=described["parameters"],
        function=function,
        returns=described.get("return"),
    )


def _refuse_what_has_no_name(name: str, signature: inspect.Signature) -> None:
    """Refuse arguments that the schema of a tool cannot show or that cannot be given by keyword."""
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            raise ToolSchemaError(
                f"The tool {name!r} takes any keyword (`**{parameter.name}`), which its schema would show as one "
                f"argument of that name. Name its arguments, give it one argument of type dict, or pass "
                f"Tool(name=..., description=..., parameters={{..., 'additionalProperties': ...}}, function=...)."
            )
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise ToolSchemaError(
                f"The argument {parameter.name!r} of tool {name!r} can only be given by position, and tools are "
                f"called by keyword. Make it a plain argument."
            )


def environment_tools(environment: object) -> list[Tool]:
    """
    Tools of one environment instance: the public methods of its class, as TRL chooses them, then those of its own.

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
            # `functools.partialmethod` gives a partial that has the name of another method
            tools.append(replace(tool, name=name) if _is_partial(environment, name) else tool)
    own = getattr(environment, "tools", None)
    if isinstance(own, list) and any(callable(entry) or isinstance(entry, Tool) for entry in own):
        # One method of the instance may come wrapped here and bare there.
        methods = [inspect.unwrap(tool.function) for tool in tools]
        tools += [as_tool(entry) for entry in own if not callable(entry) or inspect.unwrap(entry) not in methods]
    for tool in tools:
        if tool.isolation == "process":
            raise ToolSchemaError(
                f"The environment {type(environment).__name__} has the tool {tool.name!r} with isolation='process', "
                f"but tools of an environment run on the environment's own thread. Use isolation='thread', or pass "
                f"the tool to the trainer (`tools=[...]`)."
            )
    return tools


def left_out_of_tools(environment: object) -> dict[str, str]:
    """
    What an environment has that can be called and is none of its tools, each with what it is.

    TRL takes plain methods and static methods alone. Whoever wrote a documented method of another kind may think that
    the policy can call it.

    Args:
        environment (`object`):
            The environment instance; its properties are not read.
    """
    found = {}
    tools = {tool.name for tool in environment_tools(environment)}
    kind = type(environment)
    for name in dir(kind):
        member = inspect.getattr_static(kind, name, None)
        if not _may_be_tool(name) or name in tools or inspect.isfunction(member):
            continue
        if isinstance(member, classmethod):
            found[name] = "a class method"
        elif isinstance(member, functools.cached_property):
            found[name] = "a cached property"
        elif hasattr(member, "cache_info"):
            found[name] = "a cached method"
        elif _described_name(getattr(kind, name)) not in {None, *tools}:
            found[name] = f"a {type(member).__name__}"
    for name, value in vars(environment).items() if hasattr(environment, "__dict__") else ():
        if _may_be_tool(name) and name not in tools and _described_name(value) not in {None, *tools}:
            found[name] = "an attribute of the instance"
    return found


def _may_be_tool(name: str) -> bool:
    return not name.startswith("_") and name not in ("reset", "get_reward")


def _is_partial(environment: object, name: str) -> bool:
    return isinstance(inspect.getattr_static(type(environment), name, None), functools.partialmethod)


def _described_name(value: Any) -> str | None:
    """The name of a callable that has all a tool needs, as only what is meant for a tool does."""
    if not callable(value) or inspect.isclass(value):
        return None
    try:
        return as_tool(value).name
    except Exception:
        return None


def index_tools(tools: Iterable[Callable[..., Any] | Tool]) -> dict[str, Tool]:
    """
    Tools by name.

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
                f"Two tools are named {tool.name!r}: {_origin(index[tool.name])} and {_origin(tool)}. The policy "
                f"cannot tell them apart. Rename or remove one."
            )
        index[tool.name] = tool
    return index


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Something `get_json_schema` can read: the callable itself, or an adapter for partials and callable objects."""
    if isinstance(function, functools.partial):
        inner = _plain(function.func)
        bound = inspect.signature(functools.partial(inner, *function.args, **function.keywords))
        signature = bound.replace(parameters=[p for n, p in bound.parameters.items() if n not in function.keywords])
        doc = vars(function).get("__doc__") or inspect.getdoc(inner)
        return _adapter(function, inner, _name(function), doc, signature, frozenset(function.keywords))
    if inspect.isroutine(function) or inspect.isclass(function) or hasattr(function, "__wrapped__"):
        return function
    call = type(function).__call__.__get__(function)
    return _adapter(function, call, _name(function), _object_doc(function, call), inspect.signature(call), frozenset())


def _adapter(
    function: Callable[..., Any],
    like: Callable[..., Any],
    name: str,
    doc: str | None,
    signature: inspect.Signature,
    hidden: frozenset[str],
) -> Callable[..., Any]:
    """A real function that calls `function`, with the hints of `like` for the arguments that `signature` has left."""

    def refuse_hidden(arguments: dict[str, Any]) -> None:
        # A keyword would silently override what the partial binds.
        for argument in hidden.intersection(arguments):
            raise TypeError(f"{name}() got an unexpected keyword argument {argument!r}")

    def adapted(**arguments: Any) -> Any:
        refuse_hidden(arguments)
        return function(**arguments)

    async def adapted_async(**arguments: Any) -> Any:
        refuse_hidden(arguments)
        return await function(**arguments)

    adapter: Any = adapted_async if inspect.iscoroutinefunction(like) else adapted
    hints = get_type_hints(like)
    adapter.__name__ = name
    adapter.__qualname__ = getattr(like, "__qualname__", name)
    adapter.__module__ = getattr(like, "__module__", None)
    adapter.__doc__ = doc
    adapter.__signature__ = signature
    adapter.__annotations__ = {key: hints[key] for key in hints if key in signature.parameters or key == "return"}
    result: Callable[..., Any] = adapter
    return result


def _name(function: Any) -> str:
    if isinstance(function, functools.partial):
        return vars(function).get("__name__") or _name(function.func)
    return getattr(function, "__name__", None) or type(function).__name__


def _object_doc(function: Any, call: Callable[..., Any]) -> str | None:
    of_class = inspect.getdoc(type(function))
    of_call = inspect.getdoc(call)
    if of_call and of_class and of_call.lstrip().startswith(_SECTIONS):
        return f"{of_class.strip().splitlines()[0]}\n\n{of_call}"
    return of_call or of_class


def _origin(tool: Tool) -> str:
    function = tool.function
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', _name(function))}"

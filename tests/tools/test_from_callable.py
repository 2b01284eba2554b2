"""Callables as tools: the schema TRL renders, adapters, environments and duplicate names."""

import asyncio
import functools
import json
from types import FunctionType

import pytest
from transformers.utils import get_json_schema

from trl_toolgrpo.errors import ToolNameError, ToolSchemaError
from trl_toolgrpo.tools.from_callable import as_tool, environment_tools, index_tools, left_out_of_tools
from trl_toolgrpo.tools.tool import Tool
from trl_toolgrpo.tools.toolset import ToolSet


def add(a: int, b: int = 0) -> int:
    """
    Adds two numbers.

    Args:
        a: First number.
        b: Second number.

    Returns:
        The sum.
    """
    return a + b


async def find(query: str, kinds: list[str] | None = None) -> dict:
    """Finds things.

    Args:
        query: What to find (choices: ["cat", "dog"])
        kinds: Kinds to keep.
    """
    return {"query": query, "kinds": kinds}


def ping():
    """Answers."""


class Shelf:
    """A shelf."""

    def __init__(self, own=None):
        self.items = []
        if own is not None:
            self.tools = own

    def reset(self, **kwargs):
        self.items = []

    def get_reward(self) -> float:
        return float(len(self.items))

    def put(self, item: str) -> str:
        """
        Puts an item.

        Args:
            item: The item.
        """
        self.items.append(item)
        return item

    def _hidden(self):
        raise NotImplementedError

    @property
    def broken(self):
        raise RuntimeError("properties are not evaluated")


class Scaler:
    """Scales a number."""

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, value: int) -> int:
        """
        Args:
            value: The number.
        """
        return self.factor * value


class AsyncEcho:
    async def __call__(self, text: "str") -> str:
        """
        Echoes.

        Args:
            text: The text.
        """
        return text


@pytest.mark.parametrize("function", [add, find, ping, Shelf().put, functools.lru_cache(add)])
def test_schema_is_the_one_transformers_renders(function):
    # As text: the order of keys decides the tokens of the prompt.
    assert json.dumps(as_tool(function).schema) == json.dumps(get_json_schema(function))


def test_return_description_is_kept():
    assert as_tool(add).schema["function"]["return"] == {"type": "integer", "description": "The sum."}
    assert "return" not in as_tool(ping).schema["function"]


def test_tool_passes_through():
    tool = Tool("t", "d", {"type": "object", "properties": {}}, print)
    assert as_tool(tool) is tool


def test_partial_hides_bound_arguments_and_protects_them():
    tool = as_tool(functools.partial(add, b=10))
    assert tool.name == "add"
    assert tool.parameters == {
        "type": "object",
        "properties": {"a": {"type": "integer", "description": "First number."}},
        "required": ["a"],
    }
    assert tool.function(a=1) == 11
    with pytest.raises(TypeError, match="'b'"):
        tool.function(a=1, b=2)


def test_partial_binds_by_position_nested_and_renamed():
    inner = functools.partial(add, 5)
    inner.__name__ = "add_five"  # attributes keep functools from flattening
    assert list(as_tool(inner).parameters["properties"]) == ["b"]
    tool = as_tool(functools.partial(inner, b=1))
    assert tool.name == "add_five"
    assert tool.parameters["properties"] == {}
    assert tool.function() == 6


def test_partial_of_method_callable_object_and_coroutine():
    shelf = Shelf()
    assert as_tool(functools.partial(shelf.put, item="x")).function() == "x"
    assert shelf.items == ["x"]
    assert as_tool(functools.partial(Scaler(3), value=2)).function() == 6
    tool = as_tool(functools.partial(find, kinds=["a"]))
    assert tool.is_async and list(tool.parameters["properties"]) == ["query"]
    assert tool.parameters["properties"]["query"]["enum"] == ["cat", "dog"]
    assert asyncio.run(tool.function(query="cat")) == {"query": "cat", "kinds": ["a"]}


def test_callable_objects():
    tool = as_tool(Scaler(3))
    assert (tool.name, tool.description, tool.is_async) == ("Scaler", "Scales a number.", False)
    assert tool.parameters["required"] == ["value"]
    assert tool.function(value=2) == 6
    named = Scaler(2)
    named.__name__ = "double"
    assert as_tool(named).name == "double"
    echo = as_tool(AsyncEcho())
    assert echo.is_async and echo.description == "Echoes."
    assert asyncio.run(echo.function(text="hi")) == "hi"


def untyped(a):
    """Doc.

    Args:
        a: A.
    """


def undocumented(a: int): ...


def by_position(a: int, /):
    """Doc.

    Args:
        a: A.
    """


def star(*args: int):
    """Doc.

    Args:
        args: A.
    """


def keywords(query: str, **filters: str):
    """Doc.

    Args:
        query: What for.
        filters: Further ones.
    """


class Filters:
    def __call__(self, query: str, **filters: str):
        """Doc.

        Args:
            query: What for.
            filters: Further ones.
        """


async def keywords_later(**filters: str):
    """Doc.

    Args:
        filters: All of them.
    """


def keywords_of_no_type(query: str, **filters):
    """Doc.

    Args:
        query: What for.
    """


def unwrapped(function):
    """Decorate without `functools.wraps`, so that the signature is lost."""

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    call.__doc__ = function.__doc__
    return call


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (keywords_of_no_type, "takes any keyword \\(`\\*\\*filters`\\)"),
        (functools.cache(keywords_of_no_type), "takes any keyword"),
        (unwrapped(by_position), "by position"),
        (keywords, "takes any keyword \\(`\\*\\*filters`\\).*additionalProperties"),
        (keywords_later, "takes any keyword"),
        (functools.partial(keywords, query="cats"), "takes any keyword"),
        (Filters(), "takes any keyword"),
        (Filters().__call__, "takes any keyword"),
        (untyped, "untyped.*type hint.*Args"),
        (undocumented, "undocumented.*docstring.*Tool\\("),
        (by_position, "by position"),
        (star, "by position"),
        (len, "len"),
        (lambda: 1, "lambda"),
        (3, "cannot be called"),
        ("add", "cannot be called"),
    ],
)
def test_unusable_callables_are_refused(thing, words):
    with pytest.raises(ToolSchemaError, match=words):
        as_tool(thing)


def test_an_environment_has_the_tools_that_trl_gives_it():
    shelf = Shelf()
    tools = environment_tools(shelf)
    assert [tool.name for tool in tools] == ["put"]
    tools[0].function(item="book")
    assert shelf.items == ["book"]


def test_an_environment_may_list_tools_of_its_own():
    shelf = Shelf(own=[add, Tool("look", "Looks.", {"type": "object", "properties": {}}, ping)])
    shelf.tools.append(shelf.put)  # already a tool
    shelf.tools.append(functools.wraps(shelf.put)(lambda item: shelf.put(item)))
    assert [tool.name for tool in environment_tools(shelf)] == ["put", "add", "look"]
    for unrelated in (["hammer"], [], None, "add"):
        assert [tool.name for tool in environment_tools(Shelf(own=unrelated))] == ["put"]


def test_a_decorator_that_takes_any_keyword_keeps_the_signature_of_what_it_wraps():
    @functools.wraps(add)
    def wrapped(*args, **kwargs):
        return add(*args, **kwargs)

    assert as_tool(wrapped).schema == as_tool(add).schema


def test_additional_properties_are_passed_on():
    parameters = {"type": "object", "properties": {}, "additionalProperties": {"type": "string"}}
    tool = Tool("keywords", "Searches.", parameters, lambda **filters: filters)
    assert as_tool(tool).function(color="black") == {"color": "black"}


class Kinds:
    """Methods of every kind."""

    kept = "x"
    Nested = Shelf

    def __init__(self):
        self.added = add
        self.noise = lambda n: n
        self.client = Scaler(2)
        self.clock = ping

    def reset(self, **row): ...

    def plain(self, a: int) -> int:
        """Doc.

        Args:
            a: A.
        """
        return a

    @staticmethod
    def static(a: int) -> int:
        """Doc.

        Args:
            a: A.
        """
        return a

    bound = functools.partialmethod(plain, a=3)

    @classmethod
    def of_class(cls, a: int) -> int:
        """Doc.

        Args:
            a: A.
        """
        return a

    @functools.cache  # noqa: B019
    def cached(self, a: int) -> int:
        """Doc.

        Args:
            a: A.
        """
        return a

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def recent(self) -> int:
        """Doc."""
        return 1

    @functools.cached_property
    def once(self) -> int:
        """Doc."""
        raise RuntimeError("cached properties are not evaluated")

    @functools.singledispatchmethod
    def dispatched(self, a: int) -> int:
        """Doc.

        Args:
            a: A.
        """
        return a

    @property
    def state(self):
        raise RuntimeError("properties are not evaluated")


def test_a_partial_method_is_a_tool_under_its_own_name():
    tools = index_tools(environment_tools(Kinds()))
    assert list(tools) == ["bound", "dispatched", "plain", "static"]
    assert tools["bound"].parameters == {"type": "object", "properties": {}} and tools["bound"].function() == 3
    assert tools["plain"].function(a=4) == tools["static"].function(a=4) == 4


def test_callables_that_are_no_tools_are_named_in_a_warning(caplog):
    kinds = Kinds()
    left_out = left_out_of_tools(kinds)
    assert left_out == {
        "of_class": "a class method",
        "cached": "a cached method",
        "recent": "a cached method",
        "once": "a cached property",
        "added": "an attribute of the instance",
        "client": "an attribute of the instance",
        "clock": "an attribute of the instance",
    }
    ToolSet(None).add_environments({None: kinds})
    assert "Kinds has public methods that are no tools" in caplog.text and "`cached` (a cached method)" in caplog.text


def test_callables_of_any_kind_are_tools_if_the_environment_lists_them(caplog):
    kinds = Kinds()
    kinds.tools = [kinds.of_class, kinds.cached, kinds.recent, kinds.added, kinds.client, kinds.clock]
    tools = index_tools(environment_tools(kinds))
    assert {"of_class", "cached", "recent", "dispatched", "add"} <= set(tools) and tools["cached"].function(a=5) == 5
    assert list(left_out_of_tools(kinds)) == ["once"]


def test_an_environment_of_plain_methods_is_not_warned_of(caplog):
    ToolSet(None).add_environments({None: Shelf()})
    assert not caplog.records


def test_tools_are_indexed_by_name_and_duplicates_refused():
    assert list(index_tools([add, find])) == ["add", "find"]
    other = Tool("add", "d", {"type": "object", "properties": {}}, Shelf.reset)
    with pytest.raises(ToolNameError, match=r"'add': \S*callable\.add and \S*callable\.Shelf\.reset"):
        index_tools([add, other])


def pages(n: int) -> list:
    """
    Gives pages.

    Args:
        n: How many.
    """
    yield from range(n)


async def pages_async(n: int) -> list:
    """
    Gives pages.

    Args:
        n: How many.
    """
    yield n


class Pager:
    """An environment, and an object to call, whose bodies yield."""

    def __call__(self, n: int) -> list:
        """
        Gives pages.

        Args:
            n: How many.
        """
        yield n

    def pages(self, n: int) -> list:
        """
        Gives pages.

        Args:
            n: How many.
        """
        yield n


@pytest.mark.parametrize(
    "thing", [pages, pages_async, Pager(), Pager().pages, functools.partial(pages, 3), functools.partial(Pager(), n=3)]
)
def test_generator_functions_are_refused(thing):
    with pytest.raises(ToolSchemaError, match=r"is a generator function.*Return what it yields"):
        as_tool(thing)
    with pytest.raises(ToolSchemaError, match="The function of tool 'pages' is a generator function"):
        Tool("pages", "Gives pages.", {"type": "object", "properties": {}}, thing)


def test_environments_whose_methods_yield_are_refused():
    with pytest.raises(ToolSchemaError, match="tool 'pages' is a generator function"):
        environment_tools(Pager())


def test_a_wrapper_that_collects_a_generator_is_a_tool():
    collected = functools.wraps(pages)(lambda n: list(pages(n)))
    assert as_tool(collected).function(n=2) == [0, 1]


def test_an_environment_of_two_hundred_and_fifty_tools():
    def method(self, a: int) -> int:
        """Doc.

        Args:
            a: A.
        """
        return a

    members = {f"tool_{index}": FunctionType(method.__code__, globals(), f"tool_{index}") for index in range(250)}
    for function in members.values():
        function.__doc__, function.__annotations__ = method.__doc__, method.__annotations__
    environment = type("Large", (Shelf,), members)()
    tools = index_tools(environment_tools(environment))
    assert len(tools) == 251 and tools["tool_249"].function(a=3) == 3
    assert left_out_of_tools(environment) == {}

"""The process in which the calls of a tool with `isolation="process"` run, one after the other.

`processes.py` starts this file as a script. It holds the function and nothing else of the run: of this package it
loads the records and errors alone, and neither torch nor TRL, unless the function's own module asks for them.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import ModuleType
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl_toolgrpo.types import JSONObject, JSONValue

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIGHT = ("errors", "tools.types")


def _register_light_package(name: str, folder: str) -> ModuleType:
    """Register a package of this project without running it until more of it is asked for than records and errors."""
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py", submodule_search_locations=[folder])
    if spec is None or spec.loader is None:
        raise ImportError(name)
    loader = spec.loader
    package = sys.modules[name] = importlib.util.module_from_spec(spec)

    def find(attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        for module in _LIGHT:
            found = vars(importlib.import_module(f"trl_toolgrpo.{module}"))
            if attribute in found:
                return found[attribute]
        del package.__dict__["__getattr__"]
        loader.exec_module(package)
        return getattr(package, attribute)

    package.__dict__["__getattr__"] = find
    return package


def main(connection: "Connection") -> None:
    """
    Serve calls until the run closes its end.

    Args:
        connection (`Connection`):
            Brings, first, the module search path and the function, then the arguments of each call, as pickles; gets
            an answer to each as JSON, since the run unpickles nothing that a tool may have written.
    """
    package = _register_light_package("trl_toolgrpo", _PACKAGE)
    package.__dict__["tools"] = _register_light_package("trl_toolgrpo.tools", os.path.join(_PACKAGE, "tools"))
    setup = connection.recv()
    sys.path[:] = setup["path"]
    try:
        function = pickle.loads(setup["function"])
    except BaseException as error:
        _send(connection, {"failed": f"{type(error).__name__}: {error}"})
        return
    _send(connection, {})
    threads = threading.active_count()
    while True:
        reply = _call(function, connection.recv(), setup["limit"])
        # A thread that is left behind, or an interpreter short of memory, is no place for the next call.
        reply["reusable"] &= threading.active_count() <= threads
        _send(connection, reply)


def _send(connection: "Connection", reply: "JSONObject") -> None:
    connection.send_bytes(json.dumps(reply).encode())


def _call(function: "Callable[..., object]", arguments: "JSONObject", limit: int) -> "JSONObject":
    from trl_toolgrpo.tools.results import as_result, raised

    reusable = True
    try:
        value = function(**arguments)
        result = as_result(asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value)
        content = _bounded(result.content, limit)
    except BaseException as error:
        result = raised(error)
        content = _bounded(result.content, limit)
        reusable = isinstance(error, Exception) and not isinstance(error, MemoryError)
    return {**vars(result), "content": content, "reusable": reusable}


async def _awaited(value: "Awaitable[object]") -> object:
    return await value


def _bounded(content: "JSONValue", limit: int) -> "JSONValue":
    """Return content of at most so many characters; of what is longer, the text without its middle."""
    text = content if isinstance(content, str) else json.dumps(content)
    half = limit // 2
    return content if len(text) <= limit else f"{text[:half]}\n[...]\n{text[-half:]}"


if __name__ == "__main__":
    with suppress(EOFError, OSError), Connection(int(sys.argv[1])) as connection:  # the run has closed its end
        main(connection)

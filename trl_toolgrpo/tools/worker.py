"""The process in which the calls of a tool with `isolation="process"` run, one after the other.

Is the script that `processes.py` starts. It holds the function and nothing else of the run: of this package it loads
the records and errors alone, and neither torch nor TRL, unless the function's own module asks for them.
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
import types
from collections.abc import Callable
from typing import Any, BinaryIO


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIGHT = ("errors", "tools.types")


class _LightPackage(types.ModuleType):
    """A package of this project that has its records and errors at hand, and becomes itself when more is asked for."""

    def __init__(self, name: str, folder: str) -> None:
        super().__init__(name)
        where = os.path.join(folder, "__init__.py")
        spec: Any = importlib.util.spec_from_file_location(name, where, submodule_search_locations=[folder])
        self.__spec__, self.__path__, self.__file__, self.__package__ = spec, [folder], where, name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for module in _LIGHT:
            found = importlib.import_module(f"trl_toolgrpo.{module}")
            if hasattr(found, name):
                return getattr(found, name)
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        loader: Any = self.__spec__.loader  # type: ignore[union-attr]
        loader.exec_module(self)
        return getattr(self, name)


def main(requests: BinaryIO, replies: BinaryIO) -> None:
    """
    Serves calls until the run closes its end.

    Args:
        requests (`BinaryIO`):
            Frames with, first, the module search path and the function, then the arguments of each call, as pickles.
        replies (`BinaryIO`):
            Gets a frame for each of them, as JSON.
    """
    package = sys.modules["trl_toolgrpo"] = _LightPackage("trl_toolgrpo", _PACKAGE)
    tools = _LightPackage("trl_toolgrpo.tools", os.path.join(_PACKAGE, "tools"))
    package.tools = sys.modules["trl_toolgrpo.tools"] = tools  # type: ignore[attr-defined]
    setup = pickle.loads(read_frame(requests) or b"")
    sys.path[:] = setup["path"]
    try:
        function = pickle.loads(setup["function"])
    except BaseException as error:
        write_frame(replies, json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        return
    write_frame(replies, b"{}")
    threads = threading.active_count()
    while (frame := read_frame(requests)) is not None:
        reply = _call(function, pickle.loads(frame), setup["limit"])
        # A thread that is left behind, or an interpreter short of memory, is no place for the next call.
        reply["reusable"] &= threading.active_count() <= threads
        write_frame(replies, json.dumps(reply).encode())


def _call(function: Callable[..., Any], arguments: dict[str, Any], limit: int) -> dict[str, Any]:
    from trl_toolgrpo.tools.results import plain_content, plain_reward, raised
    from trl_toolgrpo.tools.types import ToolResult

    reusable = True
    try:
        value = function(**arguments)
        value = asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value
        result = value if isinstance(value, ToolResult) else ToolResult(value)
        content, reward = _bounded(plain_content(result.content), limit), plain_reward(result.reward, "The tool")
    except BaseException as error:
        result = raised(error)
        content, reward = _bounded(result.content, limit), None
        reusable = isinstance(error, Exception) and not isinstance(error, MemoryError)
    return {
        "content": content,
        "is_error": bool(result.is_error),
        "error_type": None if result.error_type is None else str(result.error_type),
        "reward": reward,
        "transient": bool(result.transient),
        "reusable": reusable,
    }


async def _awaited(value: Any) -> Any:
    return await value


def _bounded(content: Any, limit: int) -> Any:
    """Content of at most so many characters; of what is longer, as text, the middle is left out."""
    text = content if isinstance(content, str) else json.dumps(content)
    half = limit // 2
    return content if len(text) <= limit else f"{text[:half]}\n[...]\n{text[-half:]}"


def read_frame(stream: BinaryIO) -> bytes | None:
    """
    Reads a message.

    Args:
        stream (`BinaryIO`):
            Where from.

    Returns:
        `bytes` or `None`: The message; `None` at the end of the stream.
    """
    head = stream.read(8)
    return stream.read(int.from_bytes(head, "big")) if len(head) == 8 else None


def write_frame(stream: BinaryIO, message: bytes) -> None:
    """
    Writes a message.

    Args:
        stream (`BinaryIO`):
            Where to.
        message (`bytes`):
            The message.
    """
    stream.write(len(message).to_bytes(8, "big"))
    stream.write(message)
    stream.flush()


if __name__ == "__main__":
    with open(int(sys.argv[1]), "rb") as requests, open(int(sys.argv[2]), "wb") as replies:
        main(requests, replies)

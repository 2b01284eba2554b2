"""The process in which the calls of a tool with `isolation="process"` run, one after the other.

`process_pool.py` starts this file as a script. The process holds the function and nothing else of the run; it imports
neither torch nor TRL, unless the function's own module does.
"""

import asyncio
import inspect
import json
import pickle
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl_toolgrpo.types import JSONObject, JSONValue


def main(connection: "Connection") -> None:
    """
    Serve calls until the run closes its end.

    Args:
        connection (`Connection`):
            Brings, first, the module search path and the function, then the arguments of each call, as pickles; gets
            an answer to each as JSON, since the run unpickles nothing that a tool may have written.
    """
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
        # A thread that is left over, or an interpreter short of memory, is no place for the next call.
        reply["reusable"] &= threading.active_count() <= threads
        _send(connection, reply)


def _send(connection: "Connection", reply: "JSONObject") -> None:
    connection.send_bytes(json.dumps(reply).encode())


def _call(function: "Callable[..., object]", arguments: "JSONObject", limit: int) -> "JSONObject":
    from trl_toolgrpo.tools.results import as_result, raised

    reusable = True
    try:
        value = function(**arguments)
        result = as_result(asyncio.run(_result_of(value)) if inspect.isawaitable(value) else value)
        content = _bounded(result.content, limit)
    except BaseException as error:
        result = raised(error)
        content = _bounded(result.content, limit)
        reusable = isinstance(error, Exception) and not isinstance(error, MemoryError)
    return {**vars(result), "content": content, "reusable": reusable}


async def _result_of(value: "Awaitable[object]") -> object:
    return await value


def _bounded(content: "JSONValue", limit: int) -> "JSONValue":
    """Return content of at most so many characters; of what is longer, the text without its middle."""
    text = content if isinstance(content, str) else json.dumps(content)
    half = limit // 2
    return content if len(text) <= limit else f"{text[:half]}\n[...]\n{text[-half:]}"


if __name__ == "__main__":
    with suppress(EOFError, OSError), Connection(int(sys.argv[1])) as connection:  # the run has closed its end
        main(connection)

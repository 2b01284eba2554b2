"""Tools that run in processes of their own: a process imports them from here."""

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time


COUNT = 0


def where(seconds: float = 0.0) -> list[int]:
    """This process and how many calls it has served."""
    global COUNT
    COUNT += 1
    time.sleep(seconds)
    return [os.getpid(), COUNT]


async def where_async() -> list[int]:
    await asyncio.sleep(0.01)
    return where()


def loaded() -> list[str]:
    """Heavy modules this process has imported."""
    return sorted({"torch", "trl", "transformers", "jsonschema"} & set(sys.modules))


def echo(value):
    """What was given, or what `VALUES` has of that name."""
    return VALUES[value] if isinstance(value, str) and value in VALUES else value


def fail(how: str):
    """Fails in a way of its own."""
    from trl_toolgrpo import ToolResult, TransientToolError

    if how == "transient":
        raise TransientToolError("busy")
    if how == "result":
        return ToolResult({"a": 1}, is_error=True, reward=0.5)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "_exit":
        os._exit(7)
    if how == "nonsense":
        for number in range(3, 4096):  # whichever has the pipe
            try:
                os.write(number, b"\x00" * 7 + b"\x01x")
            except OSError:
                continue
    if how == "thread":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return os.getpid()
    if how == "type":
        raise TypeError("no " + "x" * 100)
    raise {"SystemExit": SystemExit(2), "MemoryError": MemoryError(), "KeyboardInterrupt": KeyboardInterrupt()}[how]


def overpay():
    """Gives a reward that is no number."""
    from trl_toolgrpo import ToolResult

    return ToolResult("a", reward="much")


def busy_then_hang():
    """Fails transiently, and hangs in the next attempt."""
    global COUNT
    COUNT += 1
    return fail("transient") if COUNT == 1 else hang()


def hang(path: str = os.devnull):
    """Ignores every request to end, and has a child and a daemon that do as well; writes down who they are."""
    code = "import signal, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(600)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code])
    daemon = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
    if path != os.devnull:
        with open(path + ".part", "w") as file:
            file.write(f"{os.getpid()} {child.pid} {daemon.pid}")
        os.rename(path + ".part", path)
    while True:
        time.sleep(1)


class Unsendable:
    """A callable that holds a lock, and one that fails where it is loaded."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self):
        return 1


class Broken:
    def __call__(self):
        return 1

    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise ImportError("no such device")


CYCLE: list = []
CYCLE.append(CYCLE)
VALUES = {
    "nan": float("nan"),
    "object": [object, {(1, 2): 3}.keys()],
    "cycle": CYCLE,
    "surrogate": "a \ud800 b",
    "tuple": (1, {"a": None}),
    "keys": {1: 2, None: 3},
    "bytes": b"\xff",
    "large": "x" * 50_000_000,
    "large structure": ["y" * 100] * 500_000,
}


def act(act: str):
    """Fails as it is told to."""
    if act == "hang":
        hang()
    if act == "flood":
        return VALUES["large"]
    return fail({"crash": "segfault", "leave": "_exit"}[act])


class Unloadable:
    """A tool that can be sent to a process and not be loaded there."""

    def __call__(self):
        return None

    def __reduce__(self):
        return _load, ()


def _load():
    raise OSError("no such device")

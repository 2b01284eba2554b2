"""The first process of a sandbox: runs Python code within limits and reports what came of it.

`sandbox.py` starts this file as a script, under bubblewrap or with resource limits alone, so it imports nothing of the
package. The code runs in a child without privileges. This process keeps the time, adds up the memory and reads the
output, and it is the last to end: what the code leaves running ends with it.
"""

import ast
import contextlib
import ctypes
import json
import linecache
import os
import resource
import select
import sys
import time
import traceback
from types import SimpleNamespace


_DUMPABLE, _SUBREAPER, _NO_NEW_PRIVS = 4, 36, 38  # <linux/prctl.h>
_LARGEST_PIPE = 2**20

# Bytes that the kernel needs for a file in memory with its name, and for a set of semaphores or messages
_INODE, _SET = 1280, 512
# Bytes for each unit of a column of /proc/sysvipc: of shared memory, a semaphore, text of messages, a message
_IPC = (("shm", 14, 1), ("sem", 3, 64), ("msg", 3, 1), ("msg", 4, 64))

_WATCH_INTERVAL = {"bubblewrap": 0.02, "limits": 0.1}
_SOURCE_NAME = "<code>"
# What reading about a process can raise because it has ended or is not ours. Any other error, such as a limit on open
# files that the code has set for this process, must end the run: it would blind the watch.
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)

_libc = ctypes.CDLL(None)


def main(mode: str) -> None:
    """
    Read the code and its limits from standard input, run it, and write a report to standard output, both as JSON.

    Args:
        mode (`str`):
            `"bubblewrap"` or `"limits"`.
    """
    given = SimpleNamespace(**json.load(sys.stdin.buffer))
    _libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    _libc.prctl(_DUMPABLE, 0, 0, 0, 0)  # the code cannot reach in here, even as the same user
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        _give_up_privileges(given, writable)
        _run_code(given.code, given.last_expression)
        return
    print(json.dumps(_watch(child, readable, mode, given)), flush=True)
    os._exit(0)


def _give_up_privileges(given: SimpleNamespace, output: int) -> None:
    """Make this process one that the code may have."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.pop("PWD", None)  # bubblewrap sets it
    for name, value in given.rlimits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    if given.user is not None:
        os.setgroups([])
        os.setresgid(given.user, given.user, given.user)
        os.setresuid(given.user, given.user, given.user)
    _libc.prctl(_DUMPABLE, 1, 0, 0, 0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out for the whole machine, this goes first


def _run_code(code: str, last_expression: bool) -> None:
    """Run the code as `__main__`, and show the value of its last line as an interactive session would."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    linecache.cache[_SOURCE_NAME] = (len(code), None, code.splitlines(keepends=True), _SOURCE_NAME)
    names: dict[str, object] = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        tree = ast.parse(code, _SOURCE_NAME)
        last = tree.body.pop() if last_expression and tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, _SOURCE_NAME, "exec"), names)
        if last is not None:
            exec(compile(ast.Interactive([last]), _SOURCE_NAME, "single"), names)
    except SystemExit:
        raise
    except BaseException as error:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        # Frames of this file are of no interest to the author of the code.
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != _SOURCE_NAME:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
        raise SystemExit(1) from None


def _watch(child: int, output: int, mode: str, given: SimpleNamespace) -> dict[str, object]:
    """
    Wait for the end of the code or of its limits, reading what it prints all the time; of a long output the first half
    of what is kept is its beginning, and the other half its end.
    """
    kept, half, dropped = bytearray(), given.output - given.output // 2, 0
    deadline = time.monotonic() + given.seconds
    next_look = 0.0
    status, end = None, ""
    os.set_blocking(output, False)  # the code can open the pipe and read it empty
    while not end:
        now = time.monotonic()
        if now >= next_look:
            next_look = now + _WATCH_INTERVAL[mode]
            end = "memory" if _memory(mode) > given.memory else ""
        status = _reap(child)
        end = end or ("ended" if status is not None else "timeout" if now >= deadline else "")
        if select.select([output], [], [], 0 if end else min(_WATCH_INTERVAL[mode], deadline - now))[0]:
            # As much as the pipe holds, so that what the code leaves running cannot write for ever
            with contextlib.suppress(BlockingIOError):
                kept += os.read(output, _LARGEST_PIPE)
            excess = max(0, len(kept) - given.output)
            del kept[half : half + excess]
            dropped += excess
    report: dict[str, object] = {"status": end, "code": 0 if status is None else os.waitstatus_to_exitcode(status)}
    if not dropped:
        return {**report, "output": kept.decode(errors="replace")}
    half_a_character = "\N{REPLACEMENT CHARACTER}"
    head = kept[:half].decode(errors="replace").rstrip(half_a_character)
    tail = kept[half:].decode(errors="replace").lstrip(half_a_character)
    return {**report, "output": head, "dropped": dropped, "tail": tail}


def _reap(child: int) -> int | None:
    """Take in processes that have ended; return the status of the code's, if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == child:
                found = ended[1]
    return found


def _memory(mode: str) -> int:
    """
    Return the bytes that the code's processes hold together: in pages, shared segments, anonymous files, and what the
    kernel keeps for files without content, semaphores and messages.
    """
    total, files = 0, {}
    for process in _processes(mode):
        with contextlib.suppress(*_GONE):
            total += _resident(process)
            for entry in os.scandir(f"/proc/{process}/fd"):
                with contextlib.suppress(*_GONE):
                    if os.readlink(entry.path).startswith("/memfd:"):
                        file = os.stat(entry.path)
                        files[file.st_ino] = 512 * file.st_blocks
    if mode == "bubblewrap":  # else they are shared with the rest of the machine
        for kind, column, each in _IPC:
            with contextlib.suppress(FileNotFoundError), open(f"/proc/sysvipc/{kind}") as entries:
                total += sum(_SET + each * int(line.split()[column]) for line in list(entries)[1:])
        for folder in ("/tmp", "/dev/shm"):
            found = os.statvfs(folder)
            total += _INODE * (found.f_files - found.f_ffree)
    return total + sum(files.values())


def _resident(process: int) -> int:
    """Return the bytes of a process that no file on a disk stands for; pages that processes share count for each."""
    with open(f"/proc/{process}/status", errors="replace") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in file if line.startswith(("Rss", "VmRSS"))}
    # Some kernels, such as gVisor's, give the sum alone; a process that is about to end has none.
    return 1024 * (sizes.get("RssAnon", sizes.get("VmRSS", 0)) + sizes.get("RssShmem", 0))


def _processes(mode: str) -> list[int]:
    """Return the processes of the code: all of the process namespace, or without one those below this process."""
    running = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    if mode == "bubblewrap":
        return [process for process in running if process != os.getpid()]
    children: dict[int, list[int]] = {}
    for process in running:
        with contextlib.suppress(*_GONE), open(f"/proc/{process}/stat", "rb") as stat:
            children.setdefault(int(stat.read().rpartition(b")")[2].split()[1]), []).append(process)
    found = list(children.get(os.getpid(), ()))
    for process in found:
        found += children.get(process, ())
    return found


if __name__ == "__main__":
    main(sys.argv[1])

"""The first process of a sandbox: runs Python code within limits and reports what came of it.

Is the script that `sandbox.py` starts, under bubblewrap, in namespaces that it enters itself, or with resource limits
alone; imports nothing of the package. The code runs in a child that has given up every privilege; this process keeps
the clock, adds up the memory, reads the output, and is the last to go: what the code leaves behind ends with it.
"""

import ast
import contextlib
import ctypes
import json
import linecache
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any


# <linux/prctl.h>, <linux/sched.h>, <linux/mount.h>
_PDEATHSIG, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 36, 38
_NEW_USER, _OTHER_NAMESPACES = 0x10000000, 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE, _RELATIME = 1, 2, 4, 32, 4096, 16384, 1 << 18, 1 << 21
_DETACH = 2
_SYS_ADMIN = 21  # <linux/capability.h>
_FOLDERS = ("/tmp", "/dev/shm")  # private ones, in memory
_ARENA_MAX = -8  # <malloc.h>
_KEPT = {os.ST_NOEXEC: 8, os.ST_NOATIME: 1024, os.ST_NODIRATIME: 2048, os.ST_RELATIME: _RELATIME}
_DEVICES = ("null", "zero", "full", "random", "urandom")

# What the kernel needs for a file in memory with its name, a semaphore, a message, and a set of them, in bytes
_INODE, _SEMAPHORE, _MESSAGE, _ENTRY = 1280, 64, 64, 512

_POLL = {"bubblewrap": 0.02, "namespaces": 0.02, "limits": 0.1}
_NAME = "<code>"

_libc = ctypes.CDLL(None, use_errno=True)


def main(mode: str) -> None:
    """
    Reads the code and its limits from standard input, runs it, and writes a report to standard output, both as JSON.

    Args:
        mode (`str`):
            `"bubblewrap"`, `"namespaces"` or `"limits"`.
    """
    given = json.load(sys.stdin.buffer)
    if mode == "namespaces":
        _enter_namespaces(given)
    elif mode == "limits":
        _libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    else:
        _bound_files(given["files"])
    _libc.prctl(_DUMPABLE, 0, 0, 0, 0)  # the code cannot reach in here, even as the same user
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        _give_up_privileges(given, writable)
        _run(given["code"], given["last_expression"])
        return
    os.close(writable)
    report = _watch(child, readable, mode, given)
    sys.stdout.buffer.write(json.dumps(report).encode())
    sys.stdout.buffer.flush()
    os._exit(0)


# The code


def _give_up_privileges(given: dict[str, Any], output: int) -> None:
    """Makes this process one that the code may have."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(given["folder"])
    os.environ.clear()
    os.environ.update(given["environment"])
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_ARENA_MAX, 1)  # else each thread reserves 64 MiB of address space
    for name, value in given["limits"].items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    if given["user"] is not None:
        os.setgroups([])
        os.setresgid(given["user"], given["user"], given["user"])
        os.setresuid(given["user"], given["user"], given["user"])
    else:
        _drop_capabilities()
    _libc.prctl(_DUMPABLE, 1, 0, 0, 0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out for the whole machine, this goes first


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _bound_files(most: int) -> None:
    """Bounds how many files the private folders take, empty ones too, and gives up the right to mount."""
    for folder in _FOLDERS:  # where that is not allowed, they count as memory
        _libc.mount(None, folder.encode(), None, ctypes.c_ulong(_REMOUNT | _NOSUID | _NODEV), b"nr_inodes=%d" % most)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _checked(_libc.capget(header, sets), "capget")
    for index in range(3):  # effective, permitted, inheritable
        sets[index] &= ~(1 << _SYS_ADMIN)
    _checked(_libc.capset(header, sets), "capset")


def _run(code: str, last_expression: bool) -> None:
    """Runs the code as `__main__`, and shows the value of its last line as an interactive session would."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    linecache.cache[_NAME] = (len(code), None, code.splitlines(keepends=True), _NAME)
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        tree = ast.parse(code, _NAME)
        last = tree.body.pop() if last_expression and tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, _NAME, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), _NAME, "eval"), names)
            if value is not None:
                print(repr(value))
    except SystemExit:
        raise
    except BaseException as error:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        # Frames of this file are of no interest to the author of the code.
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != _NAME:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
        raise SystemExit(1) from None


# The watch


def _watch(child: int, output: int, mode: str, given: dict[str, Any]) -> dict[str, Any]:
    """
    Waits for the end of the code or of its limits; what it prints is read all the time, and its beginning and its end
    are kept up to a limit.
    """
    kept = _Output(given["output"])
    deadline = time.monotonic() + given["seconds"]
    report: dict[str, Any] = {"status": "ended", "code": 0}
    os.set_blocking(output, False)
    watched = [output]
    next_look = 0.0
    while True:
        now = time.monotonic()
        if now >= deadline:
            report["status"] = "timeout"
            break
        if now >= next_look:
            next_look = now + _POLL[mode]
            if _memory(mode) > given["memory"]:
                report["status"] = "memory"
                break
        status = _reap(child)
        if status is not None:
            report["code"] = os.waitstatus_to_exitcode(status)
        readable = select.select(watched, [], [], 0 if status is not None else min(_POLL[mode], deadline - now))[0]
        # As much as the pipe holds, so that what the code leaves behind cannot write for ever
        for _ in range(16 if readable else 0):
            try:
                text = os.read(output, 65536)
            except BlockingIOError:
                break
            if not text:
                watched = []
                break
            kept.add(text)
        if status is not None:
            break
    return {**report, **kept.report()}


class _Output:
    """The beginning and the end of what the code prints, half of a number of bytes each."""

    def __init__(self, most: int) -> None:
        self._head, self._tail, self._dropped = bytearray(), bytearray(), 0
        self._room, self._tail_room = most - most // 2, most // 2

    def add(self, text: bytes) -> None:
        self._head += text[: self._room]
        self._tail += text[self._room :]
        self._room -= min(self._room, len(text))
        excess = max(0, len(self._tail) - self._tail_room)
        del self._tail[:excess]
        self._dropped += excess

    def report(self) -> dict[str, Any]:
        if not self._dropped:
            return {"output": (self._head + self._tail).decode(errors="replace")}
        half_a_character = "\N{REPLACEMENT CHARACTER}"
        head = self._head.decode(errors="replace").rstrip(half_a_character)
        tail = self._tail.decode(errors="replace").lstrip(half_a_character)
        return {"output": head, "dropped": self._dropped, "tail": tail}


def _reap(child: int) -> int | None:
    """Takes in processes that have ended; the status of the code's, if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == child:
                found = ended[1]
    return found


def _memory(mode: str) -> int:
    """
    Bytes that the code's processes hold together: in pages, shared segments, anonymous files, and what the kernel
    keeps for files without content, semaphores and messages.
    """
    processes = list(_descendants() if mode == "limits" else _others())
    total = sum(map(_resident, processes))
    files = {}
    for process in processes:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path).startswith("/memfd:"):
                        found = os.stat(entry.path)
                        files[found.st_ino] = 512 * found.st_blocks
    if mode != "limits":
        with contextlib.suppress(OSError, ValueError), open("/proc/sysvipc/shm") as segments:
            total += sum(int(line.split()[14]) for line in list(segments)[1:])
        for kind, column, each in (("sem", 3, _SEMAPHORE), ("msg", 3, 1), ("msg", 4, _MESSAGE)):
            with contextlib.suppress(OSError, ValueError), open(f"/proc/sysvipc/{kind}") as entries:
                total += sum(_ENTRY + each * int(line.split()[column]) for line in list(entries)[1:])
    if mode == "bubblewrap":
        for folder in _FOLDERS:
            found_files = os.statvfs(folder)
            total += _INODE * (found_files.f_files - found_files.f_ffree)
    return total + sum(files.values())


def _resident(process: int) -> int:
    """Bytes of memory that no file on a disk stands behind; pages that processes share are counted for each."""
    try:
        with open(f"/proc/{process}/status", errors="replace") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        if "RssShmem" in lines:
            return sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
        with open(f"/proc/{process}/statm") as file:
            fields = file.read().split()
    except OSError:
        return 0
    return max(0, int(fields[1]) - int(fields[2])) * resource.getpagesize()


def _others() -> Iterator[int]:
    """Every process of this process namespace but the first."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1")


def _descendants() -> list[int]:
    """Processes below this one."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                children.setdefault(int(stat.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    found = list(children.get(os.getpid(), ()))
    for process in found:
        found += children.get(process, ())
    return found


# Namespaces


def _enter_namespaces(given: dict[str, Any]) -> None:
    """Goes on as the first process of namespaces of its own, in a file system that holds nothing but Python."""
    # The thread that started this waits for it, so that it ends with the run and not before.
    _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    user, group = os.getuid(), os.getgid()
    _checked(_libc.unshare(_OTHER_NAMESPACES | (_NEW_USER if given["user"] is None else 0)), "unshare")
    if given["user"] is None:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()  # the first process of the new process namespace
    if child:
        os.closerange(0, 3)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV)
    os.mkdir("/tmp/new")
    os.mkdir("/tmp/old")
    _pivot("/tmp", "/tmp/old")
    _mount("tmpfs", "/new", "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    for path in given["paths"]:
        _bind(path)
    for link, target in given["links"].items():
        os.symlink(target, f"/new{link}")
    for folder in ("/new/proc", "/new/dev", "/new/dev/shm", f"/new{given['folder']}"):
        os.makedirs(folder, exist_ok=True)
    _mount("proc", "/new/proc", "proc", _NOSUID | _NODEV)
    for name in _DEVICES:
        os.close(os.open(f"/new/dev/{name}", os.O_CREAT | os.O_WRONLY))
        _mount(f"/old/dev/{name}", f"/new/dev/{name}", None, _BIND)
    for folder in ("/new/dev/shm", f"/new{given['folder']}"):
        _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, f"mode=1777,size={given['disk']}")
    _mount("none", "/new", None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)
    os.chdir("/new")
    _pivot(".", ".")
    _checked(_libc.umount2(b".", _DETACH), "umount2")
    os.chdir("/")


def _bind(path: str) -> None:
    """Shows a file or folder of the old root at the same place in the new one, read-only."""
    source, target = f"/old{path}", f"/new{path}"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(source, target, None, _BIND | _REC)
    found = os.statvfs(target).f_flag  # a user namespace may not take flags away
    kept = sum(flag for name, flag in _KEPT.items() if found & name)
    _mount("none", target, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV | kept)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    done = _libc.mount(
        source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), options.encode()
    )
    _checked(done, f"mount {target}")


def _pivot(new: str, old: str) -> None:
    _checked(_libc.pivot_root(new.encode(), old.encode()), "pivot_root")
    os.chdir("/")


def _checked(done: int, what: str) -> None:
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(sys.argv[1])

"""Processes that run untrusted Python code: what contains them, and how that is found out.

Owns `Limits`, `Sandbox` and `find_sandbox`; fed by `python.py`. What goes on inside is `sandbox_init.py`. Bubblewrap
and namespaces give the code a file system, a network and a process list of its own; limits alone do not, and say so.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .guard import guarded


MODES = ("bubblewrap", "namespaces", "limits")

NOT_STOPPED = {
    "bubblewrap": "faults of the kernel, and processor time up to its limit",
    "namespaces": "faults of the kernel, and processor time up to its limit",
    "limits": (
        "network connections, reading whatever any user may read, filling the disk with many small files, System V "
        "shared memory, which stays, and, unless the run belongs to root, reading the user's own files and signals to "
        "the user's processes"
    ),
}

# What starts and ends beside the code's own time: interpreter, namespaces, the last look at the output.
_OVERHEAD = 10.0
_STACK = 8 * 2**20  # address space of a thread; what is used of it is watched
_USERS = (0x70000000, 1 << 24)  # user ids that nobody has, for a run that belongs to root
_MERGED = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
_SYSTEM = ("/usr", *_MERGED, "/etc/ld.so.cache")
_FOLDER = "/tmp"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_SYSTEM_CALLS = {"x86_64": (0xC000003E, 56, 272), "aarch64": (0xC00000B7, 220, 97)}  # architecture, clone, unshare
_counter = itertools.count()

PATIENCE = 300.0
"""Seconds that a run waits for others to leave it memory."""

_PROBE = """
import os, pathlib, socket, subprocess, threading
assert set(os.getresuid()) != {0}, "the code would be root"
threading.Thread(target=int).start()
subprocess.run(["/bin/sh", "-c", ":"], check=True)
pathlib.Path("probe").write_text("x")
"""


@dataclass(frozen=True)
class Limits:
    """
    What one run of code may use.

    Args:
        seconds (`float`, *optional*, defaults to `5.0`):
            Wall-clock time, and processor time of each process.
        memory (`int`, *optional*, defaults to `512 * 2**20`):
            Bytes of memory of all its processes together.
        disk (`int`, *optional*, defaults to `64 * 2**20`):
            Bytes of the private folder, which is in memory where it can be; and of one file.
        processes (`int`, *optional*, defaults to `32`):
            Processes and threads at the same time.
        output (`int`, *optional*, defaults to `100_000`):
            Bytes of output that are kept, half from its beginning and half from its end.
        together (`int`, *optional*):
            Bytes of memory and private folders of all runs of this process at the same time; further runs wait. `None`
            for half of what the machine or the container has, shared by the processes of the run.

    Raises:
        ConfigError: if one of them is not positive.
    """

    seconds: float = 5.0
    memory: int = 512 * 2**20
    disk: int = 64 * 2**20
    processes: int = 32
    output: int = 100_000
    together: int | None = None

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in vars(self).items() if value is not None and not value > 0}
        if wrong:
            listed = ", ".join(f"{name}={value}" for name, value in wrong.items())
            raise ConfigError(f"You passed {listed} as a limit for Python code. Limits are positive numbers.")


@dataclass(frozen=True)
class Report:
    """
    What came of a run of code.

    Args:
        status (`str`):
            `"ended"`, `"timeout"`, `"memory"`, `"busy"` if other runs left no memory for it, or `"lost"` if the
            sandbox itself came to an end.
        code (`int`):
            Exit code, negative for the signal that ended it.
        output (`str`):
            What it wrote to standard output and standard error; its beginning, if that is longer than the limit.
        dropped (`int`):
            Bytes of output left out after that.
        tail (`str`):
            The end of the output, after what was left out.
    """

    status: str
    code: int = 0
    output: str = ""
    dropped: int = 0
    tail: str = ""


class SharedMemory:
    """Memory that runs of code at the same time have together."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = 0

    @contextlib.contextmanager
    def share(self, amount: int, total: int, patience: float) -> Iterator[bool]:
        """
        Hold a share, as soon as there is one.

        Args:
            amount (`int`):
                Bytes; a share of more than there is in all is alone.
            total (`int`):
                Bytes of all shares together.
            patience (`float`):
                Most seconds to wait.

        Returns:
            Whether there is a share.
        """
        with self._changed:
            free = self._changed.wait_for(lambda: self._taken == 0 or self._taken + amount <= total, patience)
            self._taken += amount if free else 0
        try:
            yield free
        finally:
            with self._changed:
                self._taken -= amount if free else 0
                self._changed.notify_all()


_shared = SharedMemory()


class Sandbox:
    """
    One way to contain Python code.

    Args:
        mode (`str`):
            `"bubblewrap"`, `"namespaces"` or `"limits"`.
        limits ([`Limits`]):
            What one run may use.
        last_expression (`bool`, *optional*, defaults to `True`):
            Whether the value of a last line that is an expression is written to the output.
    """

    def __init__(self, mode: str, limits: Limits, last_expression: bool = True) -> None:
        self.mode = mode
        self.limits = limits
        self.last_expression = last_expression
        self._script = Path(__file__).with_name("sandbox_init.py").read_text(encoding="utf-8")

    def run(self, code: str) -> Report:
        """
        Runs code in a process of its own, and waits for its end on this thread.

        Args:
            code (`str`):
                Python code.

        Returns:
            [`Report`]: What came of it; no limit of it is an exception.
        """
        folders = 2 * self.limits.disk if self.mode == "bubblewrap" else 0
        total = self.limits.together or _half_of_memory()
        with _shared.share(self.limits.memory + folders, total, PATIENCE) as free:
            return self._run(code) if free else Report("busy")

    @property
    def not_stopped(self) -> str:
        """What the code can still do, in words."""
        opens = self.mode == "bubblewrap" and not _can_disable_userns() and _without_userns() is None
        return NOT_STOPPED[self.mode] + (", user namespaces" if opens else "")

    def _run(self, code: str) -> Report:
        folder = tempfile.mkdtemp(prefix="sandbox-") if self.mode == "limits" else None
        user = _spare_user() if os.getuid() == 0 else None
        try:
            if folder is not None and user is not None:
                os.chown(folder, user, user)
            return self._start(json.dumps(self._request(code, user, folder or _FOLDER)).encode())
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _start(self, request: bytes) -> Report:
        rules = _seccomp_file() if self.mode == "bubblewrap" else None
        try:
            process = subprocess.Popen(
                self._command(rules),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env={},
                start_new_session=True,
                pass_fds=() if rules is None else (rules,),
            )
        finally:
            if rules is not None:
                os.close(rules)
        try:
            written, complaint = process.communicate(request, timeout=self.limits.seconds + _OVERHEAD)
            return Report(**json.loads(written))
        except subprocess.TimeoutExpired:
            return Report("timeout")
        except ValueError:
            return Report("lost", process.returncode, complaint[-2000:].decode(errors="replace").strip())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def _request(self, code: str, user: int | None, folder: str) -> dict[str, Any]:
        limits = self.limits
        shared = self.mode == "limits" and user is None  # without a namespace, all that the user runs counts
        return {
            "code": code,
            "last_expression": self.last_expression,
            "user": user,
            "folder": folder,
            "seconds": limits.seconds,
            "memory": limits.memory,
            "disk": limits.disk,
            "files": max(1024, limits.disk // 1024),
            "output": limits.output,
            "paths": _paths(),
            "links": _links(),
            "environment": {
                "HOME": folder,
                "PATH": "/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            "limits": {
                "RLIMIT_AS": limits.memory + limits.processes * _STACK,
                "RLIMIT_CPU": int(limits.seconds) + 1,
                "RLIMIT_FSIZE": limits.disk,
                "RLIMIT_NPROC": limits.processes + (_processes_of_user() if shared else 0),
                "RLIMIT_NOFILE": 64,
                "RLIMIT_CORE": 0,
                "RLIMIT_MEMLOCK": 0,
                "RLIMIT_MSGQUEUE": 0,
            },
        }

    def _command(self, rules: int | None = None) -> list[str]:
        python = [os.path.realpath(_interpreter()), "-I", "-S", "-B", "-c", self._script, self.mode]
        if self.mode == "limits":
            return guarded(python)
        if self.mode == "namespaces":
            return python
        size = str(self.limits.disk)
        command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        command += _rights(rules)
        for path in _paths():
            for parent in reversed(Path(path).parents[:-1]):
                command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", path, path]
        for link, target in _links().items():
            command += ["--symlink", target, link]
        # Not `--dev`, whose terminals need a second user namespace, in which the first process could mount nothing
        command += ["--proc", "/proc", "--perms", "0755", "--tmpfs", "/dev", "--symlink", "/proc/self/fd", "/dev/fd"]
        for name in _DEVICES:
            command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        for folder in ("/dev/shm", _FOLDER):
            command += ["--perms", "1777", "--size", size, "--tmpfs", folder]
        ends = ["--remount-ro", "/dev", "--remount-ro", "/", "--die-with-parent", "--new-session", "--as-pid-1"]
        return [shutil.which(command[0]) or command[0], *command[1:], *ends, "--chdir", "/", "--", *python]


def find_sandbox(mode: str, limits: Limits, last_expression: bool = True) -> Sandbox:
    """
    The strongest sandbox that works here, found out by running code in it.

    Args:
        mode (`str`):
            `"auto"`, or the one to use.
        limits ([`Limits`]):
            What one run may use.
        last_expression (`bool`, *optional*, defaults to `True`):
            Whether the value of a last expression is written to the output.

    Returns:
        [`Sandbox`]: The sandbox.

    Raises:
        ConfigError: if the mode is unknown or cannot be had on this system, or the limits leave no room for Python.
    """
    if mode != "auto" and mode not in MODES:
        raise ConfigError(
            f"You passed `sandbox={mode!r}`. Pass 'auto' for the strongest that works, or one of {', '.join(MODES)}."
        )
    if sys.platform != "linux":
        raise ConfigError(f"You asked for a sandbox for Python code on {sys.platform}. It needs Linux.")
    reasons = {}
    for candidate in MODES if mode == "auto" else (mode,):
        reason = _why_not(Sandbox(candidate, Limits()))
        if reason is None:
            return _checked(Sandbox(candidate, limits, last_expression))
        reasons[candidate] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ConfigError(
        f"You asked for a sandbox for Python code (`sandbox={mode!r}`), and none works here ({listed}). Install "
        f"bubblewrap (`apt-get install bubblewrap`), allow this container user namespaces, or install Python where "
        f"any user may read it."
    )


def _checked(sandbox: Sandbox) -> Sandbox:
    """The sandbox, if its limits leave room for Python itself."""
    report = sandbox.run("")
    if report.status in ("memory", "lost") or report.code != 0:
        raise ConfigError(
            f"You passed limits for Python code under which Python itself does not start: {sandbox.limits}. It ended "
            f"with {report.status!r}, exit code {report.code}: {report.output.strip()[-300:]!r}. Allow more."
        )
    return sandbox


def _why_not(sandbox: Sandbox) -> str | None:
    if sandbox.mode == "bubblewrap" and shutil.which("bwrap") is None:
        return "`bwrap` is not installed"
    started = time.monotonic()
    report = sandbox.run(_PROBE)
    if report.status == "ended" and report.code == 0:
        return None
    lines = report.output.splitlines() or [f"nothing came back within {time.monotonic() - started:.0f} s"]
    return lines[-1]


def _rights(rules: int | None) -> list[str]:
    """What bubblewrap leaves the first process, which gives up the rest of it, and the code."""
    if os.getuid() == 0:
        kept = ("SETUID", "SETGID", "KILL", "SYS_PTRACE", "DAC_READ_SEARCH", "SYS_ADMIN")
        rights = ["--cap-drop", "ALL", *(part for name in kept for part in ("--cap-add", f"CAP_{name}"))]
    elif rules is None and _can_disable_userns():  # then the first process cannot mount anything
        rights = ["--unshare-user", "--disable-userns"]
    else:
        rights = ["--unshare-user", "--cap-add", "CAP_SYS_ADMIN"]
    return rights if rules is None else [*rights, "--seccomp", str(rules)]


@functools.cache
def _can_disable_userns() -> bool:
    """Whether bubblewrap itself forbids user namespaces in the sandbox, which it does for a user namespace alone."""
    bwrap = shutil.which("bwrap")
    if os.getuid() == 0 or bwrap is None:
        return False
    return b"--disable-userns" in subprocess.run([bwrap, "--help"], capture_output=True).stdout


def _seccomp_file() -> int | None:
    """A file descriptor with the rules of [`_without_userns`], for bubblewrap to read."""
    rules = _without_userns()
    if rules is None:
        return None
    readable, writable = os.pipe()
    os.write(writable, rules)
    os.close(writable)
    return readable


@functools.cache
def _without_userns() -> bytes | None:
    """
    Seccomp rules under which no user namespace can be made, as a program of <linux/filter.h>; `None` where system
    calls have other numbers. `clone3` is not there, so that libraries use `clone`, whose flags can be read.
    """
    if platform.machine() not in _SYSTEM_CALLS or sys.byteorder != "little":
        return None
    architecture, clone, unshare = _SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, not_there = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    program = [
        (load, 0, 0, 4),  # the architecture of the call
        (equal, 0, 8, architecture),
        (load, 0, 0, 0),  # its number
        (at_least, 6, 0, 0x40000000),  # the same calls under other numbers (x32)
        (equal, 5, 0, 435),  # clone3
        (equal, 1, 0, clone),
        (equal, 0, 4, unshare),
        (load, 0, 0, 16),  # its first argument
        (any_bit, 0, 2, 0x10000000),  # CLONE_NEWUSER
        (give, 0, 0, refuse),
        (give, 0, 0, not_there),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _half_of_memory() -> int:
    """Half of the memory of the machine or the container, divided by the processes of the run on it, in bytes."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int((Path("/sys/fs/cgroup") / limit).read_text()))
    return min(found) // 2 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _interpreter() -> str:
    """Python outside of virtual environments."""
    return getattr(sys, "_base_executable", None) or sys.executable


def _paths() -> list[str]:
    """What the code gets to see of the file system: the system's programs and libraries, and Python's own."""
    base = os.path.realpath(sys.base_prefix)
    own = [os.path.join(base, name) for name in ("bin", "lib", "lib64")]
    outside = [path for path in own if not base.startswith("/usr")]
    return [path for path in (*_SYSTEM, *outside) if os.path.exists(path) and not os.path.islink(path)]


def _links() -> dict[str, str]:
    """Names in the root that are links into `/usr` on a merged system."""
    return {path: os.readlink(path) for path in _MERGED if os.path.islink(path)}


def _spare_user() -> int:
    """A user id of its own for a run of code, so that limits for each user are limits for each run."""
    first, count = _USERS
    return first + (os.getpid() * 4096 + next(_counter) % 4096) % count


def _processes_of_user() -> int:
    """Processes and threads the current user has."""
    user, count = os.getuid(), 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == user:
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue
    return count

"""Processes that run untrusted Python code: what contains them, and how that is found out.

Owns `Limits`, `Sandbox` and `find_sandbox`; fed by `python.py`. What goes on inside is `sandbox_init.py`. Bubblewrap
and namespaces give the code a file system, a network and a process list of its own; limits alone do not, and say so.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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
_counter = itertools.count()

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
            Bytes of output that are kept; what comes after is read and dropped.

    Raises:
        ConfigError: if one of them is not positive.
    """

    seconds: float = 5.0
    memory: int = 512 * 2**20
    disk: int = 64 * 2**20
    processes: int = 32
    output: int = 100_000

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in vars(self).items() if not value > 0}
        if wrong:
            listed = ", ".join(f"{name}={value}" for name, value in wrong.items())
            raise ConfigError(f"You passed {listed} as a limit for Python code. Limits are positive numbers.")


@dataclass(frozen=True)
class Report:
    """
    What came of a run of code.

    Args:
        status (`str`):
            `"ended"`, `"timeout"`, `"memory"`, or `"lost"` if the sandbox itself came to an end.
        code (`int`):
            Exit code, negative for the signal that ended it.
        output (`str`):
            What it wrote to standard output and standard error, up to the limit.
        dropped (`int`):
            Bytes of output beyond the limit.
    """

    status: str
    code: int = 0
    output: str = ""
    dropped: int = 0


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
        process = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={},
            start_new_session=True,
        )
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

    def _command(self) -> list[str]:
        python = [os.path.realpath(_interpreter()), "-I", "-S", "-B", "-c", self._script, self.mode]
        if self.mode == "limits":
            return guarded(python)
        if self.mode == "namespaces":
            return python
        size = str(self.limits.disk)
        command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        if os.getuid() == 0:
            kept = ("SETUID", "SETGID", "KILL", "SYS_PTRACE", "DAC_READ_SEARCH")
            command += ["--cap-drop", "ALL", *(part for name in kept for part in ("--cap-add", f"CAP_{name}"))]
        else:
            command += ["--unshare-user"]
        for path in _paths():
            for parent in reversed(Path(path).parents[:-1]):
                command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", path, path]
        for link, target in _links().items():
            command += ["--symlink", target, link]
        command += ["--proc", "/proc", "--dev", "/dev"]
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

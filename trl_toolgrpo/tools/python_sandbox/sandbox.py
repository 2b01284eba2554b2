"""Processes that run untrusted Python code, and what contains them.

Bubblewrap gives the code a file system, a network and a process list of its own; resource limits alone do not.
bubblewrap can neither bound the memory and the time of all processes together nor keep the ends of a long output:
`sandbox_init.py`, the first process in the sandbox, does that.
"""

import contextlib
import errno
import itertools
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ..runtime.supervisor import guarded


MODES = ("bubblewrap", "limits")

NOT_STOPPED = {
    "bubblewrap": (
        "faults of the kernel, processor time up to its limit, and, if the run belongs to root and the processor is "
        "neither x86-64 nor aarch64, user namespaces"
    ),
    "limits": (
        "network connections, reading whatever any user may read, filling the disk with many small files, System V "
        "shared memory, which stays, and, unless the run belongs to root, reading the user's own files and signals to "
        "the user's processes"
    ),
}

_LIMITS_ALONE = "Or pass `sandbox='limits'` for resource limits alone, which contain accidents and not attacks."
_MODE_REMEDIES = {
    "bubblewrap": (
        "It needs bubblewrap 0.8 or newer and user namespaces: set `user.max_user_namespaces` above 0 with `sysctl`, "
        "on Debian `kernel.unprivileged_userns_clone=1`, on Ubuntu `kernel.apparmor_restrict_unprivileged_userns=0`; "
        f"start a container with the right to make them, such as `docker run --privileged`. {_LIMITS_ALONE}"
    ),
    "limits": "Install Python where any user may read it.",
}

# What starts and ends in addition to the code's own time: interpreter, namespaces, the last look at the output
_OVERHEAD = 10.0
_STACK = 8 * 2**20  # address space of a thread; what is used of it is watched
_USERS = (0x70000000, 1 << 24)  # user ids that nobody has, for a run that belongs to root
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_FOLDER = "/tmp"
_ENVIRONMENT = {
    **{"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    "MALLOC_ARENA_MAX": "1",  # else each thread reserves 64 MiB of address space
}
_DEVICES = ("null", "zero", "full", "random", "urandom")
_RIGHTS_OF_ROOT = ("SETUID", "SETGID", "KILL", "SYS_PTRACE", "DAC_READ_SEARCH")  # of the first process, not the code
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
            raise ConfigError(
                f"You passed {listed} as a limit for Python code, and limits are positive.", remedy="Pass more than 0."
            )


@dataclass(frozen=True)
class SandboxReport:
    """
    What came of a run of code.

    Args:
        status (`str`):
            `"ended"`, `"timeout"`, `"memory"`, `"busy"` if other runs left no memory for it, or `"lost"` if the
            sandbox itself ended.
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
            `"bubblewrap"` or `"limits"`.
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

    def run(self, code: str) -> SandboxReport:
        """
        Run code in a process of its own, and wait for its end on this thread.

        Args:
            code (`str`):
                Python code.

        Returns:
            [`SandboxReport`]: What came of it; exceeding a limit is no exception.
        """
        folders = 2 * self.limits.disk if self.mode == "bubblewrap" else 0
        total = self.limits.together or _half_of_memory()
        with _shared.share(self.limits.memory + folders, total, PATIENCE) as free, contextlib.ExitStack() as ends:
            if not free:
                return SandboxReport("busy")
            user = _spare_user() if os.getuid() == 0 else None
            if self.mode == "bubblewrap":
                folder, rules = _FOLDER, ends.enter_context(tempfile.TemporaryFile())
                rules.write(_seccomp_rules())
                rules.seek(0)
                return self._start(self._bubblewrap(rules.fileno()), code, user, folder, (rules.fileno(),))
            folder = tempfile.mkdtemp(prefix="sandbox-")
            ends.callback(shutil.rmtree, folder, ignore_errors=True)
            if user is not None:
                os.chown(folder, user, user)
            return self._start(guarded(self._python()), code, user, folder)

    def _start(
        self, command: list[str], code: str, user: int | None, folder: str, files: tuple[int, ...] = ()
    ) -> SandboxReport:
        limits = self.limits
        others = _threads_of_user() if self.mode == "limits" and user is None else 0  # all that the user runs counts
        rlimits = {
            "RLIMIT_AS": limits.memory + limits.processes * _STACK,
            "RLIMIT_CPU": int(limits.seconds) + 1,
            "RLIMIT_FSIZE": limits.disk,
            "RLIMIT_NPROC": limits.processes + others,
            "RLIMIT_NOFILE": 64,
            **dict.fromkeys(("RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"), 0),
        }
        given = {"code": code, "last_expression": self.last_expression, "user": user, "rlimits": rlimits}
        try:
            # At the time limit the first process is killed, and what is below it ends with it
            done = subprocess.run(
                command,
                input=json.dumps({**given, **vars(limits)}).encode(),
                capture_output=True,
                cwd=folder,
                env={"HOME": folder, **_ENVIRONMENT},
                start_new_session=True,
                pass_fds=files,
                timeout=limits.seconds + _OVERHEAD,
            )
            return SandboxReport(**json.loads(done.stdout))
        except subprocess.TimeoutExpired:
            return SandboxReport("timeout")
        except ValueError:
            return SandboxReport("lost", done.returncode, done.stderr[-2000:].decode(errors="replace").strip())

    def _python(self) -> list[str]:
        return [os.path.realpath(_interpreter()), "-I", "-S", "-B", "-c", self._script, self.mode]

    def _bubblewrap(self, rules: int) -> list[str]:
        command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--as-pid-1"]
        command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        if os.getuid() == 0:  # without a user namespace, in which the code could not have a user of its own
            command += ["--cap-drop", "ALL"]
            for name in _RIGHTS_OF_ROOT:
                command += ["--cap-add", f"CAP_{name}"]
        else:
            command += ["--unshare-user", "--disable-userns"]
        if _seccomp_rules():
            command += ["--seccomp", str(rules)]
        base = Path(sys.base_prefix).resolve()
        for folder in (*reversed(base.parents), base):  # else bubblewrap makes them for root alone
            command += ["--dir", str(folder)]
        for path in (*_SYSTEM, *(f"{base}/{name}" for name in ("bin", "lib", "lib64"))):
            command += ["--ro-bind-try", path, path]
        # Not `--dev`: it brings terminals, whose buffers count nowhere
        command += ["--proc", "/proc", "--perms", "0755", "--tmpfs", "/dev", "--symlink", "/proc/self/fd", "/dev/fd"]
        for name in _DEVICES:
            command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        for path in ("/dev/shm", _FOLDER):
            command += ["--perms", "1777", "--size", str(self.limits.disk), "--tmpfs", path]
        return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--", *self._python()]


def find_sandbox(mode: str, limits: Limits, last_expression: bool = True) -> Sandbox:
    """
    Return the sandbox, after running code in it to find out that it works here.

    Args:
        mode (`str`):
            `"bubblewrap"` or `"limits"`.
        limits ([`Limits`]):
            What one run may use.
        last_expression (`bool`, *optional*, defaults to `True`):
            Whether the value of a last expression is written to the output.

    Returns:
        [`Sandbox`]: The sandbox.

    Raises:
        ConfigError: if the mode is unknown or does not work on this system, or the limits leave no room for Python.
    """
    if mode not in MODES:
        raise ConfigError(
            f"You passed `sandbox={mode!r}`, and there is no such sandbox.",
            remedy=f"Pass 'bubblewrap', which runs the code in namespaces of its own. {_LIMITS_ALONE}",
        )
    if sys.platform != "linux":
        raise ConfigError(
            f"You asked for a sandbox for Python code on {sys.platform}, and sandboxes need Linux.",
            remedy="Train on Linux, or in a container or virtual machine with it.",
        )
    if mode == "bubblewrap" and shutil.which("bwrap") is None:
        raise ConfigError(
            "Python code is to run under bubblewrap (`sandbox='bubblewrap'`), and `bwrap` is not installed.",
            remedy=f"Run `apt-get install bubblewrap`, `dnf install bubblewrap` or the like. {_LIMITS_ALONE}",
        )
    reason = _trial_failure(Sandbox(mode, Limits()))
    if reason is not None:
        raise ConfigError(f"`sandbox={mode!r}` does not work here ({reason}).", remedy=_MODE_REMEDIES[mode])
    sandbox = Sandbox(mode, limits, last_expression)
    report = sandbox.run("")
    if report.status in ("memory", "lost") or report.code != 0:
        raise ConfigError(
            f"You passed limits for Python code under which Python itself does not start: {limits}. It ended with "
            f"{report.status!r}, exit code {report.code}: {report.output.strip()[-300:]!r}.",
            remedy="Allow more.",
        )
    return sandbox


def _trial_failure(sandbox: Sandbox) -> str | None:
    report = sandbox.run(_PROBE)
    if report.status == "ended" and report.code == 0:
        return None
    return (report.output.splitlines() or [f"a trial of it ended with {report.status!r}"])[-1]


def _seccomp_rules() -> bytes:
    """
    Return seccomp rules under which no user namespace can be made, as a program of <linux/filter.h>; none where system
    calls have other numbers. `clone3` is not there, so that libraries use `clone`, whose flags can be read.

    `bwrap --disable-userns` forbids them too, but not where it runs as root without a user namespace.
    """
    if platform.machine() not in _SYSTEM_CALLS or sys.byteorder != "little":
        return b""
    architecture, clone, unshare = _SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, not_there = 0x7FFF0000, 0x50000 | errno.ENOSYS
    program = [
        (load, 0, 0, 4),  # the architecture of the call
        (equal, 0, 7, architecture),
        (load, 0, 0, 0),  # its number
        (at_least, 5, 0, 0x40000000),  # the same calls under other numbers (x32)
        (equal, 4, 0, 435),  # clone3
        (equal, 1, 0, clone),
        (equal, 0, 3, unshare),
        (load, 0, 0, 16),  # its first argument
        (any_bit, 0, 1, 0x10000000),  # CLONE_NEWUSER
        (give, 0, 0, not_there),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _half_of_memory() -> int:
    """Return half of the bytes that the machine or the container has, divided by the processes of the run on it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int((Path("/sys/fs/cgroup") / limit).read_text()))
    return min(found) // 2 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _interpreter() -> str:
    """Return the Python outside of virtual environments."""
    return getattr(sys, "_base_executable", None) or sys.executable


def _spare_user() -> int:
    """Return a user id for one run of code, so that limits for each user are limits for each run."""
    first, count = _USERS
    return first + (os.getpid() * 4096 + next(_counter) % 4096) % count


def _threads_of_user() -> int:
    """Return how many processes and threads the current user has."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            count += len(os.listdir(process / "task")) if process.stat().st_uid == os.getuid() else 0
    return count

"""A launcher: what it starts ends with the run, with all its descendants, even if the run is killed by SIGKILL.

This file is also the script that the guarded command runs under, so it imports nothing outside the standard library.
No library does this, and `PR_SET_PDEATHSIG` alone does not: it also fires when only the *thread* that started the
process ends, and is not inherited.

Two small processes stand between the run and the command. The stub is what the run has started: it passes signals on,
returns the command's exit code, and ends when the run does. The keeper starts the command in a session of its own, and
when the stub ends, however it ends, it kills everything below. On Linux both are subreapers, so that a daemon that has
left its parent, its session and its process group is still found. Elsewhere the process group is killed, and a process
that has left it survives.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable


_PASSED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} if os.name == "posix" else set()
_AWAITED = {signal.SIGCHLD, signal.SIGALRM, *_PASSED_ON} if os.name == "posix" else set()
_IGNORED_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ} if os.name == "posix" else set()  # and by what it starts
_PARENT_DEATH_SIGNAL, _SUBREAPER = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of <linux/prctl.h>
_POLL = 0.2
_GIVE_UP = 5.0  # seconds after which a process that cannot be killed is left alone


def guarded(command: list[str]) -> list[str]:
    """
    Return a command that ends with this process.

    The process that calls this must be the one that starts the command, from any of its threads. Standard streams,
    other inherited file descriptors, environment and working directory pass straight through; SIGTERM, SIGINT and
    SIGHUP are passed on; the exit code is the command's. Whatever the command leaves running ends with it.

    Args:
        command (`list[str]`):
            The program and its arguments.

    Returns:
        `list[str]`: what to start instead; on a system without `fork`, the command unchanged.
    """
    if os.name != "posix":
        return list(command)
    return [sys.executable, "-I", os.path.abspath(__file__), str(os.getpid()), *command]


def main(run: int, command: list[str]) -> None:
    """
    Run a command until it ends or the run does; does not return.

    Args:
        run (`int`):
            Process id of the run, which is this process's parent.
        command (`list[str]`):
            The program and its arguments.
    """
    stub = os.getpid()

    def keep() -> None:
        os.setsid()
        _end_as(_supervise(stub, lambda: _become(command), kills_group=True))

    _end_as(_supervise(run, keep))


def _supervise(parent: int, start: Callable[[], None], kills_group: bool = False) -> int | None:
    """
    Fork a child that calls `start` and wait until it or the parent has ended, then kill everything below.

    Returns the child's status, or `None` when the parent has ended first.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    for number in _AWAITED:
        signal.signal(number, lambda *_: None)  # one that is ignored would not be delivered
    if sys.platform == "linux":
        # Orphans below become children of this process, which is told when a thread of its parent ends. Processes that
        # it forks inherit neither.
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGCHLD, 0, 0, 0)
    else:
        signal.setitimer(signal.ITIMER_REAL, _POLL, _POLL)
    child = os.fork()
    if child == 0:
        start()
    _close_streams()
    status = None
    while status is None and os.getppid() == parent:
        arrived = signal.sigwait(_AWAITED)
        if arrived in _PASSED_ON:
            os.kill(child, arrived)
        status = _reap(child)
    if kills_group:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
    _kill_descendants()  # also those of a keeper that was killed
    return status


def _become(command: list[str]) -> None:
    """Turn this process into the command, in a session of its own, with the signal handlers a program expects."""
    os.setsid()
    for number in _AWAITED | _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
    try:
        os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        os.write(2, f"{command[0]!r} cannot be started: {error}\n".encode(errors="replace"))
        os._exit(127)


def _close_streams() -> None:
    """Close the command's streams in this process, so that the run sees when the command closes them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    for descriptor in map(int, os.listdir("/dev/fd")):
        if descriptor > 2:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _reap(process: int) -> int | None:
    """Reap all children that have ended, adopted ones too; return the status of `process` if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if found[0] == process:
                status = found[1]
    return status


def _kill_descendants() -> None:
    """Kill whatever is below this process until nothing is left; on Linux only."""
    deadline = time.monotonic() + _GIVE_UP
    while sys.platform == "linux" and (found := _descendants()) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        _reap(0)
        time.sleep(0.002)


def _descendants() -> list[int]:
    """Return the processes below this one, parents first."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/stat", "rb") as stat:
                    parent = int(stat.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = list(children.get(os.getpid(), ()))
    for process in found:
        found += children.get(process, ())
    return found


def _end_as(status: int | None) -> None:
    """End this process as another has ended: with its exit code, or by the same signal."""
    if status is None:
        os._exit(1)
    if os.WIFSIGNALED(status):
        import resource  # not everywhere

        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core dump is enough
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

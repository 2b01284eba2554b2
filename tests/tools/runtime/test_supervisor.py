"""The launcher that ends processes with the run: real processes, killed in every way."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from conftest import wait_until

from trl_toolgrpo.tools.runtime.supervisor import guarded


pytestmark = pytest.mark.skipif(os.name != "posix", reason="the launcher needs fork")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux finds what has left its process group")

# Leaves a child, a daemon that has left session and parent, and itself running; writes their ids to a file.
FAMILY = """
    import os, sys, time
    def note():
        with open(sys.argv[1], "a") as file:
            file.write(f"{os.getpid()}\\n")
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                note()
                time.sleep(60)
            os._exit(0)
        note()
        time.sleep(60)
    note()
    time.sleep(float(sys.argv[2]))
"""
RUN = """
    import subprocess, sys, time
    sys.path.insert(0, sys.argv[1])
    from supervisor import guarded
    guard = subprocess.Popen(guarded([sys.executable, "-c", *sys.argv[2:]]))
    print(guard.pid, flush=True)
    time.sleep(60)
"""


def python(code, *arguments):
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


def alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def family(path, count=3):
    """Return the ids of the processes of `FAMILY`, once all have written theirs."""
    wait_until(lambda: path.exists() and len(path.read_text().split()) == count)
    return [int(line) for line in path.read_text().split()]


def test_streams_arguments_environment_folder_and_exit_code_pass_through(tmp_path):
    code = """
        import os, sys
        print(sys.stdin.read(), sys.argv[1:], os.environ["WORD"], os.getcwd())
        print("aside", file=sys.stderr)
        sys.exit(3)
    """
    done = subprocess.run(
        guarded(python(code, "a b", "")),
        input="in",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "WORD": "out"},
    )
    assert done.stdout == f"in ['a b', ''] out {tmp_path}\n"
    assert (done.stderr, done.returncode) == ("aside\n", 3)


def test_other_file_descriptors_pass_through_and_close_with_the_command():
    readable, writable = os.pipe()
    code = "import os, sys, time; os.write(int(sys.argv[1]), b'x'); os.close(int(sys.argv[1])); time.sleep(60)"
    with subprocess.Popen(guarded(python(code, writable)), pass_fds=[writable]) as process:
        os.close(writable)
        with os.fdopen(readable, "rb") as pipe:
            assert pipe.read() == b"x"  # an end, though the process still runs
        process.kill()


def test_the_run_sees_the_command_close_its_output():
    with subprocess.Popen(guarded(python("import os, time; os.close(1); time.sleep(60)")), stdout=-1) as process:
        assert process.stdout.read() == b""
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(number):
    code = """
        import signal, sys
        signal.signal(int(sys.argv[1]), lambda *_: sys.exit(7))
        print("ready", flush=True)
        signal.pause()
    """
    with subprocess.Popen(guarded(python(code, int(number))), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(20) == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_command_ended_by_a_signal_has_that_exit_status(number):
    code = "import os, sys; os.kill(os.getpid(), int(sys.argv[1]))"
    assert subprocess.run(guarded(python(code, int(number)))).returncode == -number


def test_a_command_that_does_not_exist_is_named():
    done = subprocess.run(guarded(["no-such-program", "x"]), capture_output=True, text=True)
    assert done.returncode == 127
    assert done.stderr.startswith("'no-such-program' cannot be started: ") and "No such file" in done.stderr


def test_broken_pipes_end_the_command_as_in_a_shell():
    readable, writable = os.pipe()
    os.close(readable)
    done = subprocess.run(guarded(["sh", "-c", "echo x; exit 0"]), stdout=writable)
    os.close(writable)
    assert done.returncode == -signal.SIGPIPE


@on_linux
@pytest.mark.parametrize("victim", ["run", "stub", "keeper"])
def test_all_processes_end_when_run_stub_or_keeper_is_killed(tmp_path, victim):
    pids, folder = tmp_path / "pids", Path(sys.modules[guarded.__module__].__file__).parent
    run = subprocess.Popen(python(RUN, folder, textwrap.dedent(FAMILY), pids, 60), stdout=subprocess.PIPE)
    try:
        stub = int(run.stdout.readline())
        members = family(pids)
        keeper = int(Path(f"/proc/{stub}/task/{stub}/children").read_text())
        assert all(map(alive, [*members, stub, keeper]))
        os.kill({"run": run.pid, "stub": stub, "keeper": keeper}[victim], signal.SIGKILL)
        wait_until(lambda: not any(map(alive, [*members, stub, keeper])))
    finally:
        run.kill()
        run.wait()
        run.stdout.close()


@on_linux
def test_descendants_end_with_the_command(tmp_path):
    pids = tmp_path / "pids"
    process = subprocess.Popen(guarded(python(FAMILY, pids, 0.5)))
    members = family(pids)
    assert process.wait(20) == 0
    assert not any(map(alive, members))


def test_a_command_survives_the_thread_that_started_it():
    started = []
    command = guarded(python("import sys; print(sys.stdin.read())"))
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    thread = threading.Thread(target=lambda: started.append(subprocess.Popen(command, **options)))
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert started[0].communicate(b"still here", timeout=20)[0] == b"still here\n"


@on_linux
def test_no_command_runs_for_a_run_that_has_ended():
    """A launcher whose parent is no longer the run starts nothing that stays."""
    command = guarded(python("import time; time.sleep(60)"))
    command[3] = str(2**22 + 1)  # no process has this id
    assert subprocess.run(command, timeout=20).returncode == 1


@on_linux
def test_a_command_ends_with_the_run_after_the_thread_that_started_it(tmp_path):
    code = """
        import subprocess, sys, threading, time
        sys.path.insert(0, sys.argv[1])
        from supervisor import guarded
        sleep = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
        thread = threading.Thread(target=lambda: subprocess.Popen(guarded(sleep)))
        thread.start()
        thread.join()
        time.sleep(60)
    """
    folder = Path(sys.modules[guarded.__module__].__file__).parent
    with subprocess.Popen(python(code, folder), stdout=subprocess.PIPE) as run:
        process = int(run.stdout.readline())
        time.sleep(0.3)
        assert alive(process)
        run.kill()
        wait_until(lambda: not alive(process))

"""The Python tool: bubblewrap contains hostile code, and honest code is served in both sandboxes."""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hostile_code import SECRET, Machine, sandboxes, snippets

from trl_toolgrpo import ConfigError, ToolCall, python_tool
from trl_toolgrpo.tools.python_sandbox import sandbox as sandbox_module
from trl_toolgrpo.tools.python_sandbox.sandbox import MODES, Limits, Sandbox, SandboxReport, find_sandbox
from trl_toolgrpo.tools.results import result_text
from trl_toolgrpo.tools.runtime.executor import ToolExecutor


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes need Linux")

LIMITS = Limits(seconds=0.3, memory=256 * 2**20, disk=16 * 2**20, processes=16, output=10_000)
# Limits alone need a Python that any user may read
SYSTEM = "/usr/bin/python3"


def failure_here(mode):
    """Return why a sandbox does not work here, and the Python it needs if only the system's will do."""
    with pytest.MonkeyPatch.context() as patch:
        for interpreter in (None, SYSTEM if mode == "limits" else None):
            if interpreter is not None:
                patch.setattr(sandbox_module, "_interpreter", lambda: SYSTEM)
            try:
                find_sandbox(mode, LIMITS)
            except ConfigError as error:
                reason = error.message
            else:
                return None, interpreter
    return reason, None


MISSING = {mode: failure_here(mode) for mode in MODES}
HERE = {mode: pytest.mark.skipif(reason is not None, reason=str(reason)) for mode, (reason, _) in MISSING.items()}
EVERY = [pytest.param(mode, marks=HERE[mode]) for mode in MODES]
bubblewrap = HERE["bubblewrap"]
WORKING = next((mode for mode in MODES if MISSING[mode][0] is None), None)
works = pytest.mark.skipif(WORKING is None, reason=str(MISSING))

# One of each kind; tests/benchmarks/hostile_python.py has all of them
CHOSEN = [
    *("fork_bomb-0", "daemon-1", "deaf-0", "orphans_that_write-1", "refuses_to_end-0", "allocation-2"),
    *("memory_of_many-0", "memory_of_no_process-0", "flood-2", "forged_report-0", "environment-1", "home-0"),
    *("home-6", "writing_outside-0", "writing_outside-2", "connection-0", "kill-0", "kill-4", "trace-0"),
    *("become_root-0", "namespaces-1", "shared_memory_of_many-0"),
    *("shell_bomb-1", "thread_bomb-0", "many_files-0", "home-2", "other_sockets-0", "stop-1", "crash-4"),
]


@pytest.fixture(autouse=True)
def interpreter(request, monkeypatch):
    """The system's Python for a sandbox that cannot be had with this one."""
    callspec = getattr(request.node, "callspec", None)
    mode = callspec.params.get("mode", WORKING) if callspec is not None else WORKING
    if MISSING.get(mode, (None, None))[1]:
        monkeypatch.setattr(sandbox_module, "_interpreter", lambda: SYSTEM)


@pytest.fixture(scope="module")
def machine():
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder, Machine(Path(folder)) as made:
        yield made


@bubblewrap
@pytest.mark.parametrize("name", CHOSEN)
def test_hostile_code_is_contained(machine, name):
    sandbox = Sandbox("bubblewrap", LIMITS)
    report, seconds = machine.attack(sandbox, snippets()[name])
    assert machine.damage(sandbox, report, seconds) == []


def test_there_are_200_hostile_snippets_of_40_kinds():
    found = snippets()
    assert len(set(found.values())) == len(found) >= 200
    assert len({name.rpartition("-")[0] for name in found}) >= 40


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("environment-0", "the secret came out"),
        ("home-0", "the secret came out"),
        ("connection-0", "somebody called the server"),
        ("writing_outside-0", "something was written outside"),
        ("flood-0", "characters of output"),
    ],
)
def test_the_check_finds_attacks_that_succeed(name, fault):
    """The same code without a sandbox."""

    class Open(Sandbox):
        def run(self, code):
            code = code.replace("10 ** 9", "10 ** 5")
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            return SandboxReport("ended", done.returncode, done.stdout)

    sandbox = Open("limits", LIMITS)
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder, Machine(Path(folder)) as machine:
        report, seconds = machine.attack(sandbox, snippets()[name])
        time.sleep(0.1)  # the server counts on a thread of its own
        assert [found for found in machine.damage(sandbox, report, seconds) if fault in found]
        assert [found for found in machine.damage(sandbox, report, 2.4) if "over the limit" in found]


# Honest code


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("print('a')\n1 + 1", SandboxReport("ended", 0, "a\n2\n")),
        ("x = 3\nx", SandboxReport("ended", 0, "3\n")),
        ("None", SandboxReport("ended", 0, "")),
        ("", SandboxReport("ended", 0, "")),
        ("import sys; sys.exit(3)", SandboxReport("ended", 3, "")),
        ("import sys; print('out'); print('err', file=sys.stderr)", SandboxReport("ended", 0, "out\nerr\n")),
        ("print('é'); print(__name__)", SandboxReport("ended", 0, "é\n__main__\n")),
        ("import os; os.abort()", SandboxReport("ended", -6, "")),
        ("def f():\n  class A: pass\n  return A()\ntype(f()).__name__", SandboxReport("ended", 0, "'A'\n")),
        ("import math, json, decimal, statistics\nmath.comb(5, 2)", SandboxReport("ended", 0, "10\n")),
        ("import os; os.write(1, b'x' * 20_001)", SandboxReport(
            "ended", 0, "x" * 5000, 10_007, "x" * 4994 + "20001\n")),
        ("print('before', end=''); 1 / 0", SandboxReport(
            "ended", 1, 'beforeTraceback (most recent call last):\n  File "<code>", line 1, in <module>\n')),
    ],
)  # fmt: skip
def test_reports_of_honest_code(mode, code, report):
    found = Sandbox(mode, LIMITS).run(code)
    shown = found.output
    if report.code == 1:
        assert shown.endswith("ZeroDivisionError: division by zero\n")
        shown = shown[: len(report.output)]
    assert SandboxReport(found.status, found.code, shown, found.dropped, found.tail) == report


@pytest.mark.parametrize("mode", EVERY)
def test_the_private_folder_is_writable_empty_and_gone_afterwards(mode):
    before = set(os.listdir(tempfile.gettempdir()))
    code = "import os; open('mine', 'w').write('x'); print(os.listdir('.'), os.getcwd() == os.environ['HOME'])"
    for _ in range(2):
        assert Sandbox(mode, LIMITS).run(code).output == "['mine'] True\n"
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith("sandbox-")]


@pytest.mark.parametrize("mode", EVERY)
def test_output_before_a_limit_is_kept(mode):
    report = Sandbox(mode, LIMITS).run("print('so far')\nwhile True: pass")
    assert (report.status, report.output) == ("timeout", "so far\n")


@pytest.mark.parametrize("mode", EVERY)
def test_code_can_use_threads_and_processes_within_the_limit(mode):
    code = (
        "import subprocess, threading\n"
        "seen = []\n"
        "threads = [threading.Thread(target=seen.append, args=(i,)) for i in range(4)]\n"
        "for t in threads: t.start()\n"
        "for t in threads: t.join()\n"
        "print(sorted(seen), subprocess.run(['/bin/echo', 'x'], capture_output=True, text=True).stdout)"
    )
    assert Sandbox(mode, LIMITS).run(code).output == "[0, 1, 2, 3] x\n\n"


@pytest.mark.parametrize("mode", EVERY)
def test_the_code_is_nobody_and_sees_no_environment(mode, monkeypatch):
    monkeypatch.setenv("TRL_TOOLGRPO_SECRET", SECRET)
    code = "import os; print(os.getuid(), sorted(os.environ))"
    user, names = Sandbox(mode, LIMITS).run(code).output.split(maxsplit=1)
    assert names == "['HOME', 'LANG', 'MALLOC_ARENA_MAX', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PATH']\n"
    assert int(user) != 0 and (os.getuid() != 0 or int(user) >= 0x70000000)


@works
@pytest.mark.parametrize(
    ("changed", "code", "status"),
    [
        ({"seconds": 1.5}, "import time; time.sleep(0.5); print('done')", "done\n"),
        ({"memory": 512 * 2**20}, "len(bytearray(300 * 2**20))", "314572800\n"),
        ({"disk": 64 * 2**20}, "open('x', 'wb').write(b'x' * 20 * 2**20)", "20971520\n"),
        (
            {"processes": 24},
            "import threading, time\nfor _ in range(18): threading.Thread(target=time.sleep, args=(0.1,)).start()\n1",
            "1\n",
        ),
        ({"output": 20_000}, "print('x' * 15_000)", "x" * 15_000 + "\n"),
    ],
)
def test_each_limit_is_enforced(changed, code, status):
    given = {**vars(LIMITS), "seconds": 0.3 if "seconds" in changed else 5.0}
    strict, loose = Sandbox(WORKING, Limits(**given)), Sandbox(WORKING, Limits(**{**given, **changed}))
    assert loose.run(code).output == status
    assert strict.run(code).output != status


RUN = """
    import importlib, sys, types
    # The package without its heavy imports
    for name in ("trl_toolgrpo", "trl_toolgrpo.tools"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [name.replace(".", "/")]
    sandbox = importlib.import_module("trl_toolgrpo.tools.python_sandbox.sandbox")
    if sys.argv[2]:
        sandbox._interpreter = lambda: sys.argv[2]
    box = sandbox.Sandbox(sys.argv[1], sandbox.Limits(seconds=60))
    box._script = f"# {sys.argv[3]}\\n{box._script}"
    box.run("import time; time.sleep(60)")
"""


@pytest.mark.parametrize("mode", EVERY)
def test_code_ends_with_a_run_that_is_killed(mode, tmp_path):
    mark = f"mark-{tmp_path}"
    command = [sys.executable, "-c", textwrap.dedent(RUN), mode, MISSING[mode][1] or "", mark]
    run = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 20
    while len(sandboxes(mark, run.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert len(sandboxes(mark, run.pid)) > 1, "the code runs"
    run.kill()
    run.wait()
    while sandboxes(mark, run.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not sandboxes(mark, run.pid)


# Which sandbox


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"memory_mb": -1}, {"processes": 0}])
def test_limits_that_are_not_positive_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).removesuffix("_mb")):
        python_tool(**wrong)


@works
def test_limits_that_leave_no_room_for_python_are_refused():
    with pytest.raises(ConfigError, match="under which Python itself does not start"):
        python_tool(sandbox=WORKING, memory_mb=1)


def test_without_bubblewrap_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="`bwrap` is not installed") as error:
        python_tool()
    assert "apt-get install bubblewrap" in error.value.remedy and "dnf install" in error.value.remedy
    assert "`sandbox='limits'`" in error.value.remedy and "accidents and not attacks" in error.value.remedy


@pytest.mark.parametrize(
    "complaint",
    [
        "bwrap: No permissions to create new namespace, likely because the kernel does not allow it",
        "bwrap: Unknown option --disable-userns",
    ],
)
def test_a_bubblewrap_that_does_not_work_is_refused_with_its_reason(monkeypatch, tmp_path, complaint):
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\necho '{complaint}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    with pytest.raises(ConfigError) as error:
        python_tool()
    assert f"does not work here ({complaint})" in error.value.message
    for part in ("bubblewrap 0.8 or newer", "user namespaces", "docker run", "accidents and not attacks"):
        assert part in error.value.remedy


@pytest.mark.parametrize("mode", ["namespaces", "auto", "none"])
def test_other_sandboxes_are_refused_by_name(mode):
    with pytest.raises(ConfigError, match=f"You passed `sandbox='{mode}'`") as error:
        python_tool(sandbox=mode)
    assert "'bubblewrap'" in error.value.remedy and "'limits'" in error.value.remedy


@pytest.mark.parametrize("mode", EVERY)
def test_what_the_sandbox_does_not_stop_is_logged(mode, caplog):
    python_tool("calc", sandbox=mode)
    what = {"bubblewrap": "faults of the kernel", "limits": "network connections"}[mode]
    assert f"Code of the tool 'calc' runs in the sandbox '{mode}', which does not stop: {what}" in caplog.text


def test_a_first_process_that_fails_is_reported_as_lost():
    sandbox = Sandbox("limits", LIMITS)
    sandbox._script = "raise OSError('unshare: Operation not permitted')"
    report = sandbox.run("1")
    assert (report.status, report.code) == ("lost", 1)
    assert report.output.endswith("OSError: unshare: Operation not permitted")


# The tool


@pytest.fixture
def tool(interpreter):
    if WORKING is None:
        pytest.skip(str(MISSING))
    return python_tool(sandbox=WORKING, seconds=0.3, memory_mb=256, output_bytes=2000, processes=16)


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ("print('a')\n6 * 7", None, "a\n42"),
        ("print('so far')\nwhile True: pass", "timeout", "so far\n[stopped after 0.3 seconds]"),
        ("import sys; print('x'); sys.exit(4)", "error", "x\n[exit code 4]"),
        ("import os; os.kill(os.getpid(), 11)", "error", "[ended by SIGSEGV]"),
        ("import os; os.kill(os.getpid(), 40)", "error", "[ended by signal 40]"),
        (
            "print('x' * 3000)",
            None,
            f"{'x' * 1000}\n[... 1001 bytes of output were dropped ...]\n{'x' * 999}",
        ),
        (
            "import sys; print('x' * 3000); print('the cause', file=sys.stderr); sys.exit(3)",
            "error",
            f"{'x' * 1000}\n[... 1011 bytes of output were dropped ...]\n{'x' * 989}\nthe cause\n[exit code 3]",
        ),
    ],
)
def test_the_text_that_the_policy_reads(tool, code, error, text):
    assert read(tool, code) == (error is not None, error, text)


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("data", ["bytearray(90 * 2**20)", "mmap.mmap(-1, 90 * 2**20); x.write(bytes(90 * 2**20))"])
def test_memory_is_the_sum_over_all_processes(mode, data):
    # Time enough to be seen on a machine under load
    tool = python_tool(sandbox=mode, seconds=10, memory_mb=256, processes=16)
    code = f"import mmap, os, time\n[os.fork() for _ in range(3)]\nx = {data}\ntime.sleep(9)"
    assert read(tool, code) == (True, "error", "[stopped: more than 256 MiB of memory]")


@pytest.mark.parametrize("mode", EVERY)
def test_shared_memory_within_the_limit_may_be_used(mode):
    fill = "import mmap, os\nx = mmap.mmap(-1, 60 * 2**20)\nx.write(bytes(60 * 2**20))"
    code = f"{fill}\nos.fork() or os._exit(0)\nos.wait()[1]"
    assert Sandbox(mode, Limits(seconds=10, memory=256 * 2**20)).run(code) == SandboxReport("ended", 0, "0\n")


def read(tool, code):
    executor = ToolExecutor()
    result = executor.submit(ToolCall("c", "python", {"code": code}), tool).result(timeout=20)
    executor.shutdown()
    return result.is_error, result.error_type, result.content


def test_the_tool_describes_itself_and_its_arguments_are_checked(tool):
    assert "There is no network" in tool.description and "0.3 seconds" in tool.description
    executor = ToolExecutor()
    result = executor.submit(ToolCall("c", "python", {}), tool).result(timeout=20)
    executor.shutdown()
    assert result_text(result) == '{"error": "Invalid arguments for tool `python`: `code` is a required property."}'


@works
@pytest.mark.parametrize("shown", [True, False])
def test_the_last_expression_is_shown_or_not(shown):
    tool = python_tool(sandbox=WORKING, last_expression=shown)
    assert tool.function("1 + 1").content == ("2" if shown else "")
    assert ("last line" in tool.description) == shown


@works
def test_runs_at_the_same_time_do_not_share_their_limits():
    """Eight runs of eight threads each: more together than the sixteen that one may have."""
    code = (
        "import threading, time\n"
        "for _ in range(8): threading.Thread(target=time.sleep, args=(0.2,)).start()\n"
        "print(threading.active_count())"
    )
    tool, executor = python_tool(sandbox=WORKING, seconds=10, processes=16), ToolExecutor()
    futures = [executor.submit(ToolCall("c", "python", {"code": code}), tool) for _ in range(8)]
    found = [future.result(timeout=30).content for future in futures]
    executor.shutdown()
    assert found == ["9"] * 8


def test_the_script_inside_needs_nothing_of_the_package():
    spec = importlib.util.find_spec("trl_toolgrpo.tools.python_sandbox.sandbox_init")
    text = Path(spec.origin).read_text(encoding="utf-8")
    assert "from ." not in text and "import trl" not in text


# What the kernel keeps for code besides its pages

_FOUR = (
    "import os\nfor k in range(4):\n"
    "    if os.fork() == 0:\n"
    "        n = 0\n"
    "        try: os.mkdir(f'{folder}/{{k}}'); os.chdir(f'{folder}/{{k}}')\n"
    "        except OSError: os._exit(0)\n"
)
_EMPTY = {
    "empty files": "os.close(os.open(str(n), os.O_CREAT))",
    "folders": "os.mkdir(str(n))",
    "links": "open('x', 'w').close(); os.link('x', str(n) + 'y' * 200)",
    "symbolic links": "os.symlink('x' * 100, str(n))",
    "pipes": "os.mkfifo(str(n))",
    "sockets": "import socket; s = socket.socket(socket.AF_UNIX); s.bind(str(n)); s.close()",
}


@bubblewrap
@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
@pytest.mark.parametrize("kind", _EMPTY)
def test_files_without_content_count_as_memory(folder, kind):
    code = _FOUR.format(folder=folder) + (
        f"        while True:\n            try: {_EMPTY[kind]}; n += 1\n            except OSError: os._exit(0)\n"
        f"for k in range(4): os.wait()\n"
    )
    assert Sandbox("bubblewrap", Limits(seconds=20, memory=96 * 2**20)).run(code).status == "memory"


@bubblewrap
@pytest.mark.parametrize(
    "call",
    [
        "libc.semget(0, 32000, 0o600)",
        "queue = libc.msgget(0, 0o600); libc.msgsnd(queue, b'\\1' + bytes(7) + b'x' * 8000, 8000, 0o4000)",
    ],
)
def test_semaphores_and_messages_count_as_memory(call):
    code = f"import ctypes\nlibc = ctypes.CDLL(None)\nwhile True: {call}"
    assert Sandbox("bubblewrap", Limits(seconds=20, memory=96 * 2**20)).run(code).status == "memory"


_USERNS = """
import ctypes, threading, subprocess
libc = ctypes.CDLL(None, use_errno=True)
tries = [libc.unshare(0x10000000), libc.unshare(0x10020000), libc.unshare(0x30000000)]
if {numbers}:
    tries += [libc.syscall({clone}, 0x10000011, 0, 0, 0, 0), libc.syscall(435, bytes(88), 88)]
if {numbers} and {clone} == 56:
    tries += [libc.syscall(0x40000000 | 272, 0x10000000)]
thread = threading.Thread(target=int); thread.start(); thread.join()
print(set(tries), subprocess.run(["/bin/echo", "x"], capture_output=True).stdout)
"""


@bubblewrap
def test_no_user_namespace_can_be_made():
    known = sandbox_module._SYSTEM_CALLS.get(platform.machine())
    code = _USERNS.format(numbers=known is not None, clone=known[1] if known else 0)
    assert Sandbox("bubblewrap", Limits()).run(code).output == "{-1} b'x\\n'\n"


AS_NOBODY = """
    import importlib, json, sys, types
    for name in ("trl_toolgrpo", "trl_toolgrpo.tools"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [name.replace(".", "/")]
    sandbox = importlib.import_module("trl_toolgrpo.tools.python_sandbox.sandbox")
    sandbox._interpreter = lambda: "/usr/bin/python3"
    if sys.argv[1] == "without rules":
        sandbox._seccomp_rules = lambda: b""
    box = sandbox.Sandbox("bubblewrap", sandbox.Limits(disk=8 * 2**20, memory=100 * 2**20))
    print(json.dumps([sandbox._trial_failure(box), *(vars(box.run(code)) for code in sys.argv[2:])]))
"""


@bubblewrap
@pytest.mark.skipif(os.getuid() != 0 or not os.path.exists(SYSTEM), reason="needs root and the system's Python")
@pytest.mark.parametrize("way", ["with rules", "without rules"])
def test_the_limits_hold_for_a_run_that_does_not_belong_to_root(way):
    files = "import os\nn = 0\nwhile True:\n    os.close(os.open(str(n), os.O_CREAT)); n += 1"
    blind = "import os, resource, time\nresource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))\ntime.sleep(9)"
    namespaces = _USERNS.format(numbers=False, clone=0)
    command = [SYSTEM, "-B", "-c", textwrap.dedent(AS_NOBODY), way, namespaces, files, blind]
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    found = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, **nobody)
    failure, userns, bounded, blinded = json.loads(found.stdout)
    if failure is not None:
        pytest.skip(failure)
    assert userns["output"] == "{-1} b'x\\n'\n"
    assert bounded["status"] == "memory"
    assert blinded["status"] == "lost", "a watch that sees nothing ends the run"


# Runs at the same time


@works
def test_runs_at_the_same_time_share_their_memory(monkeypatch):
    monkeypatch.setattr(sandbox_module, "_shared", sandbox_module.SharedMemory())
    tool = python_tool(sandbox=WORKING, memory_mb=256, disk_mb=8, together_mb=600, seconds=10)
    code = "import time; start = time.monotonic(); time.sleep(0.5); print(start, time.monotonic())"
    executor = ToolExecutor()
    futures = [executor.submit(ToolCall("c", "python", {"code": code}), tool) for _ in range(6)]
    spans = [tuple(map(float, future.result(timeout=60).content.split())) for future in futures]
    executor.shutdown()
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(at_once) <= 2 and len(spans) == 6


@works
def test_a_run_that_finds_no_memory_says_so_and_may_be_tried_again(monkeypatch):
    shared = sandbox_module.SharedMemory()
    monkeypatch.setattr(sandbox_module, "_shared", shared)
    monkeypatch.setattr(sandbox_module, "PATIENCE", 0.1)
    tool = python_tool(sandbox=WORKING, together_mb=512)
    with shared.share(1, 2**40, 0.0) as free:
        result = tool.function("1 + 1")
    assert free and result.is_error and result.transient and result.content.startswith("[not run: ")
    assert tool.function("1 + 1").content == "2"


@works
@pytest.mark.parametrize("text", ["é" * 20, "x" + "é" * 20, "é" * 20 + "x", "x" + "é" * 20 + "x"])
@pytest.mark.parametrize("most", [8, 9, 10, 11])
def test_a_long_output_is_cut_between_characters(text, most):
    report = Sandbox(WORKING, Limits(output=most)).run(f"import sys; sys.stdout.write({text!r})\nNone")
    assert "\N{REPLACEMENT CHARACTER}" not in report.output + report.tail and report.dropped > 0
    assert text.startswith(report.output) and text.endswith(report.tail) and len(report.output + report.tail) >= 3


@works
@pytest.mark.parametrize("wrong", [0, -5])
def test_memory_together_that_is_not_positive_is_refused(wrong):
    with pytest.raises(ConfigError, match="together"):
        python_tool(sandbox=WORKING, together_mb=wrong)

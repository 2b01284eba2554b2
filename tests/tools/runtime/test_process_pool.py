"""Tools in processes of their own: killed and crashed for real, used again where that is safe, gone at the end."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import process_tools
import pytest
from conftest import config, prompts, tiny_model, wait_until

from trl_toolgrpo import Tool, ToolCall, ToolGRPOTrainer, ToolRuntimeError, ToolSchemaError
from trl_toolgrpo.tools.from_callable import environment_tools
from trl_toolgrpo.tools.results import plain_content
from trl_toolgrpo.tools.runtime.executor import ToolExecutor


pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes of tools need POSIX")

ANY = {"type": "object", "properties": {}}


@pytest.fixture
def executor():
    made = ToolExecutor(timeout=20.0)
    yield made
    made.shutdown()


def tool_of(function, **options):
    return Tool(getattr(function, "__name__", "t"), "d", ANY, function, isolation="process", **options)


def submit(executor, tool, **arguments):
    return executor.submit(ToolCall("c", tool.name, arguments), tool)


def call(executor, function, **arguments):
    return submit(executor, tool_of(function), **arguments).result(timeout=30)


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Where calls run


def test_calls_in_turn_share_one_other_process(executor):
    tool = tool_of(process_tools.where)
    served = [submit(executor, tool).result(timeout=30).content for _ in range(3)]
    assert [count for _, count in served] == [1, 2, 3]
    assert len({process for process, _ in served} - {os.getpid()}) == 1


def test_calls_at_the_same_time_have_a_process_each(executor):
    tool = tool_of(process_tools.where)
    futures = [submit(executor, tool, seconds=0.3) for _ in range(3)]
    assert len({future.result(timeout=30).content[0] for future in futures}) == 3


def test_two_tools_do_not_share_a_process(executor):
    first, second = call(executor, process_tools.where).content, call(executor, process_tools.where_async).content
    assert first[0] != second[0] and first[1] == second[1] == 1


def test_a_tool_that_is_not_thread_safe_runs_in_one_process(executor):
    tool = tool_of(process_tools.where, thread_safe=False)
    futures = [submit(executor, tool, seconds=0.02) for _ in range(3)]
    assert [future.result(timeout=30).content[1] for future in futures] == [1, 2, 3]


def test_a_tool_process_imports_neither_torch_nor_trl(executor):
    assert call(executor, process_tools.loaded).content == []
    assert call(executor, process_tools.fail, how="transient").transient
    tool = Tool("t", "d", ANY, process_tools.fail, isolation="process")
    assert submit(executor, tool, how="result").result(timeout=30).reward == 0.5
    assert call(executor, process_tools.loaded).content == []


# What comes back


@pytest.mark.parametrize("name", [name for name in process_tools.VALUES if not name.startswith("large")])
def test_results_are_the_same_as_on_a_thread(executor, name):
    got, expected = call(executor, process_tools.echo, value=name).content, plain_content(process_tools.VALUES[name])
    assert got == expected or (math.isnan(got) and math.isnan(expected))


def test_arguments_arrive_unchanged(executor):
    given = {"a": [1, 2.5, None, True, "é \ud800"], "b": {"c": math.inf}}
    assert call(executor, process_tools.echo, value=given).content == given


@pytest.mark.parametrize("name", ["large", "large structure"])
def test_a_result_of_fifty_megabytes_is_cut_in_its_middle(executor, name):
    result = call(executor, process_tools.echo, value=name)
    whole = process_tools.VALUES[name]
    text = whole if isinstance(whole, str) else json.dumps(whole)
    half = 2 * 2**20
    assert not result.is_error and result.content == f"{text[:half]}\n[...]\n{text[-half:]}"


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("SystemExit", "SystemExit: 2"),
        ("KeyboardInterrupt", "KeyboardInterrupt"),
        ("MemoryError", "MemoryError"),
        ("type", "no " + "x" * 100),
        ("segfault", "The process of tool `fail` was ended by signal 11."),
        ("_exit", "The process of tool `fail` ended with exit code 7."),
        ("nonsense", "The process of tool `fail`"),
    ],
)
def test_a_crash_is_an_error_result_and_the_next_call_runs(executor, how, text):
    result = call(executor, process_tools.fail, how=how)
    assert (result.is_error, result.error_type) == (True, "error")
    assert result.content["error"].startswith(text)
    assert call(executor, process_tools.where).content[1] == 1
    assert executor.abandoned == 0


@pytest.mark.parametrize(
    ("how", "again"), [("type", True), ("thread", False), ("SystemExit", False), ("MemoryError", False)]
)
def test_a_process_is_reused_only_after_ordinary_exceptions(executor, how, again):
    tool = tool_of(process_tools.fail)
    submit(executor, tool, how=how).result(timeout=30)
    assert len(executor._processes._idle) == again


def test_a_process_that_died_between_calls_is_replaced(executor):
    tool = tool_of(process_tools.where)
    first = submit(executor, tool).result(timeout=30).content[0]
    os.kill(first, signal.SIGKILL)
    [process] = executor._processes._idle
    wait_until(lambda: not process.alive)
    second = submit(executor, tool).result(timeout=30)
    assert not second.is_error and second.content == [second.content[0], 1] != [first, 1]


def test_a_reward_that_is_not_a_number_fails_the_call(executor):
    result = call(executor, process_tools.overpay)
    assert result.is_error and result.content["error"].startswith("The tool gave the reward 'much'")


def test_a_process_started_for_a_retry_after_the_limit_ends():
    executor = ToolExecutor(timeout=0.3, retries=1)
    taken, take = [], executor._processes._take

    def slow(tool):
        if taken:
            wait_until(lambda: result.done())
        taken.append(take(tool))
        return taken[-1]

    executor._processes._take = slow
    result = submit(executor, tool_of(process_tools.busy_then_hang))
    assert result.result(timeout=30).error_type == "timeout"
    wait_until(lambda: len(taken) == 2 and not taken[1].alive)
    wait_until(lambda: not executor.stuck)
    executor.shutdown()


def test_transient_failures_are_retried():
    executor = ToolExecutor(retries=2)
    result = call(executor, process_tools.fail, how="transient")
    executor.shutdown()
    assert result.transient and result.content == {"error": "busy"}


# Time limits


def test_a_call_past_its_limit_is_killed_with_its_descendants(executor, tmp_path):
    path = tmp_path / "ids"
    tool = tool_of(process_tools.hang, timeout=1.0)
    result = submit(executor, tool, path=str(path)).result(timeout=30)
    assert (result.error_type, 0.9 < result.seconds < 3.0) == ("timeout", True)
    assert result.content == {"error": "Tool `hang` did not return within 1 seconds."}
    processes = [int(word) for word in path.read_text().split()]
    wait_until(lambda: not any(map(alive, processes)))
    wait_until(lambda: not executor._processes._all)
    assert (executor.abandoned, len(executor.stuck)) == (0, 0), "its thread is free again"


def test_the_limit_of_an_earlier_call_does_not_kill_the_next(executor):
    """The process of a call that returned in time may serve another when the first one's limit comes."""
    tool = tool_of(process_tools.where, timeout=0.6)
    first = submit(executor, tool, seconds=0.3)
    assert first.result(timeout=30).content[1] == 1
    assert submit(executor, tool, seconds=0.45).result(timeout=30).content[1] == 2


def test_the_limit_does_not_count_the_start_of_a_process(executor, monkeypatch):
    start = executor._processes._take

    def slow(tool):
        time.sleep(0.3)
        return start(tool)

    monkeypatch.setattr(executor._processes, "_take", slow)
    result = submit(executor, tool_of(process_tools.where, timeout=0.25)).result(timeout=30)
    assert not result.is_error and result.seconds < 0.25


# Ends


def test_shutdown_ends_busy_and_idle_processes(tmp_path):
    executor = ToolExecutor()
    idle = call(executor, process_tools.where).content[0]
    path = tmp_path / "ids"
    running = submit(executor, tool_of(process_tools.hang), path=str(path))
    wait_until(path.exists)
    busy = [int(word) for word in path.read_text().split()]
    executor.shutdown()
    assert running.result(timeout=10).is_error
    wait_until(lambda: not any(map(alive, [idle, *busy])))
    with pytest.raises(ToolRuntimeError):
        call(executor, process_tools.where)


RUN = """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import importlib, types
    for name in ("trl_toolgrpo", "trl_toolgrpo.tools"):  # without its heavy imports
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [name.replace(".", "/")]
    execute = importlib.import_module("trl_toolgrpo.tools.runtime.executor")
    records = importlib.import_module("trl_toolgrpo.tools.tool")
    import process_tools
    executor = execute.ToolExecutor()
    schema = {"type": "object", "properties": {}}
    def submit(function, **arguments):
        tool = records.Tool("t", "d", schema, function, isolation="process")
        return executor.submit(records.ToolCall("c", "t", arguments), tool)
    print(submit(process_tools.where).result(20).content[0], flush=True)
    submit(process_tools.hang, path=sys.argv[2])
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux finds what has left its process group")
def test_processes_end_with_a_run_that_is_killed(tmp_path):
    here, path = Path(__file__).parents[2], tmp_path / "ids"
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(here), str(path)]
    with subprocess.Popen(command, cwd=here.parent, stdout=subprocess.PIPE) as run:
        idle = int(run.stdout.readline())
        wait_until(path.exists)
        processes = [idle, *map(int, path.read_text().split())]
        assert all(map(alive, processes))
        run.kill()
    wait_until(lambda: not any(map(alive, processes)))


# Refusals


def inner():
    def function():
        return 1

    return function


@pytest.mark.parametrize(
    ("function", "reason"), [(lambda: 1, "lambda"), (inner(), "local"), (process_tools.Unsendable(), "lock")]
)
def test_a_function_that_cannot_be_pickled_is_refused(function, reason):
    with pytest.raises(ToolSchemaError, match=rf"'t' cannot run with isolation='process': .*{reason}.*top level"):
        Tool("t", "d", ANY, function, isolation="process")


def test_a_function_of_the_main_script_is_refused(monkeypatch):
    def function():
        return 1

    function.__module__, function.__qualname__ = "__main__", "function"
    monkeypatch.setattr(sys.modules["__main__"], "function", function, raising=False)
    with pytest.raises(ToolSchemaError, match="defined in the main script"):
        Tool("t", "d", ANY, function, isolation="process")
    assert Tool("t", "d", ANY, function).isolation == "thread"


def test_an_unknown_isolation_is_refused():
    with pytest.raises(ToolSchemaError, match="isolation='container'"):
        Tool("t", "d", ANY, print, isolation="container")


def test_a_function_that_cannot_be_loaded_is_found_at_construction(tmp_path, tokenizer):
    tool = Tool("t", "d", ANY, process_tools.Broken(), isolation="process")
    with pytest.raises(ToolSchemaError, match=r"'t' .*cannot be loaded .*ImportError: no such device"):
        ToolGRPOTrainer(
            tiny_model(tokenizer), print, config(tmp_path), prompts(), processing_class=tokenizer, tools=[tool]
        )


def test_process_isolation_is_refused_for_tools_of_an_environment():
    class Environment:
        tools = [Tool("t", "d", ANY, process_tools.where, isolation="process")]  # noqa: RUF012

    with pytest.raises(ToolSchemaError, match=r"Environment has the tool 't' with isolation='process'.*own thread"):
        environment_tools(Environment())


def test_calls_in_processes_leave_no_thread(executor):
    before = threading.active_count()
    call(executor, process_tools.fail, how="segfault")
    call(executor, process_tools.where)
    assert threading.active_count() <= before + 2  # a worker and the dispatcher


def many(count):
    schema = {"type": "object", "properties": {}, "additionalProperties": True}
    functions = [functools.partial(process_tools.echo, value=index) for index in range(count)]
    return [Tool(f"tool_{i}", "d", schema, f, isolation="process") for i, f in enumerate(functions)]


def test_250_tools_start_at_most_eight_processes():
    tools = many(250)
    executor = ToolExecutor(max_concurrent=4, warm=tools)
    try:
        assert len(executor._processes._all) <= 8
        called = [*range(0, 250, 25), 249, 0]
        futures = [executor.submit(ToolCall("c", f"tool_{index}", {}), tools[index]) for index in called]
        assert [future.result(timeout=60).content for future in futures] == called
        assert len(executor._processes._all) <= 8
    finally:
        executor.shutdown()


def test_one_of_many_tools_that_cannot_be_loaded_is_named(monkeypatch):
    monkeypatch.setattr("trl_toolgrpo.tools.runtime.process_pool._MOST_WARM", 1)
    tools = [*many(3), Tool("broken", "d", {"type": "object"}, process_tools.Unloadable(), isolation="process")]
    with pytest.raises(ToolSchemaError, match=r"'broken'.*cannot be loaded.*no such device"):
        ToolExecutor(warm=tools).shutdown()


def test_concurrent_crashes_are_all_answered(executor):
    tool = tool_of(process_tools.fail)
    futures = [submit(executor, tool, how=how) for how in ["segfault", "_exit"] * 6]
    texts = [future.result(timeout=60).content["error"] for future in futures]
    ends = ("was ended by signal 11", "ended with exit code 7")
    assert texts == [f"The process of tool `fail` {end}." for end in ends] * 6
    assert not call(executor, process_tools.echo, value=1).is_error

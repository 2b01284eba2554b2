"""Faults of tools in a running training: each survived, with the right trajectory, the right text and the right count.

One training has them all at once: each rollout of a step calls tools that fail, and between them one that works.
"""

import asyncio
import json
import math
import threading
import time

import process_tools
import pytest
from conftest import chat_tokenizer, config, prompts, scripted_model_sampler, tiny_model, tool_call
from families import ALL, family

from trl_toolgrpo import Tool, ToolGRPOTrainer, ToolRuntimeError, TransientToolError
from trl_toolgrpo.chat.tool_chat import TRUNCATION_MARKER


END = "<|im_end|>"
ANY = {"type": "object", "properties": {}}
LIMIT = 80


class Training:
    """A few optimizer steps of a real trainer, each on rollouts of its own, the text of which is given."""

    def __init__(self, monkeypatch, path, tools, script, tokenizer=None, **changes):
        tokenizer = tokenizer or chat_tokenizer("qwen3")
        self.trajectories, self.texts = [], []
        options = {"max_completion_length": 2000, "max_steps": 2, "max_tool_output_tokens": LIMIT, "tool_timeout": 5.0}
        self.trainer = ToolGRPOTrainer(
            tiny_model(tokenizer),
            self._reward,
            config(path, **{**options, **changes}),
            prompts(),
            processing_class=tokenizer,
            tools=tools,
        )
        scripted_model_sampler(monkeypatch, tokenizer, script)

    def _reward(self, completions, trajectories, **kwargs):
        self.trajectories += trajectories
        self.texts += [[m["content"] for m in completion if m["role"] == "tool"] for completion in completions]
        return [float(index % 3) for index in range(len(completions))]

    def run(self):
        self.trainer.train()
        return self

    @property
    def logs(self):
        return [log for log in self.trainer.state.log_history if "ratio/mean" in log]


def raiser(error):
    def fail():
        raise error

    return fail


class Strange:
    def __str__(self):
        raise RuntimeError("no text")


def error(text):
    return json.dumps({"error": text}, ensure_ascii=False)


TEN = [name for name in ALL if "_v" not in name and name != "qwen3"][:10]
VOCABULARIES = {name: sorted(t for t in family(name).tokenizer.get_added_vocab() if t.strip()) for name in TEN}
LARGE = "y" * 50_000_000
CUT = TRUNCATION_MARKER.format(limit=LIMIT)

# What a function or a coroutine does, the text the policy reads, the type of the error
ACTS = {
    "raise": (raiser(ValueError("bad")), error("bad"), "error"),
    "exit": (raiser(SystemExit(2)), error("SystemExit: 2"), "error"),
    "cancel": (raiser(asyncio.CancelledError()), error("CancelledError"), "error"),
    "interrupt": (raiser(KeyboardInterrupt()), error("KeyboardInterrupt"), "error"),
    "flood": (lambda: LARGE, CUT, None),
    "object": (lambda: {"at": ValueError, (1): {2}}, json.dumps({"at": str(ValueError), "1": [2]}), None),
    "textless": (lambda: [Strange()], '["<Strange>"]', None),
    "nan": (lambda: {"x": math.nan, "y": -math.inf}, '{"x": NaN, "y": -Infinity}', None),
    "surrogate": (lambda: "a \ud800 b \udfff", "a \ufffd b \ufffd", None),
    "raise surrogate": (raiser(ValueError("a \ud800")), error("a \ufffd"), "error"),
    "busy": (raiser(TransientToolError("busy")), error("busy"), "error"),
    **{name: (lambda name=name: "".join(VOCABULARIES[name]) + END, None, None) for name in TEN},
}


def work(act):
    return ACTS[act][0]()


async def work_later(act):
    return ACTS[act][0]()


def hang(act):
    time.sleep(0.4)


async def hang_later(act):
    await asyncio.sleep(5)


def late(name):
    return error(f"Tool `{name}` did not return within 0.1 seconds.")


_ENDED = "The process of tool `process`"
FAULTS = {
    **{("work", act): (text, kind) for act, (_, text, kind) in ACTS.items()},
    **{("later", act): (ACTS[act][1], ACTS[act][2]) for act in ("raise", "exit", "cancel", "interrupt", "nan")},
    ("hang", "x"): (late("hang"), "timeout"),
    ("hang_later", "x"): (late("hang_later"), "timeout"),
    ("process_hang", "hang"): (late("process_hang"), "timeout"),
    ("process", "crash"): (error(f"{_ENDED} was ended by signal 11."), "error"),
    ("process", "leave"): (error(f"{_ENDED} ended with exit code 7."), "error"),
    ("process", "flood"): (CUT, None),
}
TOOLS = [
    Tool("work", "d", ANY, work),
    Tool("later", "d", ANY, work_later),
    Tool("hang", "d", ANY, hang, timeout=0.1),
    Tool("hang_later", "d", ANY, hang_later, timeout=0.1),
    Tool("process", "d", ANY, process_tools.act, isolation="process"),
    Tool("process_hang", "d", ANY, process_tools.act, isolation="process", timeout=0.1),
    Tool("fine", "d", ANY, lambda: "fine"),
]
ROWS = [list(FAULTS)[start : start + 3] for start in range(0, len(FAULTS), 3)]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """All faults in two steps of one training; the vocabulary holds the control tokens of all families."""
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.add_tokens(sorted({text for names in VOCABULARIES.values() for text in names}))
    script = []
    for row in ROWS:
        calls = [tool_call(name, act=act) for name, act in row]
        script.append([calls[0] + tool_call("fine") + "".join(calls[1:]) + END, f"done{END}"])
    changes = {"per_device_train_batch_size": len(ROWS), "num_generations": len(ROWS)}
    with pytest.MonkeyPatch.context() as patch:
        return Training(patch, tmp_path_factory.mktemp("faults"), TOOLS, script, tokenizer, **changes).run()


def test_there_are_ten_families_of_chat_templates():
    assert len(TEN) == 10 and all(len(names) > 3 for names in VOCABULARIES.values())


@pytest.mark.parametrize("fault", FAULTS, ids="-".join)
def test_training_survives_each_fault_of_a_tool(training, fault):
    text, kind = FAULTS[fault]
    row = next(row for row, faults in enumerate(ROWS) if fault in faults)
    place = (0, 2, 3)[list(ROWS[row]).index(fault)]
    assert len(training.trajectories) == 2 * len(ROWS) and len(training.logs) == 2
    for step in range(2):
        turn = training.trajectories[step * len(ROWS) + row].turns[0]
        texts = training.texts[step * len(ROWS) + row]
        call, result = turn.tool_calls[place], turn.tool_results[place]
        assert (call.name, call.arguments) == (fault[0], {"act": fault[1]})
        assert (result.is_error, result.error_type) == (kind is not None, kind)
        assert result.truncated == (CUT in texts[place])
        before, _, after = texts[place].partition(CUT)
        if text is None:  # control tokens: as they were written, up to the limit
            whole = "".join(VOCABULARIES[fault[1]]) + END
            assert result.content == whole and (whole.startswith(before) if result.truncated else whole == before)
            assert whole.endswith(after)
        elif text == CUT:
            letter = "y" if fault[0] == "work" else "x"
            assert result.truncated and set(before) == set(after) == {letter}
        else:
            assert texts[place] == text
        assert texts[1] == "fine"
        assert 0.1 <= result.seconds < 3.0 if kind == "timeout" else result.seconds < 5.0


def test_trajectories_and_metrics_of_a_training_with_every_fault(training):
    added = set(training.trainer._tokenizer.get_added_vocab().values())
    between = set()
    for trajectory in training.trajectories:
        trajectory.validate(0)
        assert (trajectory.stop_reason, len(trajectory.turns)) == ("stop", 2)
        given = zip(trajectory.completion_ids, trajectory.tool_mask, strict=True)
        between.add((len(trajectory.turns[0].tool_calls), *(id for id, mine in given if not mine and id in added)))
    assert len(between) == len({count for count, *_ in between}), "control tokens are those of the template alone"
    for step, log in enumerate(training.logs):
        turns = [t.turns[0] for t in training.trajectories[step * len(ROWS) : (step + 1) * len(ROWS)]]
        done = [pair for turn in turns for pair in zip(turn.tool_calls, turn.tool_results, strict=True)]
        for tool in TOOLS[:-1]:
            kinds = [kind for (name, _), (_, kind) in FAULTS.items() if name == tool.name]
            expected = {
                "calls": len(kinds),
                "errors": sum(kind is not None for kind in kinds),
                "timeouts": kinds.count("timeout"),
                "truncated": sum(result.truncated for call, result in done if call.name == tool.name),
            }
            assert {name: log[f"tools/{tool.name}/{name}"] for name in expected} == expected
        failed = sum(kind is not None for _, kind in FAULTS.values())
        assert (log["tools/fine/calls"], log["tools/fine/errors"]) == (len(ROWS), 0)
        assert log["tools/call_frequency"] == pytest.approx(1 + len(FAULTS) / len(ROWS))
        assert log["tools/failure_frequency"] == pytest.approx(failed / (len(ROWS) + len(FAULTS)))
        assert log["tools/malformed_calls"] == log["tools/unknown_calls"] == 0
        assert log["ratio/mean"] == pytest.approx(1.0, abs=1e-3) and math.isfinite(log["grad_norm"])
        assert log["rollout/stop/stop"] == 1.0
    assert sum(log["tools/abandoned"] for log in training.logs) == 2, "a function on a thread cannot be ended"


def test_tool_retries_of_the_configuration_are_used(monkeypatch, tmp_path):
    seen = []

    def flaky():
        seen.append(1)
        if len(seen) % 3:
            raise TransientToolError("busy")
        return "done"

    tool = Tool("t", "d", ANY, flaky, thread_safe=False)
    script = [[tool_call("t") + END, f"ok{END}"]] * 4
    training = Training(monkeypatch, tmp_path, [tool], script, tool_retries=2, max_steps=1).run()
    assert training.texts == [["done"]] * 4 and len(seen) == 12
    assert training.logs[0]["tools/t/errors"] == 0


def test_latency_metrics_are_quantiles_of_the_call_times(monkeypatch, tmp_path):
    naps = iter([0.02, 0.02, 0.02, 0.2])
    tool = Tool("t", "d", ANY, lambda: time.sleep(next(naps)))
    script = [[tool_call("t") + END, f"ok{END}"]] * 4
    training = Training(monkeypatch, tmp_path, [tool], script, max_steps=1).run()
    seconds = sorted(t.turns[0].tool_results[0].seconds for t in training.trajectories)
    assert training.logs[0]["tools/t/latency_p50"] == pytest.approx((seconds[1] + seconds[2]) / 2)
    assert training.logs[0]["tools/t/latency_p95"] == pytest.approx(seconds[2] + 0.85 * (seconds[3] - seconds[2]))
    assert seconds[0] < 0.19 < seconds[3]


def test_too_many_calls_that_cannot_be_ended_stop_the_training(monkeypatch, tmp_path):
    gate = threading.Event()
    tool = Tool("sleepy", "d", ANY, lambda: gate.wait(30))
    script = [[tool_call("sleepy") * 2 + END, tool_call("sleepy") + END, f"ok{END}"]] * 4
    training = Training(monkeypatch, tmp_path, [tool], script, tool_timeout=0.05)
    assert training.trainer.rollouts.tools.executor.max_abandoned == 64
    training.trainer.rollouts.tools.executor.max_abandoned = 7
    words = r"8 tool calls are stuck.*max_abandoned=7.*sleepy.*isolation='process'"
    with pytest.raises(ToolRuntimeError, match=words):
        training.run()
    gate.set()

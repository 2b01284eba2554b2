"""Logs, trackers, the terminal and the model card only report on a run: a failure is logged once, and ends nothing."""

import io
import json
import logging
import sys

import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, scripted_model_sampler, tiny_model, tool_call
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback

from trl_toolgrpo import ToolGRPOTrainer, Trajectory, read_rollouts
from trl_toolgrpo.monitoring.progress_bar import RolloutProgress
from trl_toolgrpo.run_folder import rollout_log
from trl_toolgrpo.run_folder import writer as run_log
from trl_toolgrpo.run_folder.log_failures import LogFailures


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")
SCRIPT = [[tool_call("add", a=row, b=1) + "<|im_end|>", f"the sum is {row}<|im_end|>"] for row in range(4)]


def varied(completion_ids, **kwargs):
    return [float(index) for index, _ in enumerate(completion_ids)]


def start(path, monkeypatch, rewards=varied, callbacks=None, **changes):
    scripted_model_sampler(monkeypatch, TOKENIZER, SCRIPT)
    options = {"max_completion_length": 200, "max_steps": 3, **changes}
    torch.manual_seed(0)
    return ToolGRPOTrainer(
        tiny_model(TOKENIZER), rewards, config(path, **options), prompts(), processing_class=TOKENIZER, tools=[add],
        callbacks=callbacks,
    )  # fmt: skip


def fail(*args, **kwargs):
    raise RuntimeError("it broke")


def refuse(*args, **kwargs):
    raise ConnectionError("no network")


def said(caplog, words):
    return [record for record in caplog.records if words in record.getMessage()]


class Broken(TensorBoardCallback):
    """A tracker that fails in some events."""

    events = ()
    error = staticmethod(fail)

    def __init__(self):
        super().__init__()
        self.called = []
        for event in ("on_train_begin", "on_log", "on_save", "on_evaluate", "on_train_end", "on_step_end"):
            setattr(type(self), event, self._event(event))

    @staticmethod
    def _event(event):
        def method(self, *args, **kwargs):
            self.called.append(event)
            if event in self.events:
                self.error()

        return method


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_evaluate", "on_train_end", "on_step_end"])
@pytest.mark.parametrize("error", [fail, refuse])
@pytest.mark.parametrize("later", [False, True])
def test_a_tracker_that_fails_ends_no_run(event, error, later, tmp_path, monkeypatch, caplog):
    class Own(Broken):
        events = (event,)

    Own.error = staticmethod(error)
    tracker = Own()
    trainer = start(tmp_path, monkeypatch, callbacks=None if later else [tracker])
    if later:
        trainer.add_callback(tracker)
    trainer.train()
    if event == "on_evaluate":
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, {})
    assert trainer.state.global_step == 3
    (record,) = said(caplog, f"Own failed in `{event}`")
    assert "the run goes on" in record.getMessage()
    assert (record.exc_info is not None) == (error is fail), "a bug is seen with its traceback"
    if event == "on_train_begin":
        assert tracker.called == ["on_train_begin"], "a tracker that cannot begin is not asked again"
    if event == "on_log":
        assert tracker.called.count("on_log") > 3, "a tracker that fails once is asked again"


def test_a_tracker_that_begins_to_fail_later_ends_no_run(tmp_path, monkeypatch, caplog):
    class Later(Broken):
        pass

    trainer = start(tmp_path, monkeypatch, callbacks=[Later()])
    monkeypatch.setattr(Later, "on_log", refuse)
    trainer.train()
    assert trainer.state.global_step == 3 and len(said(caplog, "Later failed in `on_log`")) == 1


def test_a_muted_tracker_is_called_again_in_the_next_run(tmp_path, monkeypatch):
    class Once(Broken):
        events = ("on_train_begin",)

    tracker = Once()
    trainer = start(tmp_path, monkeypatch, callbacks=[tracker], max_steps=1)
    trainer.train()
    Once.events = ()
    trainer.train()
    assert "on_log" in tracker.called


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_step_end", "on_save"])
def test_a_callback_of_a_user_ends_the_run(event, tmp_path, monkeypatch):
    own = type("Own", (TrainerCallback,), {event: fail})
    options = {"save_strategy": "steps", "save_steps": 1, "log_completions": True}
    trainer = start(tmp_path, monkeypatch, callbacks=[own()], **options)
    with pytest.raises(RuntimeError, match="it broke"):
        trainer.train()


def test_ctrl_c_in_a_tracker_ends_the_run(tmp_path, monkeypatch):
    class Stopped(Broken):
        events = ("on_log",)

    def interrupt():
        raise KeyboardInterrupt

    Stopped.error = staticmethod(interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, monkeypatch, callbacks=[Stopped()]).train()


@pytest.mark.parametrize("kind", [PrinterCallback, RolloutProgress, TrackioCallback])
def test_reporting_callbacks_are_guarded_once(kind):
    callback, failures = kind(), LogFailures()
    failures.guard(callback)
    first = callback.on_log
    failures.guard(callback)
    assert callback.on_log is first and isinstance(callback, kind)
    plain = TrainerCallback()
    failures.guard(plain)
    assert not vars(plain)


@pytest.mark.parametrize("encoding", ["ascii", "closed"])
def test_a_terminal_that_takes_no_text_ends_no_run(encoding, tmp_path, monkeypatch, caplog):
    """`±` in ASCII, or a pipe whose reader is gone."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    trainer = start(tmp_path, monkeypatch, log_completions=True)
    if encoding == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    trainer.train()
    monkeypatch.undo()
    assert trainer.state.global_step == 3
    assert len(said(caplog, "The line of a step could not be printed")) == 1


@pytest.mark.parametrize("broken", ["tabulate", "write", "with_ratios"])
def test_a_rollout_log_that_fails_ends_no_run(broken, tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path, monkeypatch, save_strategy="steps", save_steps=1, gradient_accumulation_steps=1)
    monkeypatch.setattr(run_log, broken, fail)
    if broken == "write":
        monkeypatch.setattr(run_log, "write", refuse)
    trainer.train()
    assert trainer.state.global_step == 3
    words = "No rollouts are logged any more" if broken == "write" else "A rollout batch could not be logged"
    assert len(said(caplog, words)) == 1


def test_one_batch_that_cannot_be_logged_leaves_the_others(tmp_path, monkeypatch, caplog):
    trainer, tabulate, calls = start(tmp_path, monkeypatch), rollout_log.tabulate, []

    def second_fails(*args):
        calls.append(args)
        return fail() if len(calls) == 2 else tabulate(*args)

    monkeypatch.setattr(run_log, "tabulate", second_fails)
    trainer.train()
    assert {row["step"] for row in read_rollouts(tmp_path)} == {0, 2}


def test_a_reward_error_is_raised_although_the_log_fails_too(tmp_path, monkeypatch):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise KeyError("the reward's own")
        return [0.0, 1.0] * (len(completions) // 2)

    trainer = start(tmp_path, monkeypatch, reward)
    monkeypatch.setattr(run_log, "tabulate", fail)
    with pytest.raises(KeyError, match="the reward's own"):
        trainer.train()


def test_metrics_that_json_cannot_hold_do_not_end_the_run(tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path, monkeypatch)
    log = ToolGRPOTrainer.log
    odd = {"half": "\ud83d", "object": object(), "cycle": (cycle := {})}
    cycle["self"] = cycle

    def add_odd(self, logs, start_time=None):
        log(self, {**logs, **odd}, start_time)

    monkeypatch.setattr(ToolGRPOTrainer, "log", add_odd)
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(said(caplog, "A line could not be added to metrics.jsonl")) == 1
    del odd["cycle"]
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and lines[0]["half"] == "\N{REPLACEMENT CHARACTER}"


def test_a_health_rule_that_fails_ends_no_run(tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path, monkeypatch)
    monkeypatch.setattr("trl_toolgrpo.monitoring.health.monitor.HealthMonitor.step", fail)
    trainer.train()
    (record,) = said(caplog, "The health rules could not be run")
    assert trainer.state.global_step == 3 and record.exc_info


@pytest.mark.parametrize("error", [fail, refuse])
def test_a_model_card_that_cannot_be_written_ends_no_run(error, tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path, monkeypatch, save_strategy="steps", save_steps=1)
    monkeypatch.setattr("trl_toolgrpo.hub.model_card.ModelCard.load", error)
    trainer.train()
    trainer.create_model_card()
    assert trainer.state.global_step == 3 and (tmp_path / "checkpoint-3").is_dir()
    assert len(said(caplog, "The model card could not be written")) == 1


@pytest.mark.parametrize("broken", ["log", "alert", "Trace", "init", "Table"])
def test_a_tracker_of_conversations_that_fails_ends_no_run(broken, tmp_path, monkeypatch, caplog):
    trackio = pytest.importorskip("trackio")
    options = {"report_to": "trackio", "project": f"broken-{broken}", "run_name": "tiny", "trackio_space_id": None}
    options |= {"log_completions": True, "log_unique_prompts": True}
    constant = lambda completions, **kwargs: [0.25] * len(completions)  # noqa: E731
    trainer = start(tmp_path, monkeypatch, constant, max_steps=4, **options)
    monkeypatch.setattr(trackio, broken, fail)
    trainer.train()
    assert trainer.state.global_step == 4 and said(caplog, "the run goes on")
    assert len(list((tmp_path / "completions").glob("*.parquet"))) == 4


def test_log_records_hold_no_secret(tmp_path, monkeypatch, caplog):
    """Neither what a tracker says, nor its traceback, nor what a reward function logs."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-hush-123456")

    class Own(Broken):
        events = ("on_log", "on_evaluate")

        @staticmethod
        def error():
            raise RuntimeError("401 for sk-hush-123456")

    def rewards(completion_ids, log_metric, log_extra, **kwargs):
        log_metric("judge", "sk-hush-123456")
        log_extra("judge", "sk-hush-123456")
        return varied(completion_ids)

    trainer = start(tmp_path, monkeypatch, rewards, callbacks=[Own()])
    formatter = logging.Formatter()
    trainer.train()
    lines = "\n".join(formatter.format(record) for record in caplog.records)
    assert "sk-hush" not in lines and "401 for [secret]" in lines and "Traceback" in lines
    assert lines.count("[secret]") >= 4


def test_a_rollout_without_a_score_is_logged_in_a_few_words(tmp_path, monkeypatch, caplog):
    def reward(completions, **kwargs):
        return [None, *map(float, range(1, len(completions)))]

    start(tmp_path, monkeypatch, reward, max_steps=1).train()
    (record,) = said(caplog, "returned None")
    message = record.getMessage()
    assert "Trajectory(" in message and "completion tokens, 2 turns, stop_reason='stop')" in message
    assert "logprobs" not in message and "tool_mask" not in message and len(message) < 2000


def test_a_trajectory_is_shown_in_a_line():
    count = 10_000
    ids, zeros = list(range(count)), [0.0] * count
    shown = repr(Trajectory([1, 2], ids, zeros, [1] * count, [0] * count, [], "length"))
    assert shown == "Trajectory(2 prompt tokens, 10000 completion tokens, 0 turns, stop_reason='length')"
    assert repr(Trajectory(None, 3, [], [], [], [], "x")) == (
        "Trajectory(None prompt tokens, 3 completion tokens, 0 turns, stop_reason='x')"
    )

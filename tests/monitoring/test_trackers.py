"""What is shown while a run goes on: trackers with conversations and alerts, progress on a terminal, none without."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, scripted_model_sampler, tiny_model, tool_call
from transformers import PrinterCallback, ProgressCallback

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.monitoring import progress as progress_module
from trl_toolgrpo.monitoring.progress_bar import RolloutProgress, on_a_terminal
from trl_toolgrpo.monitoring.trackers.reports import extreme_rows


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")
SCRIPT = [[tool_call("add", a=row, b=1) + "<|im_end|>", f"the sum is {row}<|im_end|>"] for row in range(8)]


def varied(completion_ids, **kwargs):
    return [float(index) for index, _ in enumerate(completion_ids)]


def constant(completion_ids, **kwargs):
    return [0.0] * len(completion_ids)


def start(path, monkeypatch, rewards=varied, **changes):
    scripted_model_sampler(monkeypatch, TOKENIZER, SCRIPT)
    options = {"per_device_train_batch_size": 8, "max_completion_length": 200, "max_steps": 4, **changes}
    torch.manual_seed(0)
    return ToolGRPOTrainer(
        tiny_model(TOKENIZER), rewards, config(path, **options), prompts(), processing_class=TOKENIZER, tools=[add]
    )


def test_trackio_gets_metrics_conversations_and_alerts(monkeypatch, tmp_path):
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    options = {"report_to": "trackio", "project": "tools", "run_name": "tiny", "trackio_space_id": None}
    trainer = start(tmp_path / "out", monkeypatch, constant, **options)
    trainer.train()
    logs = storage.get_logs("tools", "tiny")
    shown = {name for entry in logs for name in entry}
    logged = {name for entry in trainer.state.log_history if "loss" in entry for name in entry} - {"step"}
    assert {f"train/{name}" for name in logged} <= shown
    traces = storage.get_traces("tools", "tiny")
    assert len(traces) == 4 * 4 and {trace["metadata"]["step"] for trace in traces} == {0, 1, 2, 3}
    roles = [message["role"] for message in traces[0]["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert traces[0]["messages"][1]["tool_calls"][0]["function"]["name"] == "add"
    assert traces[0]["metadata"]["reward"] == 0.0 and traces[0]["metadata"]["stop_reason"] == "stop"
    alerts = storage.get_alerts("tools", "tiny")
    assert [(alert["title"], alert["level"]) for alert in alerts] == [("advantages_zero", "warn")]
    assert "In no group of the last 3 rollout batches" in alerts[0]["text"]


def test_tensorboard_gets_conversations_and_faults_as_text(monkeypatch, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    start(tmp_path, monkeypatch, constant, report_to="tensorboard").train()
    events = accumulator.EventAccumulator(str(tmp_path / "board"), size_guidance={"tensors": 0})
    events.Reload()
    texts = {
        tag: [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }
    assert len(texts["conversations/text_summary"]) == 16 and "the sum is" in texts["conversations/text_summary"][0]
    assert texts["health/text_summary"][0].startswith("```\nadvantages_zero: In no group")
    assert "train/ratio/mean" in events.Tags()["scalars"]


def test_the_best_and_the_worst_rollouts_are_shown(monkeypatch, tmp_path):
    trainer = start(tmp_path, monkeypatch, max_steps=1)
    assert extreme_rows([0.5, 3.0, float("nan"), 1.0, -1.0, 2.0]) == [2, 4, 5, 1]
    assert extreme_rows([1.0, 0.0]) == [1, 0]
    trainer.train()
    assert not trainer.records.trackers._conversations  # nobody looks


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_has_phases_speed_and_time_left(monkeypatch, tmp_path):
    from rich.console import Console

    screen = Terminal()
    monkeypatch.setattr(progress_module, "on_a_terminal", lambda: True)
    progress = RolloutProgress(Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(progress_module, "RolloutProgress", lambda: progress)
    trainer = start(tmp_path, monkeypatch, disable_tqdm=False)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert RolloutProgress in kinds and ProgressCallback not in kinds
    phases, show = [], progress._update
    monkeypatch.setattr(progress, "_update", lambda **changes: (phases.append(changes), show(**changes)))
    trainer.train()
    assert phases[:3] == [{"description": "rollout"}, {"description": "update "}, {"completed": 1}]
    drawn = screen.getvalue()
    assert "4/4" in drawn and "tokens/s" in drawn and "0:00:" in drawn


def test_progress_stops_when_training_fails(monkeypatch, tmp_path):
    def failing(completion_ids, **kwargs):
        raise RuntimeError("the judge is gone")

    progress = RolloutProgress(SimpleNamespace())
    monkeypatch.setattr(progress_module, "on_a_terminal", lambda: True)
    monkeypatch.setattr(progress_module, "RolloutProgress", lambda: progress)
    bar = SimpleNamespace(stopped=False, update=lambda *a, **k: None)
    bar.stop = lambda: setattr(bar, "stopped", True)
    monkeypatch.setattr(progress, "on_train_begin", lambda *a, **k: setattr(progress, "_bar", bar))
    trainer = start(tmp_path, monkeypatch, failing, disable_tqdm=False)
    with pytest.raises(RuntimeError, match="the judge is gone"):
        trainer.train()
    assert bar.stopped and progress._bar is None


def test_without_a_terminal_nothing_is_drawn(monkeypatch, tmp_path, capfd):
    trainer = start(tmp_path, monkeypatch, disable_tqdm=False, max_steps=2)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert PrinterCallback in kinds and not {RolloutProgress, ProgressCallback} & set(kinds)
    capfd.readouterr()
    trainer.train()
    out, err = capfd.readouterr()
    assert out.count("ratio 1.000±0.000 | forced 0.0%") == 2 and out.count("'loss'") == 2
    assert "it/s" not in err and "\r" not in err
    assert not on_a_terminal()
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert on_a_terminal()

"""Parts that report on a run, without a trainer: metrics carried from step to step, and the health rules."""

import math
from types import SimpleNamespace

import pytest
import torch
from bare_run import bare_run
from conftest import chat_tokenizer

from trl_toolgrpo import HealthError
from trl_toolgrpo.checkpoints.folder import PREFIX
from trl_toolgrpo.errors import CheckpointSaveError
from trl_toolgrpo.monitoring.health.watch import HealthWatch
from trl_toolgrpo.monitoring.records import CarriedMetrics
from trl_toolgrpo.run_folder.files import add_line
from trl_toolgrpo.run_folder.log_failures import LogFailures


TOKENIZER = chat_tokenizer()


# Carried metrics


def test_steps_that_reuse_a_batch_log_its_metrics_again(tmp_path):
    run = bare_run(tmp_path, TOKENIZER)
    carried, metrics = CarriedMetrics(run), run.training_metrics
    metrics["forced/fraction"].append(0.5)
    metrics["tools/call_frequency"].append(1.5)
    for batch in (0.5, 0.5, 0.25):
        metrics["forced/fraction"][-1:] = [batch]
        carried.before_loss()
    carried.before_log()
    assert metrics["forced/fraction"] == [0.5, 0.5, 0.25], "one for each micro-batch, whatever its rollout batch"
    metrics.clear()
    assert carried.with_carried({"loss": 1.0}) == {"forced/fraction": 0.25, "tools/call_frequency": 1.5, "loss": 1.0}
    assert carried.with_carried({"forced/fraction": 0.0})["forced/fraction"] == 0.0


def test_carried_metrics_go_on_after_a_checkpoint(tmp_path):
    run = bare_run(tmp_path, TOKENIZER)
    carried = CarriedMetrics(run)
    run.training_metrics["forced/fraction"].append(0.5)
    carried.before_loss()
    state = carried.state_dict()
    carried.before_loss()
    assert state == {"of_batch": {"forced/fraction": 0.5}, "forced": [0.5]}, "a state does not follow the run"
    resumed = CarriedMetrics(bare_run(tmp_path, TOKENIZER))
    resumed.load_state_dict(state)
    resumed.before_loss()
    assert resumed.state_dict() == carried.state_dict()


def test_a_run_without_forcing_logs_no_share_of_it(tmp_path):
    run = bare_run(tmp_path, TOKENIZER)
    carried = CarriedMetrics(run)
    carried.before_loss()
    carried.before_log()
    assert "forced/fraction" not in run.training_metrics and carried.with_carried({"loss": 1.0}) == {"loss": 1.0}


# Health


class Watched:
    """A run of one weight update a step, its health watched."""

    def __init__(self, path, **options):
        self.run = bare_run(path, TOKENIZER, learning_rate=1e-2, max_steps=20, **options)
        self.run.optimizer = torch.optim.SGD(self.run.model.parameters(), lr=1e-2)
        self.lines, self.reported, self.scoring = [], [], SimpleNamespace(rounding=None)
        log = SimpleNamespace(folder=path, add_line=lambda name, line: self.lines.append((name, line)))
        self.watch = HealthWatch(self.run, log, LogFailures(), self.scoring, True, self.reported.append)
        self.call("on_train_begin")
        self.watch.on_train_begin()

    def call(self, event):
        handler, run = self.run.callback_handler, self.run
        handler.call_event(event, run.args, run.state, run.control)

    def step(self, moves=True, **figures):
        """Take an optimizer step and log it."""
        run = self.run
        self.call("on_step_begin")
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.call("on_pre_optimizer_step")
        if moves:
            run.optimizer.step()
        self.call("on_optimizer_step")
        run.state.global_step += 1
        self.watch.before_log()
        metrics = {"loss": 0.1, "grad_norm": 1.0, "learning_rate": 1e-2, "step": run.state.global_step, **figures}
        run.state.log_history.append(metrics)
        self.watch.after_log()

    def rules(self):
        return [(line["step"], line["rule"], line["level"]) for _, line in self.lines]


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path)


def test_a_healthy_run_has_no_findings(watched):
    for _ in range(8):
        watched.step()
    assert watched.lines == watched.reported == []
    assert watched.run.training_metrics["policy/moved"] == [1.0] * 8


def test_a_planted_fault_is_found_reported_and_over(watched, caplog):
    watched.step()
    watched.step(loss=math.nan)
    assert watched.rules() == [(2, "not_finite", "error")]
    assert [line for _, line in watched.lines] == watched.reported
    assert "Health, step 2, not_finite: `loss` is not a finite number" in caplog.text
    for _ in range(6):
        watched.step()
    assert watched.rules() == [(2, "not_finite", "error"), (7, "not_finite", "ok")]
    assert [line["level"] for line in watched.reported] == ["error", "ok"]


def test_a_policy_that_does_not_move_is_found(watched):
    for _ in range(4):
        watched.step(moves=False)
    assert [rule for _, rule, _ in watched.rules()] == ["policy_still"]
    assert watched.run.training_metrics["policy/moved"] == [0.0] * 4


def test_a_resumed_run_goes_on_with_the_faults_that_were_open(tmp_path):
    add_line(tmp_path / "health.jsonl", {"step": 2, "rule": "not_finite", "level": "error"})
    watched = Watched(tmp_path)
    watched.step(loss=math.nan)
    assert watched.lines == [], "it was told before"
    for _ in range(5):
        watched.step()
    assert watched.rules() == [(6, "not_finite", "ok")]


def test_raise_saves_the_run_and_stops_it(tmp_path):
    watched, saved = Watched(tmp_path, health_checks="raise"), []
    watched.run._trainer._save_checkpoint = lambda model, trial: saved.append(model)
    watched.step()
    with pytest.raises(HealthError, match=r"stopped in step 2 by the health rule `not_finite`") as told:
        watched.step(grad_norm=math.inf)
    assert saved == [watched.run.model] and watched.run.control.should_training_stop
    assert f"{tmp_path / f'{PREFIX}2'}; resume from there" in told.value.remedy


def test_raise_says_where_no_checkpoint_could_be_written(tmp_path):
    def full(model, trial):
        raise CheckpointSaveError("The disk is full.", remedy="Free space.")

    watched = Watched(tmp_path, health_checks="raise")
    watched.run._trainer._save_checkpoint = full
    with pytest.raises(HealthError, match="not_finite") as told:
        watched.step(loss=math.inf)
    assert "No checkpoint of it could be written: The disk is full." in told.value.remedy


def test_a_rule_that_fails_does_not_end_the_run(watched, monkeypatch, caplog):
    monkeypatch.setattr(watched.watch.monitor, "step", lambda metrics: 1 / 0)
    watched.step()
    assert watched.lines == [] and "The health rules could not be run" in caplog.text

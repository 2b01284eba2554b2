"""The log of a run without a trainer: what is kept of a rollout batch, and a disk that takes nothing more."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bare_run import bare_run
from conftest import chat_tokenizer

from trl_toolgrpo import read_rollouts
from trl_toolgrpo.rollout.engine import RolloutBatch
from trl_toolgrpo.rollout.loop import Rollout, RolloutStats
from trl_toolgrpo.rollout.rewards import Rewards
from trl_toolgrpo.rollout.trajectory import Trajectory, Turn
from trl_toolgrpo.run_folder import writer
from trl_toolgrpo.run_folder.files import read_lines
from trl_toolgrpo.run_folder.log_failures import LogFailures
from trl_toolgrpo.run_folder.rollout_log import log_files
from trl_toolgrpo.run_folder.writer import RunLog


TOKENIZER = chat_tokenizer()
LENGTHS = (3, 1, 2, 4)
ROWS = ([2, 0], [3, 1])
"""Rollouts of the two micro-batches, in another order than they were sampled in."""


def trajectory(row, length):
    ids, logprobs = [10 * row + place for place in range(length)], [-0.25 * place for place in range(length)]
    turn = Turn(start=0, end=length)
    return Trajectory([1, 2], ids, logprobs, [1] * length, [0] * length, [turn], "stop")


def rollout_batch():
    made = [trajectory(row, length) for row, length in enumerate(LENGTHS)]
    scores = torch.tensor([[1.0], [0.5], [float("nan")], [-2.0]])
    return RolloutBatch(
        [Rollout(t, []) for t in made], RolloutStats(), prompts=["hello"] * 4, completions=[f"says {r}" for r in range(4)],
        rewards=Rewards(scores, scores[:, 0], slice(0, 4)),
    )  # fmt: skip


def micro_batches(batch):
    """What the update takes: ids, recorded log-probs, and an advantage for each rollout."""
    for rows in ROWS:
        width = max(LENGTHS)
        recorded = torch.zeros(2, width)
        for place, row in enumerate(rows):
            values = batch.trajectories[row].logprobs
            recorded[place, : len(values)] = torch.tensor(values)
        yield {
            "rollout": torch.tensor(rows),
            "old_per_token_logps": recorded,
            "advantages": torch.tensor([float(row) for row in rows]),
        }


@pytest.fixture
def run(tmp_path):
    return bare_run(tmp_path, TOKENIZER, per_device_train_batch_size=2, steps_per_generation=2, rollout_log_limit=1.0)


def log_of(run):
    tools = SimpleNamespace(servers={}, toolset=SimpleNamespace(known=[]))
    return RunLog(run, SimpleNamespace(tools=tools, batch=None, redactor=None), LogFailures())


def take_batch(run, log, moved=0.0):
    """Make a rollout batch and take its two micro-batches; the policy then gives each token `moved` nats more."""
    counts = log.counts()
    log._rollouts.batch = rollout_batch()
    run.micro_batches = list(micro_batches(log._rollouts.batch))
    run.training_metrics["reward"].append(0.5)
    log.on_batch(counts)
    for _ in ROWS:
        inputs = run.next_micro_batch
        mask = torch.ones_like(inputs["old_per_token_logps"])
        mask[:, 0] = 0
        log.on_update(inputs, inputs["old_per_token_logps"] + moved, mask)
        run.step += 1
        log.after_micro_batch()
    run.state.global_step += 1


def test_a_batch_is_read_back_as_it_was_kept(run, tmp_path):
    log = log_of(run)
    with log.of_training():
        log.on_train_begin()
        for moved in (0.5, 0.0):
            take_batch(run, log, moved)
    assert [path.name for path in log_files(tmp_path)] == ["000000-000.parquet", "000001-000.parquet"]
    rows = list(read_rollouts(tmp_path))
    assert [(row["step"], row["batch"], row["rollout"]) for row in rows] == [(n // 4, n // 4, n % 4) for n in range(8)]
    for row, length in zip(rows, LENGTHS, strict=False):
        kept = trajectory(row["rollout"], length)
        assert {name: row[name] for name in ("completion_ids", "logprobs", "turns")} == {
            name: kept.to_dict()[name] for name in ("completion_ids", "logprobs", "turns")
        }
        assert row["ratios"] == pytest.approx([1.0] + [torch.tensor(0.5).exp().item()] * (length - 1))
        assert row["advantages"] == [float(row["rollout"])] * length
    assert [row["reward"] for row in rows[:4]] == [1.0, 0.5, None, -2.0]
    assert rows[2]["rewards"] == {"reward": None} and rows[0]["messages"][0]["content"] == "says 0"
    assert {ratio for row in rows[4:] for ratio in row["ratios"]} == {1.0}
    assert json.loads((tmp_path / "run.json").read_text())["reward_funcs"] == ["reward"]


def test_a_training_that_fails_has_logged_its_batch(run, tmp_path):
    log = log_of(run)

    def fail():
        with log.of_training():
            log.on_train_begin()
            log._rollouts.batch = rollout_batch()
            run.micro_batches = list(micro_batches(log._rollouts.batch))
            log.on_batch(log.counts())
            raise RuntimeError("the judge is gone")

    with pytest.raises(RuntimeError, match="the judge is gone"):
        fail()
    assert [row["ratios"] for row in read_rollouts(tmp_path)] == [None] * 4


def test_a_checkpoint_keeps_the_batch_in_use(run, tmp_path):
    """A log that reads it writes the whole batch, with the ratios of before and after."""
    log, checkpoint = log_of(run), tmp_path / "checkpoint-0"
    with log.of_training():
        log.on_train_begin()
        log._rollouts.batch = rollout_batch()
        run.micro_batches = list(micro_batches(log._rollouts.batch))
        log.on_batch(log.counts())
        inputs = run.next_micro_batch
        log.on_update(inputs, inputs["old_per_token_logps"] + 1.0, torch.ones(2, max(LENGTHS)))
        run.step += 1
        log.after_micro_batch()
        log.save(checkpoint)
        log._logged = None  # as if the process had ended
    assert not list((tmp_path / "rollouts").glob("*.parquet"))
    resumed = log_of(run)
    with resumed.of_training():
        resumed.load(checkpoint)
        resumed.on_train_begin()
        inputs = run.next_micro_batch
        resumed.on_update(inputs, inputs["old_per_token_logps"], torch.ones(2, max(LENGTHS)))
        run.step += 1
        resumed.after_micro_batch()
    first = torch.tensor(1.0).exp().item()
    found = {row["rollout"]: row["ratios"] for row in read_rollouts(tmp_path)}
    for rows, ratio in zip(ROWS, (first, 1.0), strict=True):
        assert all(found[row] == pytest.approx([ratio] * LENGTHS[row]) for row in rows)


def test_a_full_disk_ends_the_log_and_not_the_run(run, tmp_path, monkeypatch, caplog):
    def full(table, path):
        raise OSError(28, "No space left on device")

    log = log_of(run)
    with log.of_training():
        log.on_train_begin()
        take_batch(run, log)
        monkeypatch.setattr(writer, "write", full)
        for _ in range(3):
            take_batch(run, log)
    assert [path.name for path in log_files(tmp_path)] == ["000000-000.parquet"]
    said = [record.message for record in caplog.records if "No rollouts are logged any more" in record.message]
    assert len(said) == 1 and "No space left on device" in said[0]


def test_a_line_that_does_not_fit_ends_its_file_alone(run, tmp_path, monkeypatch, caplog):
    log, add_line = log_of(run), writer.add_line

    def full_at_two(path, record):
        if record["step"] == 2:
            raise OSError(28, "No space left on device")
        add_line(path, record)

    monkeypatch.setattr(writer, "add_line", full_at_two)
    with log.of_training():
        log.on_train_begin()
        for step in (1, 2, 3):
            log.add_line("metrics.jsonl", {"step": step})
        log.add_line("health.jsonl", {"step": 3})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
    assert [line["step"] for line in read_lines(tmp_path / "health.jsonl")] == [3]
    assert caplog.text.count("Nothing more is added to metrics.jsonl") == 1


def test_another_run_in_the_folder_is_not_written_over(run, tmp_path):
    log = log_of(run)
    with log.of_training():
        log.on_train_begin()
        assert log.owns_folder()
        Path(tmp_path / "new").write_text("{}")
        (tmp_path / "new").replace(tmp_path / "run.json")
        assert not log.owns_folder()
        log.add_line("metrics.jsonl", {"step": 1})
    assert not (tmp_path / "metrics.jsonl").exists()

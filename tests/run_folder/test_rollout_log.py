"""The rollout log: what is in it, that it is exact, bounded, cut back on resume, and refused where unreadable."""

import errno
import json
import logging
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, run_script, script_ours, tiny_model, tool_call
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from trl_toolgrpo import ConfigError, MCPServer, RolloutLogError, ToolGRPOTrainer, read_rollouts
from trl_toolgrpo.monitoring.health.monitor import HealthMonitor
from trl_toolgrpo.report.page import build_report
from trl_toolgrpo.run_folder import writer as run_log_module
from trl_toolgrpo.run_folder.files import add_line, cut_back, describe_start, read_lines, run_redactor
from trl_toolgrpo.run_folder.rollout_log import KEY, details, log_files, read_table, tensors_of
from trl_toolgrpo.run_folder.rollout_tensors import keep, restore


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")
TIMES = ("time", "seconds", "per_second", "wait", "runtime", "latency", "train_loss", "total_flos")


def reward(completion_ids, **kwargs):
    """Differs within a group; cannot score the shortest."""
    return [float((7 * len(ids) + sum(ids)) % 11) if len(ids) > 2 else None for ids in completion_ids]


class Kept(ToolGRPOTrainer):
    """Keeps its rollouts, and the inputs of each micro-batch."""

    def _generate(self, prompts):
        output = super()._generate(prompts)
        self.rolled = [*getattr(self, "rolled", []), self.rollouts.batch.trajectories]
        return output

    def _compute_loss(self, model, inputs):
        self.used = [*getattr(self, "used", []), {k: v.clone() for k, v in inputs.items()}]
        return super()._compute_loss(model, inputs)


def start(path, rewards=reward, lora=True, **changes):
    """Each rollout batch feeds four optimizer steps, two micro-batches twice."""
    options = {
        "max_steps": 8, "learning_rate": 1e-2, "steps_per_generation": 2, "num_iterations": 2, "seed": 3,
        "max_completion_length": 12, "advantage_estimator": "gae", "beta": 0.1, "deterministic_rollouts": True,
        **changes,
    }  # fmt: skip
    random.seed(0)
    torch.manual_seed(0)
    return Kept(
        tiny_model(TOKENIZER), rewards, config(path, **options), prompts(5), processing_class=TOKENIZER,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
    )  # fmt: skip


def untimed(value):
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if not any(word in k for word in TIMES)}
    return [untimed(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = start(tmp_path_factory.mktemp("run"), save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer


def test_the_log_is_what_was_sampled_and_trained_on(run):
    folder = Path(run.args.output_dir)
    assert [path.name for path in log_files(folder)] == ["000000-000.parquet", "000004-000.parquet"]
    rows = list(read_rollouts(folder))
    for place, row in enumerate(rows):
        trajectory = run.rolled[place // 8][place % 8].to_dict()
        for name in ("prompt_ids", "completion_ids", "tool_mask", "forced_mask", "stop_reason", "turns"):
            assert row[name] == trajectory[name], name
        assert torch.equal(torch.tensor(row["logprobs"]), torch.tensor(trajectory["logprobs"]))
        assert (row["step"], row["rollout"], row["group"]) == (place // 8 * 4, place % 8, place % 8 // 4)
        assert row["prompt"][0]["content"].startswith("hello") and row["messages"][0]["role"] == "assistant"
        expected = reward([row["completion_ids"]])[0]
        assert row["rewards"] == {"reward": expected} and row["reward"] == expected and not row["assisted"]
    for index, path in enumerate(log_files(folder)):
        table = read_table(path)
        tensors, used = tensors_of(table), run.used[index * 4 : index * 4 + 2]
        assert details(table)["micro_batches"] == 2
        for name in used[0]:
            if name != "rollout":
                together = torch.cat([b[name] for b in used]) if used[0][name].ndim else used[0][name]
                expected = together[torch.cat([b["rollout"] for b in used]).argsort()] if together.ndim else together
                assert torch.equal(tensors[name], expected) and tensors[name].dtype == expected.dtype, name
        for row, mask, advantages in zip(
            rows[index * 8 :], tensors["tool_mask"] if "tool_mask" in tensors else tensors["completion_mask"],
            tensors["advantages"], strict=False,
        ):  # fmt: skip
            assert row["advantages"] == advantages[: len(row["completion_ids"])].tolist()
            assert mask.sum() == len(row["completion_ids"])


def test_ratios_are_those_of_the_last_update(run, tmp_path):
    rows = list(read_rollouts(run.args.output_dir))
    assert all(len(row["ratios"]) == len(row["completion_ids"]) for row in rows)
    found = [value for row in rows[8:] for value in row["ratios"]]
    steps = [entry for entry in run.state.log_history if "ratio/mean" in entry][-2:]
    assert sum(found) / len(found) == pytest.approx(
        sum(step["ratio/mean"] for step in steps) / 2, rel=1e-3
    )  # of micro-batches of nearly the same size
    assert max(found) == pytest.approx(max(step["ratio/max"] for step in steps), rel=1e-6)
    assert min(found) == pytest.approx(min(step["ratio/min"] for step in steps), rel=1e-6)
    assert max(abs(value - 1) for value in found) > 1e-3


def files_by_hand(steps, accumulated, per_batch, passes):
    """Names of the rollout batches of a run over five prompts; an optimizer step ends with its epoch, too."""
    names, step, every = [], 0, per_batch * passes
    epoch = 5 // per_batch * every  # micro-batches; each rollout batch has `per_batch` prompts
    while step < steps:
        for place in range(epoch):
            if place % every == 0:
                nth = sum(name.startswith(f"{step:06d}") for name in names)
                names.append(f"{step:06d}{f'.{nth}' if nth else ''}-000.parquet")
            step += (place + 1) % accumulated == 0 or place + 1 == epoch
            if step == steps:
                break
    return names


@pytest.mark.parametrize(
    ("accumulated", "per_batch", "passes"),
    [(4, 2, 1), (3, 1, 1), (4, 1, 2), (3, 4, 1), (2, 2, 1), (1, 2, 2), (13, 1, 1)],
)
def test_every_rollout_batch_has_a_file(tmp_path, accumulated, per_batch, passes):
    """However many rollout batches an optimizer step takes, and optimizer steps a rollout batch."""
    options = {
        "gradient_accumulation_steps": accumulated, "steps_per_generation": per_batch, "num_iterations": passes,
        "max_steps": 3, "beta": 0.0, "advantage_estimator": "group", "learning_rate": 1e-3,
    }  # fmt: skip
    trainer = start(tmp_path, lora=False, save_strategy="no", **options)
    trainer.train()
    names = [path.name for path in log_files(tmp_path)]
    assert names == files_by_hand(3, accumulated, per_batch, passes)
    rows = list(read_rollouts(tmp_path))
    made = [t for batch in trainer.rolled for t in batch]
    assert [row["completion_ids"] for row in rows] == [t.completion_ids for t in made]
    assert [row["batch"] for row in rows] == [place // (4 * per_batch) for place in range(len(made))]
    assert [row["step"] for row in rows] == [int(name[:6]) for name in names for _ in range(4 * per_batch)]
    assert not any("ratio" in line["rule"] for line in read_lines(tmp_path / "health.jsonl"))
    steps = [entry for entry in trainer.state.log_history if "ratio/mean" in entry]
    assert len(steps) == 3
    if accumulated % (per_batch * passes) == 0:  # every micro-batch comes before the first step on its rollout batch
        assert all(entry["ratio/mean"] == pytest.approx(1.0, abs=1e-4) for entry in steps)
        assert all("sampling/logp_diff_mean" in entry for entry in steps)
        assert all(row["ratios"] is not None for row in rows)
    report = build_report([tmp_path])
    assert report.shown == report.total == len(rows)


def test_datasets_and_json_open_what_is_written(run):
    from datasets import load_dataset

    folder = Path(run.args.output_dir)
    files = [str(path) for path in log_files(folder)]
    opened = load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))["train"]
    assert len(opened) == 16 and opened[0]["completion_ids"] == next(read_rollouts(folder))["completion_ids"]
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    for line, entry in zip(lines, run.state.log_history, strict=True):
        assert {name: value for name, value in line.items() if name != "time"} == entry
    started = json.loads((folder / "run.json").read_text())
    assert (started["version"], started["model"], started["reward_funcs"], started["tools"]) == (
        1, "tiny-qwen3", ["reward"], []
    )  # fmt: skip
    assert started["config"]["num_iterations"] == 2 and "epsilon" not in started["config"]
    assert started["versions"]["torch"] == torch.__version__ and started["command"]


def test_a_logged_conversation_has_its_tool_calls_and_results(monkeypatch, tmp_path):
    script = [[tool_call("add", a=1, b=2), "3<|im_end|>"], ["no<|im_end|>"]]
    seen = []

    def judged(completions, **kwargs):
        seen.extend(completions)
        return [float(len(c)) for c in completions]

    trainer = ToolGRPOTrainer(
        tiny_model(TOKENIZER), judged, config(tmp_path, max_completion_length=300, logprob_check="off"), prompts(),
        processing_class=TOKENIZER, tools=[add],
    )  # fmt: skip
    script_ours(monkeypatch, TOKENIZER, [[turns[0] + "<|im_end|>", *turns[1:]] if len(turns) > 1 else turns
                                         for turns in script])  # fmt: skip
    trainer.train()
    rows = list(read_rollouts(tmp_path))
    assert [row["tools"] for row in rows] == [["add"], [], ["add"], []]
    assert [row["messages"] for row in rows] == json.loads(json.dumps(seen))
    assert rows[0]["turns"][0]["tool_results"][0]["content"] == 3
    assert [row["turns"] for row in rows[:1]] == [rows[0]["turns"]] and 0 in rows[0]["tool_mask"]
    masked = [ratio for ratio, mine in zip(rows[0]["ratios"], rows[0]["tool_mask"], strict=True) if not mine]
    assert masked and set(masked) == {1.0}
    advantages = {a for a, mine in zip(rows[0]["advantages"], rows[0]["tool_mask"], strict=True) if not mine}
    assert advantages == {0.0} and rows[0]["values"] is None


def test_a_secret_number_and_a_lone_surrogate_are_stored_readably(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("NODE_KEY", "100000")
    calls = [tool_call("add", a=100000, b=2), tool_call("add \ud800", **{"100000 \ud83d": "\ud83d"})]
    trainer = ToolGRPOTrainer(
        tiny_model(TOKENIZER), reward, config(tmp_path, max_completion_length=600, logprob_check="off"), prompts(),
        processing_class=TOKENIZER, tools=[add],
    )  # fmt: skip
    script_ours(monkeypatch, TOKENIZER, [["\n".join(calls) + "<|im_end|>", "3<|im_end|>"], ["no<|im_end|>"]])
    trainer.train()
    row = next(read_rollouts(tmp_path))
    first, second = row["turns"][0]["tool_calls"]
    assert first["arguments"] == {"a": 100000, "b": 2}
    assert (second["name"], second["arguments"]) == ("add \ufffd", {"[secret] \ufffd": "\ufffd"})
    assert row["tools"] == ["add", "add \ufffd"]
    assert row["turns"][0]["tool_results"][0]["content"] == 100002
    said = [r.message for r in caplog.records if "environment variables" in r.message]
    assert said == ["The values of these environment variables are replaced by [secret] in logs: NODE_KEY."]


def test_assisted_batches_are_marked(tmp_path):
    trainer = start(tmp_path, assist_warmup_steps=4, max_steps=8, advantage_estimator="group")
    trainer.train()
    rows = list(read_rollouts(tmp_path))
    assert [row["assisted"] for row in rows] == [True] * 8 + [False] * 8
    assert all(row["ratios"] is None for row in rows[:8]) and all(row["ratios"] for row in rows[8:])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(width=32), max_size=5), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    st.booleans(),
)
def test_tensors_are_kept_to_the_bit(lists, dtype, in_column):
    """Signs of zero and NaN included, in a column or next to it."""
    width = max(len(values) for values in lists) + 1
    tensor = torch.full((len(lists), width), -0.0)
    for row, values in zip(tensor, lists, strict=True):
        row[: len(values)] = torch.tensor(values)
    tensor = tensor.nan_to_num(0.0, 5.0, -5.0).to(dtype) if dtype in (torch.int64, torch.bool) else tensor.to(dtype)
    columns = {"logprobs": [v if in_column else [0.5, *v] for v in lists]}
    rows = [[] for _ in lists]
    record = keep("old_per_token_logps", tensor, columns, rows)
    record = json.loads(json.dumps(record))
    found = restore({"old_per_token_logps": record}, columns, rows)["old_per_token_logps"]
    assert found.dtype == tensor.dtype and found.shape == tensor.shape
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    if dtype == torch.float32 and in_column:
        assert "column" in record and rows == [[] for _ in lists]


@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_resumed_run_leaves_the_same_log(run, tmp_path, step):
    """In the middle of a rollout batch and at its end; what came after the checkpoint is dropped."""
    resumed = start(tmp_path)
    (tmp_path / "rollouts").mkdir()
    for name in ("000004-000", "000008-000", "000012-001"):
        (tmp_path / "rollouts" / f"{name}.parquet").write_bytes(b"of a step that never was")
    for path in ("metrics.jsonl", "rollouts/000000-000.parquet"):
        (tmp_path / path).write_bytes((Path(run.args.output_dir) / path).read_bytes())
    add_line(tmp_path / "metrics.jsonl", {"step": 12, "loss": 1.0})
    if step == 2:
        (tmp_path / "rollouts" / "000000-000.parquet").unlink()  # its last update was not over
    resumed.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-{step}")
    assert [path.name for path in log_files(tmp_path)] == [path.name for path in log_files(run.args.output_dir)]
    assert untimed(list(read_rollouts(tmp_path))) == untimed(list(read_rollouts(run.args.output_dir)))
    lines = [read_lines(Path(folder) / "metrics.jsonl") for folder in (tmp_path, run.args.output_dir)]
    assert untimed(lines[0]) == untimed(lines[1])


def test_a_failed_run_has_logged_its_current_batch(tmp_path):
    def failing(completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == 8:
            raise RuntimeError("the judge is gone")
        return reward(completion_ids)

    trainer = start(tmp_path, failing, max_steps=12)
    trainer.used = []
    with pytest.raises(RuntimeError, match="the judge is gone"):
        trainer.train()
    assert [path.name for path in log_files(tmp_path)] == ["000000-000.parquet", "000004-000.parquet"]
    again = start(tmp_path, max_steps=2)
    again.train()
    assert [path.name for path in log_files(tmp_path)] == ["000000-000.parquet"]
    rows = list(read_rollouts(tmp_path))
    assert all(row["ratios"] for row in rows) and len(rows) == 8
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 2]


def test_the_log_is_bounded(run, tmp_path):
    size = log_files(run.args.output_dir)[0].stat().st_size
    trainer = start(tmp_path, max_steps=16, rollout_log_limit=2.5 * size / 2**20)
    trainer.train()
    assert [path.name for path in log_files(tmp_path)] == ["000008-000.parquet", "000012-000.parquet"]


def test_rollout_log_limit_zero_writes_no_log(tmp_path):
    start(tmp_path, max_steps=1, rollout_log_limit=0).train()
    assert not (tmp_path / "rollouts").exists() and (tmp_path / "metrics.jsonl").is_file()
    with pytest.raises(RolloutLogError, match=r"no rollout log in .*rollout_log_limit"):
        next(read_rollouts(tmp_path))
    with pytest.raises(ConfigError, match=r"rollout_log_limit=-1.0"):
        config(tmp_path, rollout_log_limit=-1.0)


def test_a_full_disk_ends_the_json_lines_but_not_the_run(tmp_path, monkeypatch, caplog):
    """The disk takes what fits on it: half of the second line of the metrics, and none of the health."""
    full, written = errno.ENOSPC, []

    def filling(path, record):
        written.append(path.name)
        if path.name == "metrics.jsonl" and written.count(path.name) == 1:
            return add_line(path, record)
        with path.open("a") as file:
            file.write('{"step": ')
        raise OSError(full, os.strerror(full))

    monkeypatch.setattr(run_log_module, "add_line", filling)
    monkeypatch.setattr(HealthMonitor, "step", lambda self, metrics: [{"step": 1, "rule": "r", "level": "ok"}])
    trainer = start(tmp_path, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and len(trainer.state.log_history) == 5
    assert sorted(written) == ["health.jsonl", "metrics.jsonl", "metrics.jsonl"]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
    for name in ("metrics.jsonl", "health.jsonl"):
        said = [r.message for r in caplog.records if f"Nothing more is added to {name}" in r.message]
        assert len(said) == 1 and "No space left on device" in said[0]


def test_other_parquet_files_in_the_log_folder_are_left_alone(tmp_path):
    foreign = tmp_path / "rollouts" / "x-000.parquet"
    foreign.parent.mkdir()
    foreign.write_bytes(b"of somebody else")
    start(tmp_path, max_steps=1, rollout_log_limit=1e-6).train()
    assert foreign.read_bytes() == b"of somebody else" and len(log_files(tmp_path)) == 1


def test_a_refusing_disk_ends_the_rollout_log_but_not_the_run(tmp_path, monkeypatch, caplog):
    def full(table, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log_module, "write", full)
    trainer = start(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 8
    said = [record.message for record in caplog.records if "No rollouts are logged" in record.message]
    assert len(said) == 1 and "No space left on device" in said[0]


def test_unreadable_logs_raise_rollout_log_error(run, tmp_path):
    good = read_table(log_files(run.args.output_dir)[0])
    with pytest.raises(RolloutLogError, match="it is not a folder"):
        log_files(tmp_path / "nowhere")
    with pytest.raises(RolloutLogError, match=r"no file <step>-<process>\.parquet"):
        log_files(tmp_path)
    torn = tmp_path / "000000-000.parquet"
    torn.write_bytes(log_files(run.args.output_dir)[0].read_bytes()[:-200])
    with pytest.raises(RolloutLogError, match="cannot be read, it is torn or not a parquet file"):
        next(read_rollouts(tmp_path))
    newer = good.replace_schema_metadata({KEY: json.dumps({**details(good), "version": 2})})
    pq.write_table(newer, torn)
    with pytest.raises(RolloutLogError, match="has version 2 of the rollout log, this package reads version 1"):
        read_table(torn)
    pq.write_table(pa.table({"a": [1]}), torn)
    with pytest.raises(RolloutLogError, match="parquet file of something else"):
        read_table(torn)
    pq.write_table(good.drop_columns(["turns"]), torn)
    with pytest.raises(RolloutLogError, match="columns turns are missing"):
        read_table(torn)


def test_cut_back_drops_later_and_torn_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        add_line(file, {"step": step, "loss": float("nan"), "reward": 0.1})
    with file.open("a") as stream:
        stream.write('{"step": 2, "lo')
    cut_back(file, 2)
    assert read_lines(file) == [{"step": step, "loss": None, "reward": 0.1} for step in (1, 2)]
    cut_back(tmp_path / "missing.jsonl", 2)
    assert read_lines(tmp_path / "missing.jsonl") == []


def test_no_secret_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_API_KEY", "from-environment-1")
    command = ["train.py", "--judge_key", "on-command-2", "--hub-token=on-command-3", "--seed", "1"]
    monkeypatch.setattr("sys.argv", command)
    server = MCPServer("db", env={"DB_PASSWORD": "of-server-4", "TZ": "Europe/Berlin"})
    args = config(tmp_path, hub_token="of-hub-5", run_name="from-environment-1 of-hub-5")
    redactor = run_redactor(args, [server])
    written = json.dumps(describe_start(args, "of-server-4", ["reward"], ["add"], redactor))
    assert not [word for word in ("on-command", "from-environment", "of-server", "of-hub") if word in written]
    assert json.loads(written)["command"] == [
        "train.py", "--judge_key", "[secret]", "--hub-token=[secret]", "--seed", "1"
    ]  # fmt: skip


def test_secrets_stay_out_of_the_texts_of_rollouts(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_TOKEN", "hush-hush-hush")
    trainer = run_script(
        ToolGRPOTrainer, monkeypatch, tmp_path, [["it is hush-hush-hush<|im_end|>"]], training=True
    ).trainer  # fmt: skip
    trainer.train()
    rows = list(read_rollouts(tmp_path))
    assert [row["messages"][0]["content"] for row in rows] == ["it is [secret]<|im_end|>"] * 4

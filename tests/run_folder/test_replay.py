"""Replay: a run that trains from the rollout log of another is that run, to the bit."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig

from trl_toolgrpo import ConfigError, RolloutLogError, ToolGRPOTrainer, read_rollouts
from trl_toolgrpo.rollout.engine import RolloutEngine
from trl_toolgrpo.run_folder.rollout_log import log_files


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")
TIMES = ("step_time", "_seconds", "seconds", "per_second", "runtime", "total_flos")
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)


def reward(completion_ids, **kwargs):
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


def start(path, rewards=reward, lora=None, seed=0, **changes):
    options = {
        "max_steps": 8, "learning_rate": 1e-2, "steps_per_generation": 2, "seed": 3, "max_completion_length": 12,
        "save_strategy": "steps", "save_steps": 3, **changes,
    }  # fmt: skip
    trainer = ToolGRPOTrainer(
        tiny_model(TOKENIZER), rewards, config(path, **options), prompts(5), processing_class=TOKENIZER,
        peft_config=lora, tools=[add],
    )  # fmt: skip
    torch.manual_seed(seed)
    return trainer


SETTINGS = {
    "group": (None, {}),
    "gae": (LORA, {
        "advantage_estimator": "gae", "num_iterations": 2, "beta": 0.1, "sync_ref_model": True,
        "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5, "value_epochs": 3, "deterministic_rollouts": True,
    }),
    "batches in a step": (LORA, {
        "gradient_accumulation_steps": 4, "advantage_estimator": "gae", "value_epochs": 2, "beta": 0.1,
        "sync_ref_model": True, "ref_model_sync_steps": 3,
    }),
    "batches across steps": (None, {"steps_per_generation": 4, "gradient_accumulation_steps": 3}),
    "passes in a step": (None, {
        "steps_per_generation": 1, "num_iterations": 2, "gradient_accumulation_steps": 4, "top_entropy_quantile": 0.5,
    }),
    "assisted": (None, {
        "force_rate": 0.7, "assist_warmup_steps": 4, "advantage_estimator": "group_gae", "value_warmup_steps": 2,
    }),
}  # fmt: skip


def never(*args, **kwargs):
    raise AssertionError("a replayed run samples nothing and asks for no reward")


def figures(trainer):
    return [{k: v for k, v in e.items() if not any(w in k for w in TIMES)} for e in trainer.state.log_history]


@pytest.mark.parametrize("name", SETTINGS)
def test_replay_gives_the_weights_of_the_logged_run(tmp_path, monkeypatch, name):
    """With dropout, whose noise is that of the log."""
    lora, changes = SETTINGS[name]
    first = start(tmp_path / "first", lora=lora, **changes)
    first.train()
    monkeypatch.setattr(RolloutEngine, "run", never)
    again = start(tmp_path / "again", never, lora, seed=99, replay=str(tmp_path / "first"), **changes)
    again.train()
    for (parameter, found), expected in zip(again.model.named_parameters(), first.model.parameters(), strict=True):
        assert torch.equal(found, expected), parameter
    assert figures(again) == figures(first) and len(figures(again)) > 8
    if first.critic is not None:
        heads = [list(trainer.critic.head.parameters()) for trainer in (again, first)]
        assert all(torch.equal(*pair) for pair in zip(*heads, strict=True))
    assert not (tmp_path / "again" / "rollouts").exists()
    resumed = start(tmp_path / "resumed", never, lora, seed=7, replay=str(tmp_path / "first"), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-3"))
    for found, expected in zip(resumed.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    start(folder, save_strategy="no", max_steps=4).train()
    return folder


def test_logs_of_another_shape_are_refused(logged, tmp_path):
    with pytest.raises(RolloutLogError, match=r"rollouts: 8 there, 16 here.*run.json names them"):
        start(tmp_path, replay=str(logged), per_device_train_batch_size=8).train()
    with pytest.raises(RolloutLogError, match=r"micro-batches: 2 there, 1 here"):
        start(tmp_path, replay=str(logged), per_device_train_batch_size=8, steps_per_generation=1).train()


def test_a_log_that_ends_early_is_refused_by_step(logged, tmp_path):
    with pytest.raises(RolloutLogError, match=r"no 000004-000.parquet, the batch of step 4; it holds .* 0 to 2"):
        start(tmp_path, replay=str(logged)).train()


def test_folders_without_a_log_are_refused_at_construction(logged, tmp_path):
    with pytest.raises(RolloutLogError, match="There is no rollout log in"):
        start(tmp_path / "out", replay=str(tmp_path))
    with pytest.raises(ConfigError, match="which is `output_dir` itself"):
        start(logged, replay=str(logged))
    with pytest.raises(ConfigError, match="with rollouts of TRL's own"):
        config(tmp_path, replay=str(logged), record_sample_logprobs=False)
    torn = Path(shutil.copytree(logged, tmp_path / "torn"))
    path = log_files(torn)[1]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RolloutLogError, match=r"000002-000.parquet cannot be read, it is torn"):
        start(tmp_path / "out", replay=str(torn)).train()


def test_training_again_after_replay_writes_its_own_log(tmp_path):
    trainer = start(tmp_path / "first", max_steps=3, save_strategy="no")
    trainer.train()
    trainer.train()
    assert [row["batch"] for row in read_rollouts(tmp_path / "first")] == [0] * 8 + [1] * 8


def test_replay_with_another_loss_uses_the_same_rollouts(logged, tmp_path):
    """For debugging: other losses on the same rollouts."""
    trainer = start(tmp_path, never, replay=str(logged), max_steps=4, learning_rate=1e-4, log_completions=True)
    trainer.train()
    assert trainer.state.global_step == 4 and list((tmp_path / "completions").glob("*.parquet"))


@pytest.mark.parametrize(
    ("theirs", "ours", "words"), [("gae", "group", "with a critic"), ("group", "gae", "no critic")]
)
def test_a_log_of_another_kind_of_estimator_is_refused(tmp_path, theirs, ours, words):
    start(tmp_path / "logged", advantage_estimator=theirs, max_steps=1).train()
    with pytest.raises(RolloutLogError, match=words):
        start(tmp_path / "again", replay=str(tmp_path / "logged"), advantage_estimator=ours, max_steps=1).train()

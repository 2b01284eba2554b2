"""Every field of TRL's configuration does what it does in TRL, or is refused or warned of by name.

A field stands in one of the tables below, and the test of that table turns it on. A field that a new TRL adds is in
none of them, and fails the first test.
"""

import ast
import copy
import dataclasses
import inspect
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import trl
import trl.trainer.base_config as base_config
from conftest import chat_tokenizer, config, prompts, run_script, tiny_model
from transformers import GenerationConfig, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

import trl_toolgrpo.rollout.vllm_rollouts as vllm_rollouts
from trl_toolgrpo import ConfigError, ToolGRPOConfig, ToolGRPOTrainer


END = "<|im_end|>"
SCRIPT = [[f"eight{END}"], [f"none{END}"], [f"two, and no more than that{END}"], ["on and on " * 20]]

# Like TRL: a value, and what else has to be set for it to matter. Both trainers make the same of the same tokens, and
# something else than at the default
LIKE_TRL = {
    "num_generations": (2, {}),
    "num_generations_eval": (2, {}),
    "max_completion_length": (20, {}),
    "shuffle_dataset": (False, {}),
    "remove_unused_columns": (True, {}),
    "pad_to_multiple_of": (64, {}),
    "generation_batch_size": (8, {}),
    "steps_per_generation": (2, {}),
    "num_iterations": (2, {}),
    "temperature": (0.7, {}),
    "chat_template_kwargs": ({"enable_thinking": False}, {}),
    "epsilon": (0.05, {}),
    "epsilon_high": (0.05, {}),
    "delta": (1.05, {}),
    "sapo_temperature_neg": (2.0, {"loss_type": "sapo"}),
    "sapo_temperature_pos": (2.0, {"loss_type": "sapo"}),
    "vespo_k_pos": (1.0, {"loss_type": "vespo"}),
    "vespo_lambda_pos": (1.0, {"loss_type": "vespo"}),
    "vespo_k_neg": (1.0, {"loss_type": "vespo"}),
    "vespo_lambda_neg": (1.0, {"loss_type": "vespo"}),
    "importance_sampling_level": ("sequence", {"loss_type": "grpo"}),
    "reward_weights": ([0.5, 2.0], {}),
    "multi_objective_aggregation": ("normalize_then_sum", {}),
    "scale_rewards": ("none", {}),
    "loss_type": ("dr_grpo", {}),
    "mask_truncated_completions": (True, {}),
    "top_entropy_quantile": (0.3, {}),
    "entropy_coef": (0.2, {}),
    "use_adaptive_entropy": (True, {"entropy_coef": 0.2, "entropy_target": 100.0}),
    "entropy_coef_min": (0.15, {"use_adaptive_entropy": True, "entropy_coef": 0.15, "entropy_coef_delta": 0.1}),
    "entropy_coef_max": (0.21, {"use_adaptive_entropy": True, "entropy_coef": 0.2, "entropy_target": 100.0,
                                "entropy_coef_delta": 0.1}),
    "entropy_coef_delta": (0.1, {"use_adaptive_entropy": True, "entropy_coef": 0.2, "entropy_target": 100.0}),
    "entropy_target": (100.0, {"use_adaptive_entropy": True, "entropy_coef": 0.2}),
    "off_policy_mask_threshold": (0.01, {}),
    "log_completions": (True, {}),
    "log_unique_prompts": (True, {"log_completions": True}),
    "num_completions_to_print": (1, {"log_completions": True}),
}  # fmt: skip

# What a test of its own shows
SHOWN = {
    "use_vllm": "sampling/vllm/test_vllm_sampler.py::test_use_vllm_is_the_backend_unless_the_rollouts_are_trls",
    "beta": "test_trl_equality.py::test_reference_log_probs_of_a_lora_run_are_trls",
    "use_bias_correction_kl": "sampling/vllm/test_vllm_correction.py::test_the_kl_term_is_trls",
    "sync_ref_model": "reference/test_reference.py",
    "ref_model_mixup_alpha": "reference/test_reference.py",
    "ref_model_sync_steps": "reference/test_reference.py",
    "ds3_gather_for_generation": "sampling/test_generate_sampler.py",
    "gradient_checkpointing": "update/test_scoring.py",
    "bf16": "rollout/test_cache_budget.py",
    "max_tool_calling_iterations": "test_trl_equality.py::test_last_allowed_call_is_answered",
    "disable_dropout": "config/test_fields.py::test_dropout_is_disabled",
    "cast_lm_head_to_fp32": "config/test_fields.py::test_the_lm_head_is_cast_to_float32",
    "model_init_kwargs": "config/test_fields.py::test_a_model_is_loaded_as_trl_loads_it",
}

# TRL's constructor, or transformers', reads it and nobody else; this package calls both as they are
UNTOUCHED = {
    "trust_remote_code": GRPOTrainer.__init__,
    "router_aux_loss_coef": GRPOTrainer.__init__,
    "log_completions_hub_repo": GRPOTrainer.__init__,
    "log_multimodal": GRPOTrainer.__init__,  # nothing multimodal is recorded
    "use_liger_kernel": GRPOTrainer.__init__,
    "learning_rate": Trainer,
    "logging_steps": TrainingArguments,
    "lr_scheduler_kwargs": Trainer,
    "torch_empty_cache_steps": Trainer,
}

# Refused while recording
REFUSED = {
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "generation_kwargs": {"stop_strings": ["\n"]},
}

# No effect while recording, and a warning that says so
WARNED = {
    "cache_implementation": "static",
    "use_transformers_continuous_batching": True,
    "use_transformers_paged": True,
    "transformers_continuous_batching_config": {"max_batch_tokens": 64},
    "vllm_group_port": 51217,
}

# With vLLM: a value, and the modes in which it acts; in the other mode, and without vLLM, a warning says that it does
# not
VLLM = {
    "vllm_mode": ("server", {"colocate", "server"}),
    "vllm_model_impl": ("transformers", {"colocate"}),
    "vllm_enable_sleep_mode": (True, {"colocate"}),
    "vllm_server_base_url": ("http://127.0.0.1:8001", {"server"}),
    "vllm_server_host": ("127.0.0.1", {"server"}),
    "vllm_server_port": (8001, {"server"}),
    "vllm_server_timeout": (5.0, {"server"}),
    "vllm_gpu_memory_utilization": (0.5, {"colocate"}),
    "vllm_max_model_length": (640, {"colocate"}),
    "vllm_tensor_parallel_size": (2, {"colocate"}),  # refused there, with the way to have it
    "vllm_structured_outputs_regex": ("a+", {"colocate", "server"}),  # refused
    "vllm_importance_sampling_correction": (False, {"colocate", "server"}),
    "vllm_importance_sampling_mode": ("token_mask", {"colocate", "server"}),
    "vllm_importance_sampling_clip_max": (2.0, {"colocate", "server"}),
    "vllm_importance_sampling_clip_min": (0.5, {"colocate", "server"}),
    "vllm_importance_sampling_cap": (2.0, {"colocate", "server"}),
}

TABLES = (LIKE_TRL, SHOWN, UNTOUCHED, REFUSED, WARNED, VLLM)
ignore_deprecation = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


def test_every_field_of_trls_is_in_one_table():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    names = {field.name for field in dataclasses.fields(GRPOConfig)} - inherited
    names |= {*vars(GRPOConfig)["__annotations__"], *vars(base_config._BaseConfig)["__annotations__"]}
    names -= {"_VALID_DICT_FIELDS"}
    listed = [name for table in TABLES for name in table]
    assert not names - set(listed), (
        f"TRL {trl.__version__} has fields in none of the tables: {names - set(listed)}. Each acts as in TRL, or is "
        f"refused or warned of by name."
    )
    assert not set(listed) - names, f"TRL {trl.__version__} has no {set(listed) - names} any more."
    assert len(listed) == len(set(listed)), "a field stands in two tables"


# Like TRL


def other_reward(completion_ids, **kwargs):
    return [float(sum(ids) % 5) for ids in completion_ids]


def what_is_made_of(kind, monkeypatch, path, capsys, changes):
    """What a trainer makes of the script: loss, gradient, batch, figures, logs and the order of the data."""
    torch.manual_seed(0)
    rows = [{"prompt": [{"role": "user", "content": f"hello {n // 2}"}], "answer": str(n)} for n in range(4)]
    options = {"num_generations": 2, "per_device_eval_batch_size": 4, "max_completion_length": 150, **changes}
    made = run_script(kind, monkeypatch, path, SCRIPT, rows=rows, rewards=[other_reward], **options)
    trainer, found = made.trainer, {"ids": [row["ids"] for row in made.seen], "prompts": made.batch["prompt_ids"]}
    batches = iter(trainer.get_train_dataloader())
    found["data"] = [[sorted(row.items(), key=str) for row in next(batches)] for _ in range(2)]
    evaluated = iter(trainer.get_eval_dataloader(trainer.train_dataset))
    found["evaluated"] = [[row["prompt"] for row in batch] for batch in evaluated]
    for name in ("advantages", "completion_mask", "num_items_in_batch"):
        found[name] = made.batch[name]
    batch = {name: value for name, value in made.batch.items() if name != "rollout"}
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    plain = GRPOTrainer._get_per_token_logps_and_entropies
    with torch.no_grad():
        logps = plain(trainer, trainer.model, ids, mask, batch["completion_ids"].size(1))[0]
    noise = 0.15 * torch.sin(1.7 * torch.arange(logps.size(1)) + torch.arange(len(logps))[:, None])
    batch["old_per_token_logps"] = batch["sampling_per_token_logps"] = logps - noise
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    for _ in range(1 + trainer.args.use_adaptive_entropy):  # which acts from the second on
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    found["loss"], found["entropy_coef"] = loss.detach(), trainer.entropy_coef
    found["gradient"] = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    capsys.readouterr()
    metrics = trainer._metrics["train"]
    found["metrics"] = {name: list(values) for name, values in metrics.items() if "time" not in name}
    trainer.log({"probe": 1.0})
    printed = capsys.readouterr().out.splitlines()
    found["printed"] = [line for line in printed if line.startswith(("╭", "╰", "│", "├", "┌", "┃", "└", "┡"))]
    tables = sorted((path / "completions").glob("*.parquet"))
    found["logged"] = [
        [{name: value for name, value in row.items() if name != "timestamp"} for row in pq.read_table(t).to_pylist()]
        for t in tables
    ]
    return found


def same(mine, theirs):
    if isinstance(theirs, torch.Tensor):
        close = {"rtol": 1e-4, "atol": 1e-6} if theirs.is_floating_point() else {}
        return mine.shape == theirs.shape and torch.allclose(mine, theirs, **close)
    if isinstance(theirs, dict):
        return all(mine.get(name) == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True)
                   for name, value in theirs.items())  # fmt: skip
    return mine == theirs


@pytest.fixture(scope="module")
def plain_runs():
    """What is made without the field, by what else was set."""
    return {}


@pytest.mark.parametrize("name", LIKE_TRL)
def test_a_field_of_trl_acts_as_in_trl(monkeypatch, tmp_path, capsys, plain_runs, name):
    value, needed = LIKE_TRL[name]
    found = {}
    for kind in (ToolGRPOTrainer, GRPOTrainer):
        path = tmp_path / kind.__name__
        found[kind] = what_is_made_of(kind, monkeypatch, path, capsys, {**needed, name: copy.deepcopy(value)})
    ours, theirs = found[ToolGRPOTrainer], found[GRPOTrainer]
    for part, expected in theirs.items():
        assert same(ours[part], expected), part
    before = {"num_generations": 4} if name == "num_generations" else {}
    plain = plain_runs.get(str(needed))
    if plain is None or before:
        plain = what_is_made_of(ToolGRPOTrainer, monkeypatch, tmp_path / "plain", capsys, {**needed, **before})
        plain_runs[str(needed | before)] = plain
    assert not all(same(ours[part], plain[part]) for part in theirs), f"`{name}` makes no difference"


# Shown elsewhere, and untouched


@pytest.mark.parametrize("name", SHOWN)
def test_a_field_of_trl_has_a_test_of_its_own(name):
    file, _, function = SHOWN[name].partition("::")
    tree = ast.parse((Path(__file__).parents[1] / file).read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    tests = [node for node in tests if node.name == function] if function else tests
    assert tests, f"{SHOWN[name]} is no test"
    assert any(name in ast.unparse(node) for node in (tests if function else [tree])), f"{file} never sets `{name}`"


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_this_package_does_not_touch(name):
    assert f"args.{name}" in inspect.getsource(UNTOUCHED[name]) or f"self.{name}" in inspect.getsource(UNTOUCHED[name])
    assert getattr(GRPOConfig, name) == getattr(ToolGRPOConfig, name), "the default is TRL's"


def make(path, model=None, tokenizer=None, **changes):
    tokenizer = tokenizer or chat_tokenizer()
    return ToolGRPOTrainer(
        model if model is not None else tiny_model(tokenizer),
        lambda completions, **kwargs: [float(index) for index in range(len(completions))],
        config(path, **changes),
        prompts(),
        processing_class=tokenizer,
    )


def test_dropout_is_disabled(tmp_path):
    def model():
        made = tiny_model(chat_tokenizer())
        made.model.norm = torch.nn.Sequential(made.model.norm, torch.nn.Dropout(0.5))
        return made

    spreads = {}
    for disable in (True, False):
        trainer = make(tmp_path, model(), disable_dropout=disable, health_checks="off", logprob_check="off")
        trainer.train()
        spreads[disable] = trainer.state.log_history[0]["ratio/std"]
    assert spreads[True] < 1e-5 and spreads[False] > 1e-3


def test_the_lm_head_is_cast_to_float32(tmp_path):
    model = tiny_model(chat_tokenizer()).to(torch.bfloat16)
    trainer = make(tmp_path, model, cast_lm_head_to_fp32=True)
    trainer.train()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    assert policy.lm_head.weight.dtype == torch.float32 and policy.model.norm.weight.dtype == torch.bfloat16


def test_a_model_is_loaded_as_trl_loads_it(tmp_path):
    tokenizer = chat_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    trainer = make(tmp_path, str(tmp_path / "model"), tokenizer, model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype == torch.bfloat16


# Refused


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_of_trl_is_refused_by_name(tmp_path, name):
    with pytest.raises(ConfigError, match=f"`{name}"):
        config(tmp_path, **{name: REFUSED[name]})
    given = config(tmp_path, record_sample_logprobs=False, **{name: REFUSED[name]})
    assert getattr(given, name) == REFUSED[name], "TRL's own path takes it"


NO_EFFECT_IN_TRL = {"temperature", "transformers_version", "_from_model_config"}


@pytest.mark.parametrize("name", sorted(set(vars(GenerationConfig())) - NO_EFFECT_IN_TRL))
def test_arguments_of_generation_are_refused_or_warned_of(tmp_path, caplog, name):
    """All that transformers knows, at some value that is not its default."""
    value = {"do_sample": False}.get(name, 3)
    if name == "cache_implementation":
        with caplog.at_level(logging.WARNING):
            make(tmp_path, generation_kwargs={name: "static"})
        assert "`generation_kwargs: cache_implementation`" in caplog.text
        return
    with pytest.raises(ConfigError, match=f"`generation_kwargs: {name}={value}`"):
        config(tmp_path, generation_kwargs={name: value})


@pytest.mark.parametrize(
    "name", ["seed", "stop", "stop_token_ids", "logit_bias", "ignore_eos", "presence_penalty", "frequency_penalty",
             "bad_words", "allowed_token_ids", "min_tokens", "max_tokens", "structured_outputs", "extra_args", "n"]
)  # fmt: skip
def test_sampling_parameters_of_vllm_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"`generation_kwargs: {name}=3`"):
        config(tmp_path, use_vllm=True, generation_kwargs={name: 3})


def test_noise_in_the_forward_pass_of_training_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`neftune_noise_alpha=5\.0`"):
        config(tmp_path, neftune_noise_alpha=5.0)
    config(tmp_path, neftune_noise_alpha=5.0, record_sample_logprobs=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sampler_correction", "mask"), ("advantage_estimator", "gae"), ("rollout_backend", "vllm"),
     ("deterministic_rollouts", True), ("assist_warmup_steps", 1)],
)  # fmt: skip
def test_options_of_recorded_rollouts_are_refused_without_them(tmp_path, name, value):
    tokenizer = chat_tokenizer()
    with pytest.raises(ConfigError, match=f"`{name}.*rollout_func"):
        ToolGRPOTrainer(
            tiny_model(tokenizer), other_reward, config(tmp_path, **{name: value}), prompts(),
            processing_class=tokenizer, rollout_func=lambda prompts, trainer: {},
        )  # fmt: skip


# Warned of


def warned(caplog, path, **changes):
    """Names of the fields that a trainer says have no effect."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trl_toolgrpo"):
        make(path, **changes)
    texts = [record.getMessage() for record in caplog.records if "has no effect here: " in record.getMessage()]
    return {text.split("`")[1] for text in texts}


@ignore_deprecation
@pytest.mark.parametrize("name", WARNED)
def test_an_idle_field_of_trl_is_warned_of_by_name(tmp_path, caplog, name):
    assert warned(caplog, tmp_path) == set()
    names = warned(caplog, tmp_path, **{name: WARNED[name]})
    derived = {"use_transformers_continuous_batching"} if name == "use_transformers_paged" else set()
    assert names == {name} | derived
    assert warned(caplog, tmp_path, record_sample_logprobs=False, beta=0.0) == set()


@pytest.fixture
def engines(monkeypatch):
    """vLLM that starts nothing."""
    started = []

    async def start(*args):
        started.append(args)
        raise ConfigError("the engine of the test")

    monkeypatch.setattr(vllm_rollouts, "check_installed", lambda: None)
    monkeypatch.setattr(vllm_rollouts.VLLMEngine, "start", start)
    monkeypatch.setattr(vllm_rollouts.ServedEngine, "start", start)
    return started


@ignore_deprecation
@pytest.mark.parametrize("name", VLLM)
def test_fields_of_vllm_act_or_are_warned_of(tmp_path, caplog, engines, name):
    value, modes = VLLM[name]
    derived = {"vllm_importance_sampling_clip_max"} if name == "vllm_importance_sampling_cap" else set()
    assert warned(caplog, tmp_path, **{name: value}) == {name} | derived, "without vLLM"
    for mode in ("colocate", "server"):
        idle = set() if mode in modes else {name}
        acts_by_refusal = name == "vllm_structured_outputs_regex" or (name, mode) == (
            "vllm_tensor_parallel_size", "colocate",
        )  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            found = idle
            found = warned(caplog, tmp_path, **{"use_vllm": True, "vllm_mode": mode, name: value})
        texts = [r.getMessage() for r in caplog.records if "has no effect here: " in r.getMessage()]
        found = {text.split("`")[1] for text in texts}
        if acts_by_refusal:
            assert f"`{name}" in str(caught.value)
        else:
            assert str(caught.value) == "the engine of the test"
        assert found == idle, mode

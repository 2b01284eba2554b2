"""Every option both ways, every combination that cannot work, and TRL's own configuration taken over as it stands."""

import pickle
from dataclasses import MISSING, dataclass, field, fields

import pytest
from trl import GRPOConfig, TrlParser

from trl_toolgrpo import ConfigError, ToolGRPOConfig
from trl_toolgrpo.config.checks import gpu_paths_of


ADDED = {
    "record_sample_logprobs": (True, [False]),
    "strict_trajectories": (True, [False]),
    "logprob_check": ("first", ["always", "off"]),
    "logprob_check_tolerance": (None, [0.05, 1e-6]),
    "rollout_backend": ("transformers", []),
    "max_concurrent_tools": (64, [1, 1000]),
    "tool_timeout": (30.0, [0.1, 1, None]),
    "environment_timeout": (120.0, [0.5, 600, None]),
    "tool_retries": (0, [3]),
    "max_tool_output_tokens": (512, [1, 100_000]),
    "parse_error_budget": (1, [0, 5]),
    "force_rate": (0.0, [0.5, 1.0]),
    "force_level": ("call", ["name", "schema"]),
    "assist_warmup_steps": (0, [8]),
    "disable_forcing_in_updates": (True, [False]),
    "forced_loss_coef": (1.0, [0.5]),
    "advantage_estimator": ("group", ["gae", "group_gae"]),
    "gae_gamma": (1.0, [0.0, 0.9]),
    "gae_lambda": (0.95, [0.0, 1.0]),
    "gae_unit": ("token", ["turn"]),
    "value_loss_coef": (0.5, [0.0, 2]),
    "value_clip": (0.2, [None, 1.0]),
    "value_learning_rate": (None, [1e-4]),
    "value_warmup_steps": (0, [3]),
    "value_epochs": (1, [4]),
    "value_detach": (True, [False]),
    "ref_sync_mode": ("auto", ["adapter", "merged"]),
    "health_checks": ("warn", ["raise", "off"]),
    "rollout_log_limit": (1024.0, [0.0, 0.5]),
    "replay": (None, ["a folder"]),
    "deterministic_rollouts": (False, [True]),
    "shared_prompt_updates": (True, [False]),
    "rollout_cache_gib": (None, [0.5, 12]),
    "sampler_correction": (None, ["truncate", "mask"]),
    "sampler_correction_cap": (2.0, [1.5]),
    "tool_mention_check": ("auto", ["error", "warn", "off"]),
    "keep_freed_memory": (False, [True]),
    "gpu_paths": ("none", ["all", "attention", "updates, capture"]),
}
OURS = [f.name for f in fields(ToolGRPOConfig) if f.name not in {f.name for f in fields(GRPOConfig)}]


def make(path, **changes):
    return ToolGRPOConfig(output_dir=str(path), report_to="none", bf16=False, use_cpu=True, **changes)


def make_trl(path, **changes):
    return GRPOConfig(output_dir=str(path), report_to="none", bf16=False, use_cpu=True, **changes)


def test_every_added_field_is_tested_here():
    assert set(OURS) == set(ADDED)


@pytest.mark.parametrize("name", ADDED)
def test_defaults_and_other_values(name, tmp_path):
    default, others = ADDED[name]
    assert getattr(make(tmp_path), name) == default
    needed = {"advantage_estimator": "gae"} if name.startswith(("gae_", "value_")) else {}
    if name == "sampler_correction_cap":
        needed = {"sampler_correction": "mask"}
    for value in others:
        assert getattr(make(tmp_path, **{**needed, name: value}), name) == value


@pytest.mark.parametrize("name", OURS)
def test_every_added_field_has_help(name):
    found = next(f for f in fields(ToolGRPOConfig) if f.name == name)
    assert len(found.metadata["help"]) > 20 and found.default is not MISSING
    assert f"        {name} (`" in ToolGRPOConfig.__doc__


def refused(path, **changes):
    with pytest.raises(ConfigError) as caught:
        make(path, **changes)
    return str(caught.value)


def test_options_whose_checkpoints_cannot_be_resumed_are_refused(tmp_path):
    assert "an `output_dir` that all machines share" in refused(tmp_path, save_on_each_node=True)
    assert "in the middle of an optimizer step" in refused(tmp_path, enable_jit_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("max_concurrent_tools", 0, 1),
        ("max_concurrent_tools", -4, 1),
        ("tool_retries", -1, 0),
        ("max_tool_output_tokens", 0, 1),
        ("parse_error_budget", -1, 0),
    ],
)
def test_counts_have_a_least_value(tmp_path, name, value, least):
    assert refused(tmp_path, **{name: value}) == f"You passed `{name}={value}`; it must be at least {least}."


def test_faster_ways_on_a_gpu_are_named(tmp_path):
    assert gpu_paths_of("all") == {"attention", "reading", "capture", "updates", "weights"}
    assert gpu_paths_of("none") == frozenset()
    assert gpu_paths_of("updates, capture") == {"updates", "capture"}
    message = refused(tmp_path, gpu_paths="attention,graphs")
    assert message.startswith("You passed `gpu_paths='attention,graphs'`, which names 'graphs'.")
    assert "some of attention, reading, capture, updates" in message


_LIMITS = ["tool_timeout", "environment_timeout", "logprob_check_tolerance", "rollout_cache_gib"]


@pytest.mark.parametrize("name", _LIMITS)
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_limits_are_positive_numbers(tmp_path, name, value):
    assert refused(tmp_path, **{name: value}) == f"You passed `{name}={value}`; it must be a positive number or None."


@pytest.mark.parametrize(
    ("name", "choices"),
    [("logprob_check", "first, always, off"), ("rollout_backend", "transformers, vllm")],
)
def test_unknown_choice_is_named_with_the_known_ones(tmp_path, name, choices):
    assert refused(tmp_path, **{name: "hf"}) == f"You passed `{name}='hf'`. Choose one of {choices}."


def test_a_correction_has_a_ratio_to_act_on(tmp_path):
    for cap in (1.0, 0.5, float("nan"), float("inf")):
        assert "`sampler_correction_cap=" in refused(tmp_path, sampler_correction="mask", sampler_correction_cap=cap)
    assert "nothing is capped" in refused(tmp_path, sampler_correction_cap=3.0)
    assert refused(tmp_path, sampler_correction="clip") == (
        "You passed `sampler_correction='clip'`. Choose one of truncate, mask."
    )
    assert "TRL's own" in refused(tmp_path, sampler_correction="truncate", record_sample_logprobs=False)


TRUNCATING = [("top_p", 0.9, 1.0), ("top_k", 50, 0), ("min_p", 0.1, 0.0), ("repetition_penalty", 1.1, 1.0)]


@pytest.mark.parametrize(("name", "value", "neutral"), TRUNCATING)
def test_sampling_that_reshapes_the_distribution_is_refused_while_recording(tmp_path, name, value, neutral):
    expected = (
        f"You passed `{name}={value}` while `record_sample_logprobs=True`. The trainer scores the full softmax of "
        f"logits / temperature, so a sampler that truncates or reshapes it biases every ratio by the mass it cuts "
        f"off. Leave `{name}` at its neutral value ({neutral}), or set `record_sample_logprobs=False` for TRL's own "
        f"path."
    )
    assert refused(tmp_path, **{name: value}) == expected
    inside = refused(tmp_path, generation_kwargs={name: value})
    assert inside == expected.replace(f"passed `{name}", f"passed `generation_kwargs: {name}")
    assert getattr(make(tmp_path, **{name: neutral}), name) == neutral
    assert make(tmp_path, generation_kwargs={name: neutral}).generation_kwargs == {name: neutral}
    assert getattr(make(tmp_path, record_sample_logprobs=False, **{name: value}), name) == value
    make(tmp_path, record_sample_logprobs=False, generation_kwargs={name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("typical_p", 0.9), ("epsilon_cutoff", 0.1), ("eta_cutoff", 0.1), ("do_sample", False), ("num_beams", 4)],
)
def test_generation_arguments_that_reshape_the_distribution_are_refused(tmp_path, name, value):
    assert f"`generation_kwargs: {name}={value}`" in refused(tmp_path, generation_kwargs={name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("bad_words_ids", [[3]]), ("no_repeat_ngram_size", 3), ("min_new_tokens", 4), ("max_time", 2.0)],
)
def test_generation_arguments_the_sampler_does_not_read_are_refused(tmp_path, name, value):
    message = refused(tmp_path, generation_kwargs={name: value})
    assert message == (
        f"You passed `generation_kwargs: {name}={value}` while `record_sample_logprobs=True`. The recording sampler "
        f"does not read it. Remove it, or set `record_sample_logprobs=False` for TRL's own path."
    )
    make(tmp_path, record_sample_logprobs=False, generation_kwargs={name: value})


def test_temperature_is_one_number_above_zero(tmp_path):
    assert refused(tmp_path, temperature=0.0).startswith("You passed `temperature=0.0` while")
    assert refused(tmp_path, temperature=-1.0).startswith("You passed `temperature=-1.0` while")
    assert refused(tmp_path, temperature=0.7, generation_kwargs={"temperature": 0.9}) == (
        "You passed `generation_kwargs: temperature=0.9` while `temperature=0.7`. Tokens have to be sampled at the "
        "temperature they are scored at. Set `temperature` alone."
    )
    assert make(tmp_path, temperature=0.7, generation_kwargs={"temperature": 0.7}).temperature == 0.7


def test_options_of_trls_own_vllm_rollouts_are_trls(tmp_path):
    assert make(tmp_path, use_vllm=True, record_sample_logprobs=False, generation_kwargs={"seed": 3}).use_vllm
    assert "`generation_kwargs: seed=3`" in refused(tmp_path, use_vllm=True, generation_kwargs={"seed": 3})


def test_error_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="parse_error_budget"):
        make(tmp_path, parse_error_budget=-1)


# TRL's configuration


def test_trls_configuration_is_taken_over_with_what_it_derived(tmp_path):
    given = make_trl(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=8,
        steps_per_generation=6,
        num_iterations=2,
        learning_rate=3e-5,
        beta=0.04,
        loss_type="dr_grpo",
        max_completion_length=77,
        temperature=0.9,
        chat_template_kwargs={"enable_thinking": False},
    )
    taken = ToolGRPOConfig.from_grpo_config(given)
    assert isinstance(taken, ToolGRPOConfig)
    for f in fields(GRPOConfig):
        assert getattr(taken, f.name) == getattr(given, f.name), f.name
    assert (taken.generation_batch_size, taken.steps_per_generation) == (24, 6)
    for name, (default, _) in ADDED.items():
        assert getattr(taken, name) == default
    assert type(given) is GRPOConfig and not hasattr(given, "parse_error_budget")


def test_generation_batch_size_is_taken_over_too(tmp_path):
    given = make_trl(tmp_path, per_device_train_batch_size=4, num_generations=4, generation_batch_size=16)
    taken = ToolGRPOConfig.from_grpo_config(given)
    assert (taken.generation_batch_size, taken.steps_per_generation) == (16, 4)
    assert taken.to_dict().keys() >= {f.name for f in fields(ToolGRPOConfig)}


def test_own_configuration_is_the_same_object(tmp_path):
    given = make(tmp_path, parse_error_budget=4)
    assert ToolGRPOConfig.from_grpo_config(given) is given


@dataclass
class ScriptConfig(GRPOConfig):
    """A script's own extension of TRL's configuration."""

    shop: str = field(default="bakery")

    def rolls(self):
        return f"{self.shop}: {self.num_generations}"


def test_subclass_of_trls_configuration_keeps_its_fields_and_methods(tmp_path):
    given = ScriptConfig(
        output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, shop="mill", num_generations=4
    )
    taken = ToolGRPOConfig.from_grpo_config(given)
    assert taken.rolls() == "mill: 4" and taken.to_dict()["shop"] == "mill"
    assert {name: getattr(taken, name) for name in ADDED} == {name: default for name, (default, _) in ADDED.items()}
    assert not hasattr(given, "parse_error_budget")
    # Checkpoints hold the configuration, so its class has to be one that can be found again
    assert pickle.loads(pickle.dumps(taken)).rolls() == "mill: 4"


def test_trls_configuration_that_cannot_work_is_refused(tmp_path):
    broken = ScriptConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, min_p=0.2)
    with pytest.raises(ConfigError, match=r"`min_p=0.2` while `record_sample_logprobs=True`"):
        ToolGRPOConfig.from_grpo_config(broken)
    with pytest.raises(ConfigError, match=r"`top_p=0.8` while `record_sample_logprobs=True`"):
        ToolGRPOConfig.from_grpo_config(make_trl(tmp_path, top_p=0.8))


# Flags


def test_fields_are_read_from_flags(tmp_path):
    parser = TrlParser((ToolGRPOConfig,))
    flags = [
        *("--output_dir", str(tmp_path), "--report_to", "none", "--bf16", "False", "--use_cpu", "True"),
        *("--record_sample_logprobs", "False", "--strict_trajectories", "False", "--logprob_check", "always"),
        *("--logprob_check_tolerance", "0.02", "--max_concurrent_tools", "7", "--tool_timeout", "2.5"),
        *("--environment_timeout", "7.5"),
        *("--tool_retries", "2", "--max_tool_output_tokens", "99", "--parse_error_budget", "3"),
        *("--rollout_backend", "transformers", "--force_level", "name", "--assist_warmup_steps", "4"),
        *("--disable_forcing_in_updates", "False", "--forced_loss_coef", "0.5", "--force_rate", "0.0"),
    ]
    critic = [
        *("--advantage_estimator", "gae", "--gae_gamma", "0.9", "--gae_lambda", "0.8", "--gae_unit", "turn"),
        *("--value_loss_coef", "1.5", "--value_clip", "0.3", "--value_learning_rate", "0.01"),
        *("--value_warmup_steps", "2", "--value_epochs", "4", "--value_detach", "False", "--ref_sync_mode", "merged"),
        *("--deterministic_rollouts", "True", "--sampler_correction", "mask", "--sampler_correction_cap", "3"),
        *("--shared_prompt_updates", "False", "--rollout_cache_gib", "0.5"),
        *("--health_checks", "raise", "--rollout_log_limit", "2.5", "--replay", "a folder"),
        *("--tool_mention_check", "warn", "--keep_freed_memory", "True", "--gpu_paths", "reading,capture"),
    ]
    (parsed,) = parser.parse_args_and_config(flags)
    assert isinstance(parsed, ToolGRPOConfig)
    expected = {
        "record_sample_logprobs": False,
        "strict_trajectories": False,
        "logprob_check": "always",
        "logprob_check_tolerance": 0.02,
        "rollout_backend": "transformers",
        "max_concurrent_tools": 7,
        "tool_timeout": 2.5,
        "environment_timeout": 7.5,
        "tool_retries": 2,
        "max_tool_output_tokens": 99,
        "parse_error_budget": 3,
        "force_rate": 0.0,
        "force_level": "name",
        "assist_warmup_steps": 4,
        "disable_forcing_in_updates": False,
        "forced_loss_coef": 0.5,
    }
    assert {name: getattr(parsed, name) for name in expected} == expected
    (parsed,) = parser.parse_args_and_config([*flags[:8], *critic])
    expected_critic = {
        "advantage_estimator": "gae",
        "gae_gamma": 0.9,
        "gae_lambda": 0.8,
        "gae_unit": "turn",
        "value_loss_coef": 1.5,
        "value_clip": 0.3,
        "value_learning_rate": 0.01,
        "value_warmup_steps": 2,
        "value_epochs": 4,
        "value_detach": False,
        "ref_sync_mode": "merged",
        "deterministic_rollouts": True,
        "sampler_correction": "mask",
        "sampler_correction_cap": 3.0,
        "shared_prompt_updates": False,
        "rollout_cache_gib": 0.5,
        "health_checks": "raise",
        "rollout_log_limit": 2.5,
        "replay": "a folder",
        "tool_mention_check": "warn",
        "keep_freed_memory": True,
        "gpu_paths": "reading,capture",
    }
    assert {name: getattr(parsed, name) for name in expected_critic} == expected_critic
    assert {*expected, *expected_critic} == set(ADDED)


def test_flags_override_yaml(tmp_path):
    yaml = tmp_path / "run.yaml"
    yaml.write_text("parse_error_budget: 4\ntool_timeout: 1.5\nlogprob_check: 'off'\nbf16: false\nuse_cpu: true\n")
    parser = TrlParser((ToolGRPOConfig,))
    flags = ["--config", str(yaml), "--parse_error_budget", "2", "--output_dir", str(tmp_path), "--report_to", "none"]
    (parsed,) = parser.parse_args_and_config(flags)
    assert (parsed.parse_error_budget, parsed.tool_timeout, parsed.logprob_check) == (2, 1.5, "off")


def test_unknown_choice_on_the_command_line_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        TrlParser((ToolGRPOConfig,)).parse_args_and_config(["--output_dir", str(tmp_path), "--logprob_check", "often"])
    assert "invalid choice: 'often'" in capsys.readouterr().err

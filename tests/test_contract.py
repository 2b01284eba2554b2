"""
What this package relies on in TRL and transformers beyond their public interfaces.

A failure here means that a new release has changed something we override, call or assume. The message says what, and
which module of ours to look at; every other failing test is likely to follow from it.
"""

import ast
import asyncio
import dataclasses
import inspect
import textwrap
from importlib import resources
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
import trl
from conftest import chat_tokenizer, config, prompts, tiny_model
from huggingface_hub.errors import HfHubHTTPError
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.chat_parsing.response_parser import ResponseParser, parse_response
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import add_response_schema
from trl.extras import profiling
from trl.trainer.utils import RepeatSampler, add_fused_lm_head

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.hub import model_card
from trl_toolgrpo.models.rotary import RowFrequencies
from trl_toolgrpo.sampling.vllm.engine import supported_versions


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    return textwrap.dedent(inspect.getsource(function))


SIGNATURES = {
    # method: (its parameters, what of ours relies on it)
    "_generate": (["self", "prompts"], "trainer.ToolGRPOTrainer._generate adds `trajectories` to its result"),
    "_generate_single_turn": (
        ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        "trainer.ToolGRPOTrainer._generate_single_turn replaces it",
    ),
    "_tool_call_loop": (
        [
            "self",
            "prompts",
            "prompt_ids",
            "completion_ids",
            "completions",
            "logprobs",
            "images",
            "multimodal_fields",
        ],
        "trainer.ToolGRPOTrainer._tool_call_loop replaces it",
    ),
    "_tokenize_prompts": (
        ["self", "prompts"],
        "trainer.ToolGRPOTrainer._tokenize_prompts renders each prompt with its own tools",
    ),
    "_generate_and_score_completions": (
        ["self", "inputs"],
        "trainer.ToolGRPOTrainer._generate_and_score_completions sets the old log-probs",
    ),
    "_compute_loss": (["self", "model", "inputs"], "trainer.ToolGRPOTrainer._compute_loss takes the ratio from it"),
    "log": (["self", "logs", "start_time"], "trainer.ToolGRPOTrainer.log adds metrics"),
    # those of transformers' Trainer
    "create_optimizer": (
        ["self", "model"],
        "critic.critic.Critic.create_optimizer gives the value head a group of its own",
    ),
    "training_step": (["self", "model", "inputs", "num_items_in_batch"], "critic.critic.Critic.training_step"),
    "save_model": (
        ["self", "output_dir", "_internal_call"],
        "critic.critic.Critic.save_model writes the value head as well",
    ),
    "_save": (
        ["self", "output_dir", "state_dict"],
        "critic.critic.Critic._save keeps the value head out of the policy",
    ),
    "_load_from_checkpoint": (
        ["self", "resume_from_checkpoint", "model"],
        "critic.critic.Critic._load_from_checkpoint reads the value head",
    ),
    "_load_optimizer_and_scheduler": (
        ["self", "checkpoint"],
        "critic.critic.Critic._load_optimizer_and_scheduler resumes a run that had no value head",
    ),
    "_load_best_model": (["self"], "critic.critic.Critic._load_best_model reads the value head"),
    "_prepare_inputs": (
        ["self", "generation_batch"],
        "update.micro_batches.GroupedUpdates._prepare_inputs splits it anew",
    ),
    "_get_train_sampler": (["self", "dataset"], "checkpoints.resume.ExactResume._get_train_sampler keeps it"),
    "_save_checkpoint": (
        ["self", "model", "trial"],
        "checkpoints.resume.ExactResume._save_checkpoint publishes what it wrote",
    ),
    "_save_optimizer_and_scheduler": (
        ["self", "output_dir"],
        "checkpoints.resume.ExactResume._save_optimizer_and_scheduler tolerates a full disk; for FSDP it replaces the "
        "method",
    ),
    "_save_scaler": (["self", "output_dir"], "checkpoints.resume.ExactResume._save_scaler tolerates a full disk"),
    "_save_rng_state": (
        ["self", "output_dir"],
        "checkpoints.resume.ExactResume._save_rng_state tolerates a full disk",
    ),
    "_get_output_dir": (
        ["self", "trial"],
        "checkpoints.resume.ExactResume._get_output_dir has checkpoints written elsewhere",
    ),
    "_push_from_checkpoint": (
        ["self", "checkpoint_folder"],
        "checkpoints.resume.ExactResume._push_from_checkpoint waits; hub.push.HubPush._push_from_checkpoint replaces "
        "it",
    ),
    "_finalize_training": (
        ["self", "trial", "num_train_samples", "start_time"],
        "hub.push.HubPush._finalize_training waits for uploads before checkpoints are removed, and "
        "run_folder.writer.RunLog._finalize_training gives it a start by the monotonic clock",
    ),
    "init_hf_repo": (["self", "token", "private"], "hub.push.HubPush.init_hf_repo continues without the Hub"),
    "push_to_hub": (
        ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
        "hub.push.HubPush.push_to_hub pushes a folder of its own",
    ),
    "create_model_card": (
        ["self", "model_name", "dataset_name", "tags"],
        "hub.model_card.RunCard.create_model_card adds to it",
    ),
    "_finish_current_push": (["self"], "hub.push.HubPush._push_from_checkpoint waits for the one before"),
    "_init_training_state": (
        ["self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"],
        "checkpoints.resume.ExactResume._init_training_state brings the sampler to the epoch",
    ),
    "train": (
        ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
        "checkpoints.resume.ExactResume.train looks for the checkpoint",
    ),
    "set_initial_training_values": (
        ["self", "args", "dataloader"],
        "validation.chat_templates.training_steps counts so",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_we_override(name):
    expected, use = SIGNATURES[name]
    assert hasattr(GRPOTrainer, name), f"TRL {trl.__version__} has no GRPOTrainer.{name}; {use}."
    found = parameters(getattr(GRPOTrainer, name))
    assert found == expected, f"TRL changed the parameters of GRPOTrainer.{name} from {expected} to {found}; {use}."


WRITTEN = {
    # method: (what its source holds, what of ours relies on it)
    "_prepare_inputs": (
        (
            "self._step % generate_every == 0 or self._buffered_inputs is None",
            "split_tensor_dict(generation_batch, self.args.steps_per_generation)",
            "self._buffered_inputs[self._step % self.args.steps_per_generation]",
        ),
        "checkpoints.resume.ExactResume stores `_step` and `_buffered_inputs`; update.micro_batches.GroupedUpdates "
        "splits them anew",
    ),
    "_save_checkpoint": (("self._get_output_dir(trial=trial)",), "checkpoints.resume.ExactResume redirects it"),
    "_save_optimizer_and_scheduler": (
        (
            "elif self.is_fsdp_enabled:",
            "self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir, **get_fsdp_ckpt_kwargs()",
            "self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir",
            "torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))",
        ),
        "checkpoints.resume.ExactResume._save_optimizer_and_scheduler makes these calls for FSDP and tolerates "
        "failures",
    ),
    "_inner_training_loop": (
        ("self._tr_loss = torch.tensor(0.0", "self._globalstep_last_logged = ", "self._run_epoch("),
        "checkpoints.resume.ExactResume._run_epoch takes up the loss not logged yet",
    ),
    "_run_epoch": (
        ("skip_first_batches(train_dataloader, steps_trained_in_current_epoch)", "self._load_rng_state("),
        "checkpoints.resume.ExactResume leaves the position within an epoch and the random numbers to it",
    ),
    "_prepare_for_training": (
        ("self._load_optimizer_and_scheduler(resume_from_checkpoint)",),
        "checkpoints.resume.ExactResume loads its own part there",
    ),
}


LOGGED = {
    "log": (
        (
            "if self.accelerator.is_main_process and self.log_completions:",
            'f"completions_{self.state.global_step:05d}.parquet"',
            'self._logs["prompt"]',
            'dict(self._logs["extra"])',
            "self.state.log_history.append(output)\n    self.control = self.callback_handler.on_log(",
        ),
        "run_folder.writer.RunLog.log gives another `_logs`, tells its failures from those of the table, removes a "
        "torn one",
    ),
    "_log_completion_extra": (
        ("self._pending_extra_logs[column].extend(values)",),
        "run_folder.writer.RunLog._calculate_rewards aligns them",
    ),
    "_calculate_rewards": (
        ('reward_kwargs["log_extra"] = self._log_completion_extra', 'reward_kwargs["log_metric"] = self._log_metric'),
        "validation.rewards gives reward functions its own in their place",
    ),
    "_generate_and_score_completions": (
        ("observation = environment.reset(", '"content": content + observation}'),
        "chat.inert_prompts.with_observation finds what `reset` said at the end of the last message",
    ),
}


def test_the_profiler_is_looked_up_when_it_begins():
    assert "ProfilingContext(" in source(profiling.profiling_context), (
        "run_folder.log_failures.of_profiling replaces it"
    )
    assert parameters(profiling.ProfilingContext._log_metrics) == ["self", "duration"]


PUSHED = {
    "push_to_hub": (
        (
            "self.callback_handler.on_push_begin(self.args, self.state, self.control)",
            "if self.hub_model_id is None:\n        self.init_hf_repo(",
            "revision = self.args.hub_revision",
            "return hf_api().upload_folder(",
        ),
        "hub.push.HubPush.push_to_hub does the same with a folder of its own",
    ),
    "save_model": (
        ("if self.args.push_to_hub and not _internal_call:",),
        "hub.push.HubPush.save_model pushes by itself",
    ),
    "create_model_card": (
        ('model_card.save(os.path.join(self.args.output_dir, "README.md"))',),
        "hub.model_card.RunCard.create_model_card reads it there",
    ),
    "_save": (("torch.save(self.args, ",), "hub.push.HubPush._save keeps the Hub token out of them"),
}


def test_the_model_card_has_its_headings():
    template = (resources.files("trl") / "templates" / "lm_model_card.md").read_text(encoding="utf-8")
    for heading in (model_card.PROCEDURE, model_card.VERSIONS):
        assert heading in template, (
            f"TRL's model card has no {heading!r}; `hub.model_card.RunCard` keeps what follows it."
        )
    assert len(model_card.METHOD.findall(template)) == 1, (
        "TRL's model card has another sentence on the method; `hub.model_card.RunCard` puts its own in place of it."
    )
    assert HfHubHTTPError.__bases__[0].__name__ == "HTTPError", "hub/push.py catches what all HTTP failures are"


@pytest.mark.parametrize("name", [*WRITTEN, *LOGGED, *PUSHED])
def test_what_resuming_and_pushing_rely_on(name):
    found, use = {**WRITTEN, **LOGGED, **PUSHED}[name]
    owners = [kind for kind in GRPOTrainer.__mro__ if name in vars(kind)]
    body = "".join(source(getattr(kind, name)) for kind in owners)
    for expression in found:
        assert expression in body, f"`{name}` no longer holds `{expression}`; {use}."


def test_the_sampler_draws_an_order_for_each_epoch():
    sampler = RepeatSampler(range(10), 1, seed=3)
    orders = [list(sampler) for _ in range(3)]
    again = RepeatSampler(range(10), 1, seed=3)
    for _ in range(2):
        torch.randperm(again.num_samples, generator=again.generator)
    assert list(again) == orders[2] != orders[0], (
        "TRL's RepeatSampler draws its order otherwise; checkpoints.resume.ExactResume._init_training_state skips "
        "orders."
    )


def test_the_fused_head_scores_the_positions_it_is_given():
    """`update/scoring.py` passes shifted labels, and has the backbone return fewer positions than it was given."""
    body = source(add_fused_lm_head)
    for expression in (
        "getattr(self, backbone_attr)(*args, **kwargs)",
        "hidden_states = backbone_outputs.last_hidden_state",
        "labels = shift_labels",
        'backbone_attr = "base_model"',
    ):
        assert expression in body, (
            f"add_fused_lm_head of TRL {trl.__version__} no longer holds `{expression}`; update.scoring.only_at and "
            f"critic.value_head.attach_value_head hook the backbone, and update/scoring.py passes `shift_labels`."
        )


def test_four_dimensional_masks_reach_attention_as_they_are():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    model = tiny_model(chat_tokenizer())
    made = create_causal_mask(model.config, torch.zeros(1, 3, 8), mask, past_key_values=None)
    assert made is mask, (
        "transformers changes a mask of four dimensions; update/scoring.py passes those of packed rollouts."
    )


def test_signature_of_the_scoring_pass():
    found = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    expected = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert found[:6] == expected, (
        f"GRPOTrainer._get_per_token_logps_and_entropies starts with {found[:6]}, no longer {expected}; "
        f"trainer.ToolGRPOTrainer._get_per_token_logps_and_entropies and update.scoring._score_rollouts pass these."
    )


def test_constructor_takes_what_ours_passes_on():
    from trl_toolgrpo import ToolGRPOTrainer

    theirs, ours = parameters(GRPOTrainer.__init__), parameters(ToolGRPOTrainer.__init__)
    assert ours[: len(theirs)] == theirs, (
        f"The parameters of GRPOTrainer.__init__ are {theirs}, ours start {ours[: len(theirs)]}: a script that passes "
        f"them by position or by a new name breaks; see trainer.ToolGRPOTrainer.__init__."
    )


# What methods return and read, in order


def returned_names(function):
    """Names in the last `return a, b, c` of a function."""
    tree = ast.parse(source(function))
    values = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple)]
    return [getattr(element, "id", None) for element in values[-1].elts]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "_generate",
            [
                "prompt_ids",
                "completion_ids",
                "tool_mask",
                "completions",
                "logprobs",
                "extra_fields",
                "images",
                "tool_images",
            ],
        ),
        (
            "_tool_call_loop",
            [
                "tool_mask",
                "completions",
                "completion_ids",
                "logprobs",
                "tool_call_count",
                "tool_failure_count",
                "tool_images",
            ],
        ),
        ("_generate_single_turn", ["completion_ids", "logprobs"]),
        ("_tokenize_prompts", ["prompt_ids", "images", "multimodal_fields"]),
    ],
)
def test_results_of_what_we_override(name, expected):
    found = returned_names(getattr(GRPOTrainer, name))
    assert found == expected, (
        f"GRPOTrainer.{name} returns {found}, no longer {expected}; trainer.ToolGRPOTrainer.{name} returns or unpacks "
        f"the same."
    )


READ_IN = {
    # expression in TRL's source: (method, what of ours relies on it)
    "gradient_accumulation_steps % generate_every": (
        "_generate_and_score_completions",
        "trainer._scores_old_logprobs repeats it, to know when TRL's first scoring pass is the one to skip",
    ),
    "generate_every = self.args.steps_per_generation * self.num_iterations": (
        "_generate_and_score_completions",
        "trainer._scores_old_logprobs repeats it",
    ),
    'output["sampling_per_token_logps"] = sampling_per_token_logps': (
        "_generate_and_score_completions",
        "reference.sync.ReferenceSync._log_divergence compares the reference with them",
    ),
    'output["tool_mask"] = tool_mask': (
        "_generate_and_score_completions",
        "trainer._correct_masks corrects it",
    ),
    '"num_items_in_batch": num_items_in_batch': (
        "_generate_and_score_completions",
        "trainer._correct_masks corrects it",
    ),
    "for tool in self._standalone_tools + methods": (
        "_generate_and_score_completions",
        "trainer._prepare_recording empties `_standalone_tools`, since the executor calls the tools",
    ),
    "self._environment_pool[name]": (
        "_generate_and_score_completions",
        "rollout.tools_of_rollouts._drop_lost_environments takes environments out of the pool",
    ),
    "pool.append(self.environment_factories[name]())": (
        "_generate_and_score_completions",
        "tools.environments.on_own_thread wraps the factory, so that new environments get a thread",
    ),
    "observation = environment.reset(": (
        "_generate_and_score_completions",
        "tools.runtime.environments runs `reset` on the environment's thread",
    ),
    "self._env_tools[name]": (
        "_tokenize_prompts",
        "trainer._tokenize_prompts swaps it for the tools of each row",
    ),
    "zip(prompts, self._batch_environments": (
        "_tokenize_prompts",
        "trainer._tokenize_prompts swaps it for row numbers",
    ),
    "if self.tools:": ("_generate", "trainer._prepare_recording relies on TRL calling `_tool_call_loop` with tools"),
    "self._generate_single_turn(": ("_generate", "trainer._generate_single_turn is the rollout without tools"),
    "self._tool_call_loop(": ("_generate", "trainer._tool_call_loop is the rollout with tools"),
    '["completions/clipped_ratio"].append(': ("_generate", "trainer._log_rollouts corrects the last value"),
    '["completions/mean_terminated_length"].append(': ("_generate", "trainer._log_rollouts corrects the last value"),
    'inputs.get("old_per_token_logps")': ("_compute_loss", "the recorded log-probs are the old ones of the ratio"),
    'adapter_name="ref" if "ref" in model.peft_config else None': (
        "_generate_and_score_completions",
        "reference.adapter.AdapterReference is found by that name; reference.merged.MergedReference is scored with "
        "the adapter off",
    ),
    "if args.sync_ref_model:": ("__init__", "reference.sync.synced_by_us keeps TRL from it"),
    "def get_reward(environments, _env_type=env_type, **kwargs)": (
        "__init__",
        "tools.environments.scoring_without_failed knows it by its default, and passes another class",
    ),
    "type(e) is _env_type": ("__init__", "tools.environments.scoring_without_failed passes another class"),
    "self._step += 1": ("training_step", "config.batch_position.batch_number counts rollout batches by it"),
    "if self._step % generate_every == 0": ("_prepare_inputs", "config.batch_position.batch_is_due repeats it"),
    "self._get_per_token_logps_and_entropies(": (
        "_compute_loss",
        "trainer._compute_loss takes the policy's log-probs from this call",
    ),
}


@pytest.mark.parametrize("expression", READ_IN)
def test_source_we_rely_on(expression):
    method, use = READ_IN[expression]
    assert expression in source(getattr(GRPOTrainer, method)), (
        f"GRPOTrainer.{method} of TRL {trl.__version__} no longer holds `{expression}`; {use}."
    )


def test_the_loss_reads_its_inputs_after_the_scoring_pass():
    """`update/sampler_correction.py` changes them in that pass."""
    text = source(GRPOTrainer._compute_loss)
    scored = text.index("self._get_per_token_logps_and_entropies(")
    for name in ('inputs["advantages"]', 'inputs.get("old_per_token_logps")'):
        assert text.index(name) > scored, f"GRPOTrainer._compute_loss reads `{name}` before it scores."


def test_scoring_passes_come_in_the_order_we_assume():
    """The pass for old log-probs is the first over the policy; the reference's comes after it."""
    tree = ast.parse(source(GRPOTrainer._generate_and_score_completions))
    in_order = sorted(
        (node.lineno, ast.unparse(node.args[0]))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._get_per_token_logps_and_entropies"
    )
    assert [model for _, model in in_order] == ["self.model", "self.ref_model", "self.model"], (
        f"GRPOTrainer._generate_and_score_completions scores {in_order}, not the policy, the reference, and the "
        f"policy with its adapter off; trainer.py skips the first pass over `self.model`."
    )


ATTRIBUTES = {
    "_tokenizer": "trainer._prepare_recording and ._generate_single_turn",
    "_is_vlm": "trainer._prepare_recording leaves multimodal models to TRL",
    "_logs": "critic.critic._estimate_advantages replaces the logged advantages",
    "aux_loss_enabled": (
        "critic.critic._prepare_critic refuses a router loss, update.micro_batches._may_be_split_anew keeps "
        "its split"
    ),
    "_entropy_bonus_enabled": (
        "update.micro_batches._may_be_split_anew keeps the split that the entropy bonus is taken over"
    ),
    "top_entropy_quantile": "update.micro_batches._may_be_split_anew keeps the split that the quantile is taken over",
    "reward_func_names": "update.assisted_warmup._calculate_rewards names the reward function",
    "_metrics": "trainer._log_rollouts and .log",
    "_dist": "rollout.engine.unwrapped_policy gathers parameters",
    "_standalone_tools": "trainer._prepare_recording",
    "_environment_pool": "rollout.tools_of_rollouts._read_environments and ._drop_lost_environments",
    "_env_tools": "rollout.tools_of_rollouts._read_environments and trainer._tokenize_prompts",
    "environments": "trainer._roll_out",
    "environment_factories": "trainer._prepare_recording",
    "tools": "trainer._prepare_recording and ._roll_out",
    "chat_template": "rollout.tools_of_rollouts._make_chat",
    "chat_template_kwargs": "rollout.tools_of_rollouts._make_chat",
    "eos_token_ids": "trainer._prepare_recording: rollout/engine.py stops there",
    "mask_truncated_completions": "trainer._correct_masks",
    "num_iterations": "config.batch_position.micro_batches_of, by its name in the configuration,",
    "_step": "config.batch_position counts micro-batches by it",
    "_buffered_inputs": "config.batch_position.batch_is_due",
    "ref_model": "reference.sync._prepare_reference",
    "is_fsdp_enabled": "reference.sync._prepare_reference refuses merged weights",
    "is_deepspeed_enabled": "reference.sync._prepare_reference refuses merged weights",
    "model_wrapped": "rollout.engine.unwrapped_policy",
    "use_vllm": "update.sampler_correction._correct has TRL's loss multiplied by the importance sampling weight",
    "vllm_importance_sampling_correction": "update.sampler_correction._correct",
}


class Box:
    """An environment with one tool."""

    def reset(self, **kwargs):
        pass

    def open(self, key: str) -> str:
        """
        Open it.

        Args:
            key: The key.
        """
        return key

    def get_reward(self):
        return 0.0


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    async def fetch(key: str) -> str:
        """
        Fetch.

        Args:
            key: What.
        """
        return key

    tokenizer = chat_tokenizer()
    return GRPOTrainer(
        tiny_model(tokenizer),
        args=config(tmp_path_factory.mktemp("contract")),
        train_dataset=prompts(),
        processing_class=tokenizer,
        tools=[fetch],
        environment_factory=Box,
    )


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_trls_trainer(trl_trainer, name):
    assert hasattr(trl_trainer, name), (
        f"TRL {trl.__version__} sets no GRPOTrainer.{name} at construction; {ATTRIBUTES[name]} reads it."
    )


def test_batch_environments_is_set_for_each_batch():
    assert "self._batch_environments = " in source(GRPOTrainer._generate_and_score_completions), (
        "GRPOTrainer._generate_and_score_completions no longer sets `_batch_environments`; trainer._tokenize_prompts "
        "swaps it."
    )


def test_shapes_of_those_attributes(trl_trainer):
    assert set(trl_trainer._metrics) == {"train", "eval"}, "GRPOTrainer._metrics changed; see trainer._log_rollouts."
    assert list(trl_trainer._environment_pool) == [None] and isinstance(trl_trainer._environment_pool[None], list), (
        "GRPOTrainer._environment_pool is no longer {name: [instances]} with None for a single environment; see "
        "rollout.tools_of_rollouts._read_environments."
    )
    assert isinstance(trl_trainer._environment_pool[None][0], Box), (
        "GRPOTrainer no longer makes a first environment at construction; "
        "rollout.tools_of_rollouts._read_environments reads its methods."
    )
    names = [tool.__name__ for tool in trl_trainer._env_tools[None]]
    assert names == ["fetch", "open"], (
        f"GRPOTrainer._env_tools holds {names} for an environment, not the functions and then its methods; see "
        f"rollout.tools_of_rollouts._read_environments."
    )
    assert [tool.__name__ for tool in trl_trainer._standalone_tools] == ["fetch"], (
        "GRPOTrainer._standalone_tools is no longer the functions alone; trainer._prepare_recording empties it."
    )
    assert isinstance(trl_trainer.eos_token_ids, list), (
        "GRPOTrainer.eos_token_ids is no list; see trainer._prepare_recording."
    )


@pytest.mark.parametrize("kind", ["tool", "reward"])
def test_trls_event_loop_is_for_reward_functions_alone(tmp_path, kind):
    """Coroutine functions run on our loop if they are tools, and on TRL's if they are reward functions."""
    ran_on = []

    async def look_up(key: str) -> str:
        """
        Look up.

        Args:
            key: What.
        """
        return key

    async def reward(completions, **kwargs):
        ran_on.append(asyncio.get_running_loop())
        return [float(index) for index in range(len(completions))]

    tokenizer = chat_tokenizer()
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        reward if kind == "reward" else lambda completions, **kwargs: [0.0, 1.0, 2.0, 3.0],
        config(tmp_path),
        prompts(),
        processing_class=tokenizer,
        tools=[look_up],
    )
    assert trainer._has_async_funcs == (kind == "reward"), (
        "GRPOTrainer starts its event loop by something else than coroutine functions among tools and rewards; "
        "trainer.__init__ gives it tools that are none, so that no tool can block it or end its thread."
    )
    if kind == "reward":
        trainer.train()
        assert set(ran_on) == {trainer.async_loop}, (
            "GRPOTrainer runs async reward functions elsewhere than on its `async_loop`."
        )
        assert ran_on[0] is not trainer._executor._loop.get()


def test_context_managers_for_generation(trl_trainer):
    from trl.models import unwrap_model_for_generation
    from trl.models.utils import disable_gradient_checkpointing

    found = parameters(unwrap_model_for_generation)
    assert found[:3] == ["model", "accelerator", "gather_deepspeed3_params"] and (
        "gradient_checkpointing_kwargs" in found
    ), f"trl.models.unwrap_model_for_generation takes {found}; rollout.engine.unwrapped_policy calls it."
    assert parameters(disable_gradient_checkpointing) == ["model", "gradient_checkpointing_kwargs"], (
        "trl.models.utils.disable_gradient_checkpointing has other parameters; update.scoring._scoring_mode calls it."
    )
    with (
        unwrap_model_for_generation(trl_trainer.model_wrapped, trl_trainer.accelerator) as policy,
        trl_trainer._dist.summon_full_params(trl_trainer.model_wrapped, recurse=False),
    ):
        assert policy is trl_trainer.model, (
            "unwrap_model_for_generation gives no policy; see rollout.engine.unwrapped_policy."
        )


def test_what_logs_and_replays_ask_of_trl(trl_trainer):
    generate = source(GRPOTrainer._generate)
    assert "return prompt_ids, completion_ids, tool_mask, completions," in generate, (
        "GRPOTrainer._generate returns something else; run_folder.writer.RunLog takes the completions from the fourth "
        "place."
    )
    assert 'self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]' in generate, (
        "GRPOTrainer._generate no longer replaces `num_tokens`; run_folder.writer.RunLog and run_folder.replay.Replay "
        "treat it so."
    )
    assert {"prompt", "completion", "rewards", "advantages"} <= set(trl_trainer._logs), (
        f"GRPOTrainer._logs holds {sorted(trl_trainer._logs)}; run_folder.replay.Replay fills it."
    )
    assert parameters(GRPOTrainer._save_checkpoint) == ["self", "model", "trial"], (
        "GRPOTrainer._save_checkpoint has other parameters; monitoring.health.watch.HealthWatch calls it."
    )
    logged = source(transformers.Trainer.log)
    assert "self.state.log_history.append(output)" in logged and "self.callback_handler.on_log(" in logged, (
        "Trainer.log no longer ends with the log history and the callbacks; run_folder.writer.RunLog reads the last "
        "entry."
    )
    assert "tb_writer" in source(transformers.integrations.TensorBoardCallback.__init__), (
        "TensorBoardCallback has no `tb_writer`; monitoring.trackers.Live writes texts with it."
    )


def test_what_references_ask_of_peft():
    config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    policy = peft.get_peft_model(tiny_model(chat_tokenizer()), config)
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    use = f"PEFT {peft.__version__}; reference/merged.py reads it."
    for name in ("get_delta_weight", "get_base_layer", "lora_variant", "lora_bias", "disable_adapters", "_caches"):
        assert hasattr(layer, name), f"LoRA layers have no `{name}` in {use}"
    assert parameters(layer.merge) == ["safe_merge", "adapter_names"], f"`merge` changed in {use}"
    variant = layer.lora_variant["default"]
    assert parameters(variant.merge_safe) == ["module", "active_adapter", "orig_weight"], f"DoRA changed in {use}"
    assert "selected_adapters" in parameters(policy.save_pretrained), (
        f"reference.sync._save leaves out the reference; {use}"
    )


def test_what_else_the_trainer_imports():
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving
    from trl.extras.profiling import profiling_context
    from trl.trainer.utils import get_config_model_id

    for function, expected, use in (
        (add_response_schema, "processing_class", "rollout.tools_of_rollouts._read_environments"),
        (get_training_chat_template, "processing_class", "rollout.tools_of_rollouts._read_environments"),
        (is_chat_template_prefix_preserving, "processing_class", "rollout.tools_of_rollouts._read_environments"),
        (get_config_model_id, "config", "trainer.__init__"),
        (profiling_context, "trainer", "trainer._roll_out"),
    ):
        assert parameters(function)[0] == expected, (
            f"{function.__module__}.{function.__name__} takes {parameters(function)}; {use} passes a {expected}."
        )


def test_config_is_derived_as_we_assume():
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    for name in (
        "disable_dropout",
        "ds3_gather_for_generation",
        "generation_kwargs",
        "gradient_checkpointing_kwargs",
        "max_completion_length",
        "max_tool_calling_iterations",
        "min_p",
        "repetition_penalty",
        "steps_per_generation",
        "temperature",
        "top_k",
        "top_p",
        "use_vllm",
        "vllm_enable_sleep_mode",
        "vllm_gpu_memory_utilization",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_max_model_length",
        "vllm_mode",
        "vllm_model_impl",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_structured_outputs_regex",
        "vllm_tensor_parallel_size",
    ):
        assert name in names, (
            f"GRPOConfig has no `{name}` any more; config/checks.py, trainer.py or rollout/engine.py reads it."
        )


def test_trl_says_which_versions_of_vllm_it_supports():
    assert str(supported_versions()), "TRL's metadata names no vLLM; sampling/vllm/engine.py reads the versions there."


def test_trls_loss_takes_an_importance_sampling_weight():
    loss = source(GRPOTrainer._compute_loss)
    condition = 'self.use_vllm and self.vllm_importance_sampling_correction and self.loss_type != "vespo"'
    assert condition in loss and 'per_token_loss * inputs["importance_sampling_ratio"]' in loss, (
        "GRPOTrainer._compute_loss multiplies by the importance sampling weight under another condition; "
        "update.sampler_correction._correct sets `use_vllm` for it."
    )
    assert 'importance_sampling_ratio=inputs.get("importance_sampling_ratio")' in loss, (
        "VESPO takes its importance sampling weight from elsewhere; update.sampler_correction._correct puts it into "
        "the inputs."
    )
    assert 'old_per_token_logps = inputs.get("old_per_token_logps")' in loss.split(
        "_get_per_token_logps_and_entropies("
    )[1], (
        "GRPOTrainer._compute_loss reads old log-probs before it scores; "
        "update.sampler_correction._correct replaces them then."
    )


def test_trl_makes_its_vllm_engine_by_an_option_and_a_name():
    source = inspect.getsource(GRPOTrainer.__init__)
    assert "if self.use_vllm:" in source and "VLLMGeneration(" in source, (
        "GRPOTrainer.__init__ makes its vLLM engine in another way than rollout.vllm_rollouts.without_trls_vllm "
        "relies on."
    )


# transformers


def test_response_parser_can_be_made_tolerant():
    members = {
        "_open_explicit": ["self", "events", "field", "m"],
        "_scan": ["self", "watch", "eos"],
        "_accumulate": ["self", "events", "text"],
        "_close_current": ["self", "events"],
        "_reset_to_implicit": ["self"],
        "finalize": ["self"],
    }
    for name, expected in members.items():
        found = parameters(getattr(ResponseParser, name, lambda: None))
        assert found == expected, (
            f"transformers {transformers.__version__}: ResponseParser.{name} takes {found}; "
            f"chat.parsing._TolerantParser overrides or calls it with {expected}."
        )
    template = add_response_schema(chat_tokenizer()).response_template
    parser = ResponseParser(template, prefix="", tools=[])
    for name in ("_body", "_buffer", "_current", "_opened", "_output", "_spec"):
        assert hasattr(parser, name), f"ResponseParser has no `{name}`; chat.parsing._TolerantParser reads it."
    parser.feed('<tool_call>\n{"name": "a"')
    assert parser._current == "tool_calls" and parser._body.strip() == '{"name": "a"', (
        f"While in a call ResponseParser has _current={parser._current!r}, _body={parser._body!r}; "
        f"chat.parsing._TolerantParser takes the text of an unreadable call from there."
    )
    with pytest.raises((ValueError, TypeError, KeyError)):
        parser.finalize()
    parser = ResponseParser(template, prefix="", tools=[])
    parser._buffer += "text</tool_call>"
    assert parser.finalize()[0]["content"] == "text</tool_call>", (
        "ResponseParser.finalize no longer reads what is in `_buffer`; chat.parsing._TolerantParser.read puts the "
        "whole turn there."
    )
    parser = ResponseParser(template, prefix="", tools=[])
    parser._buffer = "<tool_call>"
    (kind, field, match), _ = parser._scan(parser._watchlist(), True)
    assert (kind, field.name, match.group()) == ("open", "tool_calls", "<tool_call>"), (
        "ResponseParser._scan gives something else; chat.parsing._TolerantParser._scan replaces the match it found."
    )


def test_texts_are_cast_as_call_notation_relies_on():
    from transformers.utils.chat_parsing import content_parsers, response_parser

    assert parameters(response_parser._coerce) == ["raw", "types"] and parameters(content_parsers.parse_content) == [
        "text",
        "name",
        "args",
    ], "transformers casts or parses arguments by other parameters; chat/call_notation.py calls both."
    text = "no number"
    assert response_parser._coerce(text, ("integer",)) is text, (
        "response_parser._coerce no longer gives back a text it cannot cast; chat.call_notation._cast relies on it."
    )
    assert response_parser._coerce("null", ("null",)) is None and response_parser._coerce("7", ("integer",)) == 7


MISREAD = {
    # template: (a turn, the calls or the content it holds, what of ours reads it)
    "gptoss": (
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "x"}<|call|>',
        [{"a": "x"}],
        "_GPTOSS",
    ),
    "qwen3_5_think": (
        "</think><tool_call>\n<function=f>\n<parameter=a>\n x\n</parameter>\n</function>\n</tool_call><|im_end|>",
        [{"a": " x"}],
        "_QWEN_CALLS",
    ),
    "nemotron_3_nano": (
        "</think><tool_call>\n<function=f>\n<parameter=a>\n x\n</parameter>\n</function>\n</tool_call><|im_end|>",
        [{"a": " x"}],
        "_NEMOTRON",
    ),
    "glm4moe": (
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value> x</arg_value>\n</tool_call><|observation|>",
        [{"a": " x"}],
        "_GLM_CALLS",
    ),
    "lfm2_v2": ("<|tool_call_start|>[f(a='x\\', b=')]<|tool_call_end|><|im_end|>", [{"a": "x', b="}], "_LFM2"),
    "lfm2_2_5": ("<|tool_call_start|>[f(a='it's')]<|tool_call_end|><|im_end|>", [{"a": "it's"}], "_LFM2_RAW"),
    "gemma4": ('<|tool_call>call:f-g{a:<|"|>x<|"|>}<tool_call|><|tool_response>', [{"a": "x"}], "_GEMMA4"),
    "llama3_1": ('{"name": "f", "parameters": {"a": "x"}} Done.<|eot_id|>', [{"a": "x"}], "_LLAMA3"),
}


@pytest.mark.parametrize("name", MISREAD)
def test_trl_still_misreads_what_our_response_templates_read(name):
    from families import USER, family

    text, expected, ours = MISREAD[name]
    fam = family(name)
    prompt = fam.render([USER], True)
    calls = fam.chat.parse(fam.encode(text), prompt, [], 0).calls
    assert [call.arguments for call in calls if call.error is None] == expected
    theirs = add_response_schema(chat_tokenizer(name)).response_template
    try:
        found = parse_response(text, theirs, prefix=prompt).get("tool_calls", [])
    except ValueError:
        found = []
    assert [call["function"]["arguments"] for call in found] != expected, (
        f"TRL {trl.__version__} reads {text!r} rightly with the template {name}. See whether "
        f"chat.response_templates.{ours} is still needed."
    )


def test_reset_to_implicit_leaves_the_current_call():
    parser = ResponseParser(add_response_schema(chat_tokenizer()).response_template, prefix="", tools=[])
    parser.feed("<tool_call>\nnothing")
    parser._reset_to_implicit()
    assert parser._current != "tool_calls" and not parser._body, (
        "ResponseParser._reset_to_implicit no longer drops the current call; chat/parsing.py relies on it."
    )


def test_attention_functions_can_be_registered():
    from trl_toolgrpo.sampling.shared_prefix import ATTENTION_NAME

    assert callable(getattr(ALL_ATTENTION_FUNCTIONS, "register", None)), (
        "ALL_ATTENTION_FUNCTIONS of transformers has no `register`; sampling/shared_prefix.py registers with it."
    )
    assert ATTENTION_NAME in ALL_ATTENTION_FUNCTIONS.valid_keys(), (
        "The attention function of sampling/shared_prefix.py is not among the registered ones."
    )


def test_attention_is_chosen_by_the_configuration_at_each_call():
    """`config._attn_implementation` decides in the forward pass, and no mask is made for a function without one."""
    calls = []

    def spy(module, query, key, value, attention_mask, scaling=None, **kwargs):
        calls.append((attention_mask, module.layer_idx, tuple(query.shape), tuple(key.shape), scaling))
        return query.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("contract_spy", spy)
    tokenizer = chat_tokenizer()
    model = tiny_model(tokenizer).eval()
    before = model.config._attn_implementation
    model.config._attn_implementation = "contract_spy"
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    model.config._attn_implementation = before
    assert len(calls) == 2, (
        "A model no longer looks up `config._attn_implementation` in ALL_ATTENTION_FUNCTIONS at each call; "
        "sampling.shared_prefix.shared_prefix_attention switches it there."
    )
    mask, layer, query, key, scaling = calls[1]
    assert (layer, query, key, scaling) == (1, (1, 4, 3, 8), (1, 2, 3, 8), pytest.approx(8**-0.5)), (
        "Attention functions are called with other shapes; see sampling.shared_prefix._attention."
    )
    assert mask is None, (
        "transformers makes an attention mask for a registered attention function that has no mask function; "
        "sampling/shared_prefix.py has masks of its own."
    )


def test_packed_products():
    """`sampling/packed_linear.py` calls both by name."""
    weight, rows = torch.randn(8, 4), torch.randn(2, 3, 4)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    found = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    torch.testing.assert_close(found, rows @ weight.T)


def test_cache_update():
    found = parameters(DynamicCache.update)
    assert found[:4] == ["self", "key_states", "value_states", "layer_idx"], (
        f"DynamicCache.update takes {found}; sampling.shared_prefix.PromptCache and RowCache override it."
    )
    assert "layer_idx" in parameters(DynamicCache.get_seq_length), (
        "DynamicCache.get_seq_length has other parameters; sampling.shared_prefix.PromptCache and RowCache override "
        "it."
    )


def test_models_have_what_the_default_sampler_asks_for():
    model = tiny_model(chat_tokenizer())
    assert model._supports_attention_backend is True, (
        "Models no longer have `_supports_attention_backend`; sampling.choice.unsupported_reason reads it."
    )
    assert list(model.config.layer_types) == ["full_attention"] * 2, (
        "transformers names layer types otherwise; sampling.choice.unsupported_reason knows two."
    )
    assert "logits_to_keep" in parameters(model.forward), (
        "Models no longer take `logits_to_keep`; sampling.model_sampler.ModelSession._forward passes it."
    )


def test_rotary_embeddings_say_when_their_frequencies_change():
    """`models/rotary.py` finds them by these names and calls them row by row."""
    by_layer = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
    long = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    by_layer["full_attention"] = {**long, "factor": 4.0, "original_max_position_embeddings": 60}
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 4, "head_dim": 8}
    layers = {"num_hidden_layers": 2, "layer_types": list(by_layer), "sliding_window": 9}
    flat = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    for settings, border in (
        (transformers.Gemma3TextConfig(**sizes, **layers, rope_parameters=by_layer), 60),
        (transformers.LlamaConfig(**sizes, max_position_embeddings=70, rope_parameters=flat), 70),
        (transformers.LlamaConfig(**sizes), None),
    ):
        model = transformers.AutoModelForCausalLM.from_config(settings)
        assert RowFrequencies(model).border == border, (
            "Rotary embeddings no longer have `rope_type`, `original_max_seq_len` and `config.rope_parameters`; "
            "models/rotary.py reads them."
        )
        assert list(parameters(model.model.rotary_emb.forward))[:2] == ["x", "position_ids"], (
            "Rotary embeddings take other arguments; models.rotary.RowFrequencies passes on `x` and `position_ids`."
        )


def test_templates_that_get_a_response_template():
    import trl.chat_template_utils as templates

    names = ("qwen3_5", "nemotron_3", "glm4moe", "gptoss", "llama3", "gemma4", "lfm2_2_5")
    for name in [f"{name}_template" for name in names]:
        assert isinstance(getattr(templates, name, None), dict), (
            f"trl.chat_template_utils has no `{name}`; chat/response_templates.py replaces it."
        )
    for name in ("deepseekv3", "diffusion_gemma", "muse_glimmer"):
        text = getattr(templates, f"{name}_chat_template", None)
        assert isinstance(text, str), (
            f"trl.chat_template_utils has no `{name}_chat_template`; chat/response_templates.py goes by such names."
        )
        with pytest.raises(ValueError, match="Unrecognized chat template"):  # else ours can go
            templates.add_response_schema(SimpleNamespace(chat_template=text))
    known = SimpleNamespace(chat_template=templates.qwen3_chat_template)
    assert templates.add_response_schema(known).response_template == templates.qwen3_template, (
        "add_response_schema needs more than a chat template; chat.response_templates._shipped calls it so."
    )


def test_fsdp_finds_its_root_in_the_first_pass():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    assert "_is_root = None" in inspect.getsource(FSDPState.__init__).replace(": bool | None", "").replace(
        ": Optional[bool]", ""
    ) and parameters(FSDPState._lazy_init) == ["self"], (
        "torch's FSDP2 no longer has `_is_root` and `_lazy_init`; rollout.engine.gathered_parameters calls it before "
        "the first pass of a policy with an adapter."
    )
    assert hasattr(FSDPModule, "_get_fsdp_state"), "FSDPModule has no `_get_fsdp_state`; rollout/engine.py calls it."


def test_deepspeed_saves_through_the_functions_that_are_wrapped():
    engine = pytest.importorskip("deepspeed.runtime.engine")
    assert "save_latest" in parameters(engine.DeepSpeedEngine.save_checkpoint), (
        "DeepSpeed's save_checkpoint has no `save_latest`; checkpoints.resume.ExactResume._deepspeed_tolerated passes "
        "it."
    )
    held = {
        "save_checkpoint": ("from shutil import copytree", 'tag = f"global_step{self.global_steps}"', "fd.write(tag)"),
        "_copy_recovery_script": ("copyfile(src, dst)",),
    }
    for name, texts in held.items():
        source = inspect.getsource(getattr(engine.DeepSpeedEngine, name))
        missing = [text for text in texts if text not in source]
        assert not missing, (
            f"DeepSpeedEngine.{name} is written otherwise, without {missing}; run_folder.storage_failures.attempt and "
            f"checkpoints.resume.ExactResume._deepspeed_tolerated keep a full disk there from stopping the other "
            f"processes."
        )


def test_version_is_the_one_this_was_written_for():
    assert trl.__version__.startswith("1.16."), (
        f"TRL is {trl.__version__}; setup.cfg allows 1.16 only. Read trainer.py against the new grpo_trainer.py, and "
        f"adjust this file and setup.cfg together."
    )


def test_fields_of_mappings_and_callables_of_coroutines():
    names = set(GRPOConfig._VALID_DICT_FIELDS)
    assert {"chat_template_kwargs", "generation_kwargs", "model_init_kwargs", "lr_scheduler_kwargs"} <= names, (
        "TRL names the fields that it reads from JSON text otherwise; `config/checks.py` checks them"
    )
    from trl.trainer.utils import is_async_callable

    async def reward(**kwargs):
        return []

    assert is_async_callable(reward) and not is_async_callable(print), (
        "TRL knows reward functions that are coroutine functions otherwise; see validation.rewards.checked."
    )

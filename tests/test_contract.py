"""
What this package relies on in TRL and transformers beyond their public interfaces.

A failure here means that a new release has changed something we override, call or assume. The message says what, and
which module of ours to look at; every other failing test is likely to follow from it.
"""

import ast
import asyncio
import contextlib
import dataclasses
import importlib
import inspect
import re
import textwrap
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
import trl
from conftest import chat_tokenizer, config, prompts, tiny_model
from huggingface_hub.errors import HfHubHTTPError
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.chat_parsing.response_parser import ResponseParser, parse_response
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import add_response_schema
from trl.extras import profiling
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, add_fused_lm_head

import trl_toolgrpo
from trl_toolgrpo import ToolGRPOTrainer, trl_hooks
from trl_toolgrpo.hub import model_card
from trl_toolgrpo.models.rotary import RowFrequencies
from trl_toolgrpo.sampling.vllm.engine import supported_versions
from trl_toolgrpo.trl_hooks import (
    ATTRIBUTES,
    CHECKPOINTING_FUNCTIONS,
    CONFIG_ATTRIBUTES,
    FSDP,
    MODEL_ATTRIBUTES,
    OTHER_ATTRIBUTES,
    OVERRIDDEN,
    RELIED_ON,
    RESPONSE_PARSER,
    Run,
    attention_implementation,
    has_replaceable_attention,
    has_unknown_checkpointing,
    is_stateful,
    name_or_path,
    replaced_attention,
)


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    return textwrap.dedent(inspect.getsource(function))


HOOKS = {**OVERRIDDEN, **RELIED_ON}


@pytest.mark.parametrize("name", HOOKS)
def test_parameters_of_hooks(name):
    hook = HOOKS[name]
    assert hasattr(GRPOTrainer, name), f"TRL {trl.__version__} has no GRPOTrainer.{name}; {hook.used_by}."
    expected = ["self", *hook.parameters.split()]
    found = parameters(getattr(GRPOTrainer, name))
    if expected[-1] == "...":
        expected.pop()
        found = found[: len(expected)]
    assert found == expected, (
        f"TRL {trl.__version__} changed the parameters of GRPOTrainer.{name} from {expected} to {found}; "
        f"{hook.used_by}."
    )


@pytest.mark.parametrize(
    ("name", "expression"), [(name, expression) for name, hook in HOOKS.items() for expression in hook.holds]
)
def test_what_the_source_of_hooks_holds(name, expression):
    body = "".join(source(vars(kind)[name]) for kind in GRPOTrainer.__mro__[:-1] if name in vars(kind))
    assert expression in body, (
        f"GRPOTrainer.{name} of TRL {trl.__version__} no longer holds `{expression}`; {HOOKS[name].holds[expression]}."
    )


def returned_names(function):
    """Names in the last `return a, b, c` of a function."""
    tree = ast.parse(source(function))
    values = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple)]
    return [getattr(element, "id", None) for element in values[-1].elts]


@pytest.mark.parametrize("name", [name for name, hook in HOOKS.items() if hook.returns])
def test_results_of_hooks(name):
    found, expected = returned_names(getattr(GRPOTrainer, name)), HOOKS[name].returns.split()
    assert found == expected, (
        f"GRPOTrainer.{name} returns {found}, no longer {expected}; {HOOKS[name].used_by}, which returns or unpacks "
        f"the same."
    )


def test_the_table_holds_what_is_overridden():
    ours = {name for name in vars(ToolGRPOTrainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
    assert ours - set(OTHER_ATTRIBUTES) == set(OVERRIDDEN), "trl_hooks.OVERRIDDEN and trainer.py do not agree."
    assert not set(OVERRIDDEN) & set(RELIED_ON)


def described_places():
    """Yield names of modules, classes and functions of this package in texts of the tables and of this file."""
    folders = {path.stem for path in Path(trl_toolgrpo.__file__).parent.glob("[a-z]*")}
    for path in (__file__, trl_hooks.__file__):
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for place in re.findall(r"(?<![\w./`])[a-z_]+(?:\.(?!py\b)\w+)+", node.value):
                    if place.split(".")[0] in folders:
                        yield place


@pytest.mark.parametrize("place", sorted(set(described_places())))
def test_places_that_messages_name_exist(place):
    parts = place.split(".")
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join([trl_toolgrpo.__name__, *parts[:end]]))
            for part in parts[end:]:
                assert hasattr(found, part), f"A message names {place}, which is not there."
                found = getattr(found, part)
            return
    pytest.fail(f"A message names {place}, which is not there.")


def test_the_profiler_is_looked_up_when_it_begins():
    assert "ProfilingContext(" in source(profiling.profiling_context), (
        "trl_hooks.profiler_reporting_within replaces a method of it"
    )
    assert parameters(profiling.ProfilingContext._log_metrics) == ["self", "duration"]


def test_the_model_card_has_its_headings():
    template = (resources.files("trl") / "templates" / "lm_model_card.md").read_text(encoding="utf-8")
    for heading in (model_card.PROCEDURE, model_card.VERSIONS):
        assert heading in template, (
            f"TRL's model card has no {heading!r}; hub.model_card.RunCard keeps what follows it."
        )
    assert len(model_card.METHOD.findall(template)) == 1, (
        "TRL's model card has another sentence on the method; hub.model_card.RunCard puts its own in place of it."
    )
    assert HfHubHTTPError.__bases__[0].__name__ == "HTTPError", "hub/push.py catches what all HTTP failures are"


def test_the_sampler_draws_an_order_for_each_epoch():
    sampler = RepeatSampler(range(10), 1, seed=3)
    orders = [list(sampler) for _ in range(3)]
    again = RepeatSampler(range(10), 1, seed=3)
    for _ in range(2):
        torch.randperm(again.num_samples, generator=again.generator)
    assert list(again) == orders[2] != orders[0], (
        "TRL's RepeatSampler draws its order otherwise; checkpoints.resume.Checkpoints.begin_epoch skips "
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


def test_constructor_takes_what_ours_passes_on():
    theirs, ours = parameters(GRPOTrainer.__init__), parameters(ToolGRPOTrainer.__init__)
    assert ours[: len(theirs)] == theirs, (
        f"The parameters of GRPOTrainer.__init__ are {theirs}, ours start {ours[: len(theirs)]}: a script that passes "
        f"them by position or by a new name breaks; see trainer.ToolGRPOTrainer."
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
        f"policy with its adapter off; update.policy_update.PolicyUpdate answers the first pass over `self.model`."
    )


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


# Attributes of the trainer that are there once it trains
LATER = {
    "_batch_environments",
    "_globalstep_last_logged",
    "_tr_loss",
    "current_gradient_accumulation_steps",
    "push_in_progress",
}


def assigned_names(kind):
    """Names that the methods of a class assign to `self`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source(kind)))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


@pytest.fixture(scope="module")
def names_set_by_trl():
    return set().union(*(assigned_names(kind) for kind in GRPOTrainer.__mro__[:-1]))


@pytest.mark.parametrize("name", sorted(set(Run.__annotations__) - {"recording"}))
def test_attributes_that_parts_read(trl_trainer, names_set_by_trl, name):
    theirs = ATTRIBUTES.get(name, name)
    message = f"TRL {trl.__version__} sets no `{theirs}` on its trainer; parts read it as trl_hooks.Run.{name}."
    assert theirs in names_set_by_trl, message
    assert hasattr(trl_trainer, theirs) or theirs in LATER, message


def test_parts_have_public_names_for_private_attributes():
    assert set(ATTRIBUTES) <= set(Run.__annotations__)
    assert all(theirs.startswith("_") for theirs in ATTRIBUTES.values())


@pytest.mark.parametrize("name", OTHER_ATTRIBUTES)
def test_other_attributes_of_trls_trainer(trl_trainer, name):
    assert hasattr(trl_trainer, name), (
        f"TRL {trl.__version__} sets no GRPOTrainer.{name} at construction; {OTHER_ATTRIBUTES[name]}."
    )


def test_shapes_of_those_attributes(trl_trainer):
    assert set(trl_trainer._metrics) == {"train", "eval"}, "GRPOTrainer._metrics changed; see trl_hooks.Run.metrics."
    assert list(trl_trainer._environment_pool) == [None] and isinstance(trl_trainer._environment_pool[None], list), (
        "GRPOTrainer._environment_pool is no longer {name: [instances]} with None for a single environment; see "
        "rollout.tools_of_rollouts.RolloutTools.read_environments."
    )
    assert isinstance(trl_trainer._environment_pool[None][0], Box), (
        "GRPOTrainer no longer makes a first environment at construction; "
        "rollout.tools_of_rollouts.RolloutTools.read_environments reads its methods."
    )
    names = [tool.__name__ for tool in trl_trainer._env_tools[None]]
    assert names == ["fetch", "open"], (
        f"GRPOTrainer._env_tools holds {names} for an environment, not the functions and then its methods; see "
        f"rollout.tools_of_rollouts.RolloutTools.read_environments."
    )
    assert [tool.__name__ for tool in trl_trainer._standalone_tools] == ["fetch"], (
        "GRPOTrainer._standalone_tools is no longer the functions alone; rollout.rollouts.Rollouts.prepare empties it."
    )
    assert isinstance(trl_trainer.eos_token_ids, list), (
        "GRPOTrainer.eos_token_ids is no list; see rollout.rollouts.Rollouts.prepare."
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
        "rollout.tools_of_rollouts.RolloutTools gives it tools that are none, so that no tool can block it or end its "
        "thread."
    )
    if kind == "reward":
        trainer.train()
        assert set(ran_on) == {trainer.async_loop}, (
            "GRPOTrainer runs async reward functions elsewhere than on its `async_loop`."
        )
        assert ran_on[0] is not trainer.rollouts.tools.executor._loop.get()


def test_context_managers_for_generation(trl_trainer):
    from trl.models import unwrap_model_for_generation
    from trl.models.utils import disable_gradient_checkpointing

    found = parameters(unwrap_model_for_generation)
    assert found[:3] == ["model", "accelerator", "gather_deepspeed3_params"] and (
        "gradient_checkpointing_kwargs" in found
    ), f"trl.models.unwrap_model_for_generation takes {found}; trl_hooks.Run.gathered_policy calls it."
    assert parameters(disable_gradient_checkpointing) == ["model", "gradient_checkpointing_kwargs"], (
        "trl.models.utils.disable_gradient_checkpointing has other parameters; "
        "update.scoring.Scoring.without_training calls it."
    )
    with (
        unwrap_model_for_generation(trl_trainer.model_wrapped, trl_trainer.accelerator) as policy,
        trl_trainer._dist.summon_full_params(trl_trainer.model_wrapped, recurse=False),
    ):
        assert policy is trl_trainer.model, (
            "unwrap_model_for_generation gives no policy; see trl_hooks.Run.gathered_policy."
        )


def test_what_logs_and_replays_ask_of_trl(trl_trainer):
    assert {"prompt", "completion", "rewards", "advantages"} <= set(trl_trainer._logs), (
        f"GRPOTrainer._logs holds {sorted(trl_trainer._logs)}; run_folder.replay.Replay fills it."
    )
    assert "tb_writer" in source(transformers.integrations.TensorBoardCallback.__init__), (
        "TensorBoardCallback has no `tb_writer`; "
        "monitoring.trackers.tensorboard_tracker.TensorBoardTracker writes texts with it."
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
        f"reference.sync.ReferencePolicy.save leaves out the reference; {use}"
    )


def test_what_else_the_trainer_imports():
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving
    from trl.extras.profiling import profiling_context
    from trl.trainer.utils import get_config_model_id

    reads_environments = "rollout.tools_of_rollouts.RolloutTools.read_environments"
    for function, expected, use in (
        (add_response_schema, "processing_class", reads_environments),
        (get_training_chat_template, "processing_class", reads_environments),
        (is_chat_template_prefix_preserving, "processing_class", reads_environments),
        (get_config_model_id, "config", "trainer.ToolGRPOTrainer"),
        (profiling_context, "trainer", "trl_hooks.Run.profiled"),
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


def test_trl_refuses_to_sync_the_reference_of_an_adapter(tmp_path):
    tokenizer, adapter = chat_tokenizer(), peft.LoraConfig(target_modules=["q_proj"])
    try:
        GRPOTrainer(
            tiny_model(tokenizer),
            lambda completions, **kwargs: [0.0] * len(completions),
            config(tmp_path, sync_ref_model=True, beta=0.1),
            prompts(),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    except NotImplementedError:
        return
    pytest.fail(
        f"TRL {trl.__version__} syncs the reference of a PEFT run. Its adapter named \"ref\" and its "
        f"`SyncRefModelCallback` would clash with the adapter and the callback of reference/sync.py; see "
        f"reference.sync.synced_by_us, which keeps TRL from it, and reference.sync.ReferencePolicy, which removes one "
        f"such callback."
    )


def test_the_sync_callback_of_trl_is_removed(tmp_path, caplog):
    tokenizer = chat_tokenizer()
    given = SyncRefModelCallback(ref_model=tiny_model(tokenizer), accelerator=None)
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        lambda completions, **kwargs: [0.0] * len(completions),
        config(tmp_path, sync_ref_model=True, beta=0.1),
        prompts(),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules=["q_proj"]),
        callbacks=[given],
    )
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, SyncRefModelCallback)]
    assert "`SyncRefModelCallback` was removed" in caplog.text
    assert trainer.reference.synced is not None


# transformers


def test_response_parser_can_be_made_tolerant():
    for name, expected in RESPONSE_PARSER.items():
        if expected is not None:
            found = parameters(getattr(ResponseParser, name, lambda: None))
            assert found == expected.split(), (
                f"transformers {transformers.__version__}: ResponseParser.{name} takes {found}; "
                f"chat.parsing._TolerantParser overrides or calls it with {expected}."
            )
    template = add_response_schema(chat_tokenizer()).response_template
    parser = ResponseParser(template, prefix="", tools=[])
    for name in RESPONSE_PARSER:
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
        "response_parser._coerce no longer gives back a text it cannot cast; chat.call_notation relies on it through "
        "trl_hooks.cast_text."
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
    before = attention_implementation(model.config)
    with torch.no_grad(), replaced_attention(model.config, "contract_spy"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert attention_implementation(model.config) == before
    assert len(calls) == 2, (
        "A model no longer looks up `config._attn_implementation` in ALL_ATTENTION_FUNCTIONS at each call; "
        "sampling.shared_prefix.exchanged_attention switches it there, by trl_hooks.replaced_attention."
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


@pytest.mark.parametrize("by", CHECKPOINTING_FUNCTIONS)
def test_checkpointing_functions_are_attributes(by):
    """`trl_hooks.around_checkpointed_parts` replaces them, so that the backward pass attends like the forward pass."""
    model = tiny_model(chat_tokenizer()).train()
    if by == "checkpoint_fn":
        owner = model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    else:
        model.gradient_checkpointing_enable()
        owner = model.model.layers[0]
    assert callable(owner.__dict__.get(by)), f"Checkpointed modules have no `{by}`; trl_hooks replaces it."
    given, function = [], getattr(owner, by)
    setattr(owner, by, lambda part, *args, **kwargs: given.append(part) or function(part, *args, **kwargs))
    model(input_ids=torch.arange(3)[None])
    assert len(given) == 1 and callable(given[0]), f"`{by}` is no longer called with the part that it computes."
    assert not has_unknown_checkpointing(model)


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
    assert has_replaceable_attention(model) is True and is_stateful(model) is False, (
        f"Models no longer have {MODEL_ATTRIBUTES}; sampling.choice.unsupported_reason and "
        f"sampling.choice.layers_beside_attention ask for them through trl_hooks."
    )
    for name in MODEL_ATTRIBUTES:
        assert hasattr(transformers.PreTrainedModel, name), f"PreTrainedModel has no `{name}`; trl_hooks reads it."
    for name in CONFIG_ATTRIBUTES:
        assert hasattr(model.config, name), f"PreTrainedConfig has no `{name}`; trl_hooks reads it."
    assert (attention_implementation(model.config), name_or_path(model)) == ("sdpa", "tiny-qwen3")
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
    assert "_is_root = None" in inspect.getsource(FSDPState.__init__).replace(": bool | None", "").replace(
        ": Optional[bool]", ""
    ) and parameters(FSDPState._lazy_init) == ["self"], (
        "torch's FSDP2 no longer has `_is_root` and `_lazy_init`; trl_hooks.gathered_parameters calls it before the "
        "first pass of a policy with an adapter."
    )


def test_fsdp_has_the_names_that_gathering_goes_by():
    state, used = FSDPState(), "trl_hooks.gathered_parameters goes by it."
    for name in FSDP["FSDPModule"]:
        assert hasattr(FSDPModule, name), f"torch {torch.__version__}: FSDPModule has no `{name}`; {used}"
    groups = {"_fsdp_param_group", "_fsdp_param_groups"}
    assert groups < set(FSDP["FSDPState"]) and any(hasattr(state, name) for name in groups), (
        f"torch {torch.__version__}: FSDPState has neither of {sorted(groups)}; {used}"
    )
    for name in set(FSDP["FSDPState"]) - groups:
        assert hasattr(state, name), f"torch {torch.__version__}: FSDPState has no `{name}`; {used}"
    for name in FSDP["FSDPParamGroup"]:
        assert name in assigned_names(FSDPParamGroup), (
            f"torch {torch.__version__}: FSDPParamGroup has no `{name}`; {used}"
        )


def test_the_table_holds_what_gathering_reads_of_fsdp():
    read = {"post_forward_mesh_info"}
    for function in (trl_hooks.gathered_parameters, trl_hooks._reshard_settings):
        for node in ast.walk(ast.parse(source(function))):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(name, str) and re.fullmatch(r"_[a-z]\w*", name):
                read.add(name)
    assert read == {name for names in FSDP.values() for name in names}


def test_deepspeed_saves_through_the_functions_that_are_wrapped():
    engine = pytest.importorskip("deepspeed.runtime.engine")
    assert "save_latest" in parameters(engine.DeepSpeedEngine.save_checkpoint), (
        "DeepSpeed's save_checkpoint has no `save_latest`; checkpoints.resume.Checkpoints.save passes "
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
            f"checkpoints.resume.Checkpoints.save keep a full disk there from stopping the other "
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

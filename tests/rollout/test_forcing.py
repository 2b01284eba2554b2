"""Forced tool calls: their tokens, their provenance, and that they never touch a policy-gradient update."""

import math

import pytest
import torch
from conftest import MAKE_SAMPLER, TEMPLATES, ScriptedSampler, chat_tokenizer, config, prompts, tiny_model
from trl.chat_template_utils import add_response_schema, supports_tool_calling

from trl_toolgrpo import ChatTemplateError, ConfigError, Tool, ToolCall, ToolGRPOTrainer, ToolNameError, Turn
from trl_toolgrpo.chat.parsing import add_missing_response_template
from trl_toolgrpo.chat.tool_chat import ToolChat
from trl_toolgrpo.rollout.forcing import CallPrefixes, Forcing
from trl_toolgrpo.rollout.trajectory import Trajectory
from trl_toolgrpo.tools.from_callable import as_tool
from trl_toolgrpo.update.losses import assisted_loss, assisted_rows, calling_tokens
from trl_toolgrpo.validation.chat_templates import training_steps


def lookup(name: str) -> str:
    """
    Look somebody up.

    Args:
        name: Who.
    """
    return f"{name} is there"


def chat_of(template):
    tokenizer = chat_tokenizer(template)
    add_missing_response_template(tokenizer)
    if getattr(tokenizer, "response_template", None) is None:
        add_response_schema(tokenizer)
    return ToolChat(tokenizer, tokenizer.convert_tokens_to_ids(tokenizer.stop_texts))


@pytest.mark.parametrize(
    ("template", "call", "name"),
    [
        ("qwen3_instruct_2507", "<tool_call>", '<tool_call>\n{"name": "lookup'),
        ("qwen2_5", "<tool_call>", '<tool_call>\n{"name": "lookup'),
        ("llama3_1", '{"name":', '{"name": "lookup'),
        ("glm4moe", "<tool_call>", "<tool_call>lookup"),
        ("qwen3_5_nothink", "<tool_call>", "<tool_call>\n<function=lookup"),
        ("gemma4", "<|tool_call>", "<|tool_call>call:lookup"),
        ("lfm2_2_5", "<|tool_call_start|>", "<|tool_call_start|>[lookup"),
        ("nemotron_3_nano", "</think>\n<tool_call>", "</think>\n<tool_call>\n<function=lookup"),
    ],
)
def test_prefixes_are_what_the_template_writes(template, call, name):
    chat = chat_of(template)
    prefixes = CallPrefixes(chat)
    assert chat.tokenizer.decode(prefixes.tokens()) == call
    assert chat.tokenizer.decode(prefixes.tokens("lookup")) == name


def tool_templates():
    for path in sorted(TEMPLATES.glob("*.jinja")):
        if path.stem.endswith("_training"):
            continue
        try:
            tokenizer = chat_tokenizer(path.stem)
        except StopIteration:  # a family that writes no end-of-turn token
            continue
        if supports_tool_calling(tokenizer):
            yield path.stem


@pytest.mark.parametrize("template", list(tool_templates()))
def test_a_call_with_a_forced_name_is_parsed(template):
    """The forced tokens with the template's text after the name are the call that the template renders."""
    chat = chat_of(template)
    messages = [{"role": "user", "content": "dummy"}]
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"name": "ada"}}}
    assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
    start = chat.render(messages, add_generation_prompt=True)
    try:
        rendered = chat.render([*messages, assistant])
    except TypeError:
        call["function"]["arguments"] = '{"name": "ada"}'
        rendered = chat.render([*messages, assistant])
    forced = CallPrefixes(chat).tokens("lookup")
    rest = chat.encode(rendered[rendered.rindex("lookup") + len("lookup") :])
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "lookup", "description": "", "parameters": schema}}]
    parsed = chat.parse([*forced, *rest], start, tools, 0)
    assert [(c.name, c.arguments, c.error) for c in parsed.calls] == [("lookup", {"name": "ada"}, None)]


def test_a_template_without_an_opening_is_refused():
    chat = chat_of("qwen3_instruct_2507")
    chat.tokenizer.response_template = {**chat.tokenizer.response_template, "fields": {"content": {}}}
    with pytest.raises(ChatTemplateError, match="do not show how a tool call opens"):
        CallPrefixes(chat)


def test_the_draw_keeps_to_its_rate_and_policy():
    prefixes = CallPrefixes(chat_of("qwen3_instruct_2507"))
    trajectory = Trajectory([1], [], [], [], [], [], "stop")
    tools = {"lookup": as_tool(lookup), "other": Tool("other", "", {"type": "object", "properties": {}}, lambda: 1)}
    forcings = [Forcing(prefixes, 0.3, "call", seed, None) for seed in range(2000)]
    drawn = [bool(forcing.begin_turn(trajectory, tools).token_ids) for forcing in forcings]
    assert sum(drawn) / len(drawn) == pytest.approx(0.3, abs=0.04)
    names = Forcing(prefixes, 1.0, "name", 0, None)
    seen = [tuple(names.begin_turn(trajectory, tools).token_ids) for _ in range(200)]
    assert set(seen) == {tuple(prefixes.tokens("lookup")), tuple(prefixes.tokens("other"))}
    assert Forcing(prefixes, 1.0, "call", 0, None).begin_turn(trajectory, {}).token_ids == []
    chosen = Forcing(prefixes, 1.0, "name", 0, lambda trajectory, tools: tools[-1].name)
    assert chosen.begin_turn(trajectory, tools).token_ids == prefixes.tokens("other")
    with pytest.raises(ToolNameError, match="nobody"):
        Forcing(prefixes, 1.0, "name", 0, lambda trajectory, tools: "nobody").begin_turn(trajectory, tools)


# The supervised loss


def test_assisted_rows_by_hand():
    nan = math.nan
    cases = [
        ([0.0, 1.0, 0.0, 1.0], [False, True, False, True]),
        ([1.0, 1.0, 1.0, 1.0], [True] * 4),
        ([0.0, 0.0, 0.0, 0.0], [False] * 4),
        ([-1.0, -1.0, -1.0, -1.0], [False] * 4),
        ([0.2, 0.9, nan, 0.1], [False, True, False, False]),
        ([nan, nan, nan, nan], [False] * 4),
    ]
    for rewards, expected in cases:
        found = assisted_rows(torch.tensor(rewards), torch.tensor(rewards))
        assert found.tolist() == expected, rewards


def test_calling_tokens_cover_whole_turns_that_call():
    call = ToolCall("a", "lookup", {})
    turns = [Turn(0, 3, tool_calls=[call]), Turn(5, 7), Turn(7, 8, tool_calls=[ToolCall("b", "", error="bad")])]
    trajectory = Trajectory([1], [1] * 8, [0.0] * 8, [1, 1, 1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0], turns, "stop")
    assert calling_tokens(trajectory) == [1, 1, 1, 0, 0, 0, 0, 0]


def test_the_assisted_loss_is_a_token_mean_with_the_gradient_of_cross_entropy():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (2, 5))
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 0, 0, 0]])

    def loss(logits):
        logps = torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]
        return assisted_loss(logps, mask, mask.sum())

    expected = torch.nn.functional.cross_entropy(logits[mask.bool()], targets[mask.bool()])
    torch.testing.assert_close(loss(logits), expected)
    assert torch.autograd.gradcheck(loss, (logits,))
    assert assisted_loss(torch.randn(2, 5), torch.zeros(2, 5), 1.0) == 0


# Training


GOES_ON = '\n{"name": "lookup", "arguments": {"name": "ada"}}\n</tool_call><|im_end|>'


class GoesOn(ScriptedSampler):
    """Completes a forced marker to a call, and answers with text if nothing is forced."""

    def extend(self, row, token_ids, max_new_tokens, constraint=None):
        marker = self.tokenizer.convert_tokens_to_ids("<tool_call>")
        text = GOES_ON if list(token_ids)[-1:] == [marker] else "I do not know.<|im_end|>"
        self.turns[row] = iter([text])
        super().extend(row, token_ids, max_new_tokens)


def called(completions, **kwargs):
    return [float(any(message.get("tool_calls") for message in completion)) for completion in completions]


def make(tmp_path, monkeypatch, reward=called, tools=(lookup,), force_policy=None, **changes):
    tokenizer = chat_tokenizer("qwen3_instruct_2507")
    sampler = GoesOn(tokenizer, [[]], [tokenizer.eos_token_id])
    monkeypatch.setattr(MAKE_SAMPLER, lambda *args, **kwargs: sampler)
    options = {"logprob_check": "off", "max_completion_length": 128, "max_tool_calling_iterations": 1, "max_steps": 4}
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        reward,
        config(tmp_path, **{**options, **changes}),
        prompts(16),
        processing_class=tokenizer,
        tools=list(tools) or None,
        force_policy=force_policy,
    )
    kept = []
    score = trainer._generate_and_score_completions

    def keep(inputs):
        output = score(inputs)
        kept.append((output, trainer.rollouts.batch.trajectories))
        return output

    trainer._generate_and_score_completions = keep
    return trainer, kept


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def test_every_token_records_its_provenance(tmp_path, monkeypatch):
    trainer, kept = make(tmp_path, monkeypatch, force_rate=1.0, disable_forcing_in_updates=False, max_steps=1)
    trainer.train()
    output, trajectories = kept[0]
    marker = trainer.processing_class.convert_tokens_to_ids("<tool_call>")
    for row, trajectory in enumerate(trajectories):
        forced = [i for i, flag in enumerate(trajectory.forced_mask) if flag]
        assert forced and all(trajectory.completion_ids[i] == marker for i in forced)
        assert all(trajectory.logprobs[i] == 0.0 for i in forced)
        assert output["tool_mask"][row, : len(trajectory.tool_mask)].tolist() == trajectory.trainable_mask
        assert not output["tool_mask"][row, forced].any()
    fraction = sum(sum(t.forced_mask) for t in trajectories) / sum(sum(t.tool_mask) for t in trajectories)
    assert logs_of(trainer)[0]["forced/fraction"] == pytest.approx(fraction)


@pytest.mark.parametrize("options", [{"disable_forcing_in_updates": False}, {"assist_warmup_steps": 1, "beta": 0.0}])
@pytest.mark.parametrize("level", ["call", "name", "schema"])
def test_forced_tokens_count_in_the_lengths_of_completions(tmp_path, monkeypatch, level, options):
    trainer, kept = make(tmp_path, monkeypatch, force_rate=1.0, force_level=level, max_steps=1, **options)
    trainer.train()
    trajectories = kept[0][1]
    lengths = [sum(t.tool_mask) for t in trajectories]
    assert any(any(t.forced_mask) for t in trajectories)
    ended = [n for n, t in zip(lengths, trajectories, strict=True) if not t.truncated] or [0]
    logs = logs_of(trainer)[0]
    for name, counted in (("length", lengths), ("terminated_length", ended)):
        found = [logs[f"completions/{kind}_{name}"] for kind in ("mean", "min", "max")]
        assert found == [pytest.approx(sum(counted) / len(counted)), min(counted), max(counted)]


def test_no_forced_token_reaches_an_update_whatever_the_rate(tmp_path, monkeypatch):
    trainer, kept = make(tmp_path, monkeypatch, force_rate=0.9)
    trainer.train()
    assert [log["forced/fraction"] for log in logs_of(trainer)] == [0.0] * 4
    assert not any(any(t.forced_mask) for _, trajectories in kept for t in trajectories)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_forced_tokens_weigh_nothing_in_the_policy_loss(tmp_path, monkeypatch, loss_type):
    """The log-probs of forced tokens, old and new, change neither the loss nor its gradient."""
    trainer, kept = make(
        tmp_path, monkeypatch, reward=lambda completions, **kwargs: [1.0, 0.0, 0.5, 0.0], force_rate=1.0,
        disable_forcing_in_updates=False, max_steps=1, loss_type=loss_type,
    )  # fmt: skip
    trainer.train()
    output, _ = kept[0]
    hidden = (output["completion_mask"] * (1 - output["tool_mask"])).bool()
    exact = trainer._get_per_token_logps_and_entropies

    def loss_with(shift):
        leaf = torch.zeros(hidden.shape, requires_grad=True)

        def shifted(*args, **kwargs):
            logps, entropies, aux = exact(*args, **kwargs)
            return logps.detach() + leaf + shift * hidden, entropies.detach(), aux

        trainer._get_per_token_logps_and_entropies = shifted
        inputs = {**output, "old_per_token_logps": output["old_per_token_logps"] - shift * hidden}
        loss = trainer._compute_loss(trainer.model, inputs)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    trainer.model.train()
    plain, gradient = loss_with(0.0)
    moved, _ = loss_with(-3.0)
    assert torch.equal(plain, moved)
    assert torch.equal(gradient[hidden], torch.zeros_like(gradient[hidden]))
    assert gradient.abs().sum() > 0


def test_with_every_token_forced_the_policy_gradient_is_zero(tmp_path, monkeypatch):
    trainer, kept = make(
        tmp_path, monkeypatch, reward=lambda completions, **kwargs: [1.0, 0.0, 0.5, 0.0], force_rate=1.0,
        disable_forcing_in_updates=False, max_steps=1,
    )  # fmt: skip
    trainer.train()
    output, _ = kept[0]
    output = {**output, "tool_mask": torch.zeros_like(output["tool_mask"])}
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, output)
    loss.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_assistance_teaches_calls_and_then_ends(tmp_path, monkeypatch):
    trainer, kept = make(
        tmp_path, monkeypatch, force_rate=0.5, assist_warmup_steps=2, learning_rate=1e-2, beta=0.0, max_steps=4
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logs = logs_of(trainer)
    assert [log["forced/fraction"] > 0 for log in logs] == [True, True, False, False]
    assert ["forced/loss" in log for log in logs] == [True, True, False, False]
    assert ["ratio/mean" in log for log in logs] == [False, False, True, True]
    assert [("assist_mask" in output) for output, _ in kept] == [True, True, False, False]
    for output, trajectories in kept[:2]:
        for row, trajectory in enumerate(trajectories):
            calls = any(turn.tool_calls for turn in trajectory.turns)
            width = len(trajectory.completion_ids)
            expected = calling_tokens(trajectory) if calls else [0] * width
            assert output["assist_mask"][row, :width].tolist() == expected
        assert output["assist_count"] == output["assist_mask"].sum()
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_an_assisted_step_is_cross_entropy(tmp_path, monkeypatch):
    trainer, kept = make(
        tmp_path, monkeypatch, force_rate=1.0, assist_warmup_steps=1, forced_loss_coef=0.5, max_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    output, _ = kept[0]
    trainer.model.load_state_dict(start, strict=False)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    width = output["completion_ids"].size(1)
    learned = output["assist_mask"].bool()
    expected = torch.nn.functional.cross_entropy(logits[:, -width:][learned], output["completion_ids"][learned])
    assert logs_of(trainer)[0]["loss"] == pytest.approx(0.5 * expected.item(), rel=1e-4)


def test_evaluation_is_never_forced(tmp_path, monkeypatch):
    trainer, kept = make(
        tmp_path, monkeypatch, force_rate=1.0, disable_forcing_in_updates=False, per_device_eval_batch_size=4
    )
    metrics = trainer.evaluate(prompts(4))
    assert metrics["eval_forced/fraction"] == 0.0
    assert not any(any(t.forced_mask) for _, trajectories in kept for t in trajectories)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"force_rate": 1.5}, "between 0 and 1"),
        ({"force_rate": 0.5, "record_sample_logprobs": False}, "record_sample_logprobs"),
        ({"force_level": "body"}, "force_level='body'.*call, name, schema"),
        ({"assist_warmup_steps": 3, "num_iterations": 2, "max_steps": 8}, "multiple of 2"),
        ({"assist_warmup_steps": 9, "max_steps": 8}, "longer than training"),
        ({"assist_warmup_steps": -1}, "must be at least 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_epochs": 2},
        {"num_train_epochs": 0.5},
        {"num_train_epochs": 3, "num_iterations": 2, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 1, "steps_per_generation": 3, "gradient_accumulation_steps": 2},
    ],
)
def test_a_warm_up_longer_than_the_epochs_is_refused(tmp_path, monkeypatch, changes):
    options = {"max_steps": -1, "gradient_accumulation_steps": 1, **changes}
    trainer, _ = make(tmp_path, monkeypatch, **options)
    length = len(trainer.get_train_dataloader())
    steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert steps == training_steps(trainer.args, 16) and length > 0
    batch = trainer.args.steps_per_generation * trainer.args.num_iterations
    longer = steps * batch + batch  # a multiple of the steps of a rollout batch, and more than there are
    with pytest.raises(ConfigError, match=rf"{longer}.*are {steps} optimizer steps"):
        make(tmp_path, monkeypatch, assist_warmup_steps=longer, **options)


def test_the_schedule_survives_a_resume(tmp_path, monkeypatch):
    options = {"force_rate": 1.0, "assist_warmup_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer, _ = make(tmp_path, monkeypatch, **options)
    trainer.train()
    assert [log["forced/fraction"] > 0 for log in logs_of(trainer)] == [True, True, False, False]
    for step, expected in ((1, [True, False, False]), (2, [False, False])):
        resumed, kept = make(tmp_path, monkeypatch, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert [log["forced/fraction"] > 0 for log in logs_of(resumed)[step:]] == expected
        assert [("assist_mask" in output) for output, _ in kept] == expected


def test_forcing_without_tools_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no call to force"):
        make(tmp_path, monkeypatch, tools=(), force_rate=0.5)


def test_a_force_policy_chooses_the_tool(tmp_path, monkeypatch):
    other = Tool("other", "Another.", {"type": "object", "properties": {}}, lambda: "x")
    trainer, kept = make(
        tmp_path, monkeypatch, tools=(lookup, other), force_rate=1.0, force_level="name", max_steps=1,
        disable_forcing_in_updates=False, force_policy=lambda trajectory, tools: "other",
    )  # fmt: skip
    trainer.train()
    text = trainer.processing_class.decode(kept[0][1][0].completion_ids)
    assert text.startswith('<tool_call>\n{"name": "other')


def test_forced_fraction_covers_the_micro_batches_used(tmp_path, monkeypatch):
    """Two of three logged steps use a forced rollout batch, and one uses the next, which is not forced."""
    options = {"force_rate": 1.0, "assist_warmup_steps": 2, "steps_per_generation": 2, "max_steps": 6}
    each, _ = make(tmp_path / "each", monkeypatch, **options)
    each.train()
    shares = [log["forced/fraction"] for log in logs_of(each)]
    assert shares[0] == shares[1] > 0 and shares[2:] == [0.0] * 4
    three, _ = make(tmp_path / "three", monkeypatch, logging_steps=3, **options)
    three.train()
    assert [log["forced/fraction"] for log in logs_of(three)] == pytest.approx([2 / 3 * shares[0], 0.0])

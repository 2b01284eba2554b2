"""Forced calls at level "schema": what the grammar of a body allows, for every template, and that samplers obey it."""

import json
import random
import sys

import jsonschema
import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forcing import chat_of, logs_of, tool_templates

from trl_toolgrpo import ChatTemplateError, SamplerError, Tool, ToolGRPOTrainer, ToolSchemaError
from trl_toolgrpo.chat.call_grammar import CallGrammar
from trl_toolgrpo.rollout.forcing import CallPrefixes, Forcing
from trl_toolgrpo.rollout.loop import RolloutLimits, RolloutLoop, RolloutRequest
from trl_toolgrpo.sampling.constraint import CallConstraints, GrammarConstraint
from trl_toolgrpo.sampling.generate_sampler import GenerateSampler
from trl_toolgrpo.sampling.model_sampler import ModelSampler
from trl_toolgrpo.sampling.protocol import constrain
from trl_toolgrpo.tools.runtime.executor import ToolExecutor


SCHEMA = {
    "type": "object",
    "properties": {
        "who": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "loud": {"type": "boolean"},
        "color": {"enum": ["red", "dark blue", 7]},
        "weight": {"type": "number"},
    },
    "required": ["count", "who"],
}


def tool_of(schema, name="lookup"):
    return Tool(name, "Look somebody up.", schema, lambda **arguments: "there")


def walk(chat, constraint, seed, most=600):
    """Return tokens drawn uniformly from the allowed ones, to the end of the turn."""
    draw, ids = random.Random(seed), []
    while not ids or ids[-1] not in chat.stop_ids:
        assert len(ids) < most
        ids.append(draw.choice(constraint.allowed(len(chat.tokenizer) + 3).nonzero()[:, 0].tolist()))
        constraint.accept(ids[-1])
    return ids


def parsed(chat, tool, ids):
    start = chat.render([{"role": "user", "content": "dummy"}], add_generation_prompt=True)
    return chat.parse([*CallPrefixes(chat).tokens(tool.name), *ids], start, [tool.schema], 0).calls


def accepts(chat, tool, text):
    """Return whether the grammar of the body accepts all tokens of a text."""
    constraint = CallConstraints(chat).begin(tool)
    for token in chat.encode(text):
        if not constraint.allowed(len(chat.tokenizer))[token]:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize("template", list(tool_templates()))
def test_every_constrained_body_is_a_call_that_matches_the_schema(template):
    chat, tool = chat_of(template), tool_of(SCHEMA)
    constraints = CallConstraints(chat)
    for seed in range(8):
        ids = walk(chat, constraints.begin(tool), seed)
        (call,) = parsed(chat, tool, ids)
        assert call.error is None and call.name == "lookup"
        jsonschema.validate(call.arguments, SCHEMA)
        assert set(call.arguments) <= set(SCHEMA["properties"])


@pytest.mark.parametrize("template", list(tool_templates()))
def test_what_the_template_itself_writes_is_allowed(template):
    chat, tool = chat_of(template), tool_of(SCHEMA)
    rendered = chat.render_call("lookup", {"who": "Ada", "count": 12, "loud": True, "color": "red"})
    body = rendered[rendered.rindex("lookup") + len("lookup") :]
    assert accepts(chat, tool, body[: -1 if body.endswith("\n") else None])
    assert not accepts(chat, tool, body.replace("red", "rod"))
    assert not accepts(chat, tool, body.replace("12", "x2"))


def test_the_grammar_of_one_json_object_by_hand():
    chat = chat_of("qwen3_instruct_2507")
    tool = tool_of({"type": "object", "properties": {"who": {"type": "string"}}, "required": ["who"]})
    end = "}\n</tool_call><|im_end|>"
    assert accepts(chat, tool, '", "arguments": {"who": "Ada"}' + end)
    assert not accepts(chat, tool, '", "arguments": {}' + end)
    assert not accepts(chat, tool, '", "arguments": {"who": 3}' + end)
    assert not accepts(chat, tool, '", "arguments": {"who": "Ada", "age": 3}' + end)  # nothing the tool does not name
    assert not accepts(chat, tool, '", "arguments": {"who": "Ada</tool_call>"}' + end)  # no control token in a text


def test_the_grammar_of_single_arguments_by_hand():
    chat = chat_of("qwen3_5_nothink")
    free = tool_of({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": ["integer", "null"]}}})

    def body(*arguments):
        written = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
        return f">\n{written}</function>\n</tool_call><|im_end|>"

    assert accepts(chat, free, body())
    assert accepts(chat, free, body(("a", "some words")))
    assert accepts(chat, free, body(("b", "-3")))
    assert accepts(chat, free, body(("a", "x"), ("b", "None")))
    assert not accepts(chat, free, body(("b", "3"), ("a", "x")))  # one order, that of the schema
    assert not accepts(chat, free, body(("b", "three")))
    assert not accepts(chat, free, body(("c", "x")))
    nested = {"type": "array", "items": {"type": "integer"}}
    several = tool_of({"type": "object", "properties": {"rows": nested}, "required": ["rows"]})
    assert accepts(chat, several, body(("rows", "[1, 2]")))
    assert not accepts(chat, several, body(("rows", '["1"]')))
    assert not accepts(chat, several, body())


JSON_KINDS = st.recursive(
    st.sampled_from(
        [
            {"type": "string", "maxLength": 6},
            {"type": "integer", "minimum": -5, "maximum": 500},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["one", 2, None, True]},
            {"const": "fixed"},
            {"anyOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"type": "string", "maxLength": 3}]},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner),
        st.builds(
            lambda item: {"type": "object", "properties": {"inner": item, "properties": item}, "required": ["inner"]},
            inner,
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["alpha", "type", "items", "x y"]), JSON_KINDS, max_size=3),
    st.integers(0, 2**20),
    st.sampled_from(["qwen3", "qwen3_5_nothink", "glm4moe"]),
)
def test_constrained_bodies_match_any_schema(properties, seed, template):
    chat = chat_of(template)
    if template != "qwen3":
        properties = {name.replace(" ", "_"): value for name, value in properties.items()}
    required = list(properties)[seed % 3 :]
    schema = {"type": "object", "properties": properties, "required": required}
    tool = tool_of(schema)
    constraints = CallConstraints(chat)
    constraint = constraints.begin(tool)
    assert constraint is not None and constraints.unsatisfiable == 0
    (call,) = parsed(chat, tool, walk(chat, constraint, seed))
    jsonschema.validate(call.arguments, schema)


@pytest.mark.parametrize(
    ("template", "schema"),
    [
        ("qwen3", {"type": "array", "minItems": 3, "maxItems": 1, "items": {"type": "integer"}}),
        ("qwen3", {"not": {"type": "string"}}),
        ("qwen3_5_nothink", {"type": "string", "pattern": "^a"}),
        ("qwen3_5_nothink", {"enum": ["a<b"]}),
        ("gemma4", {"type": "array", "items": {"type": "string"}}),
    ],
)
def test_unsupported_schema_leaves_the_body_free_and_is_counted(template, schema, caplog):
    constraints = CallConstraints(chat_of(template))
    tool = tool_of({"type": "object", "properties": {"x": schema}, "required": ["x"]})
    assert constraints.begin(tool) is None and constraints.begin(tool) is None
    assert constraints.unsatisfiable == 2
    assert caplog.text.count("only the name is forced") == 1 and "`lookup`" in caplog.text


def test_a_template_whose_arguments_cannot_be_read_is_refused():
    chat = chat_of("qwen3_5_nothink")
    render = chat.render
    chat.render = lambda *args, **kwargs: render(*args, **kwargs).replace("key_5b0d", "argument")
    with pytest.raises(ChatTemplateError, match=r"does not show how it writes arguments.*force_level='name'"):
        CallGrammar(chat)


def test_a_grammar_error_names_the_property():
    grammar = CallGrammar(chat_of("gemma4"))
    schema = {"type": "object", "properties": {"rows": {"type": "array"}}}
    with pytest.raises(ToolSchemaError, match=r"property `rows` of the tool `lookup`.*array"):
        grammar.of(tool_of(schema))


def test_without_llguidance_the_error_says_which_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"trl_toolgrpo\[schema\]"):
        CallConstraints(chat_of("qwen3"))


def test_a_call_ends_with_the_token_its_result_opens_with():
    """Of GLM's two tokens that end a turn, the one before a tool result, whichever has the lower id."""
    chat = chat_of("glm4moe")
    assert len(chat.stop_texts) == 2
    observation = chat.tokenizer.convert_tokens_to_ids("<|observation|>")
    chat.stop_texts = ["<|user|>", "<|observation|>"]
    assert CallGrammar(chat).of(tool_of(SCHEMA)).splitlines()[0].endswith(f"<[{observation}]>)")


def test_a_grammar_that_allows_nothing_is_an_error():
    class Stuck:
        compute_logit_bias, is_error = staticmethod(lambda: bytes(5)), staticmethod(lambda: False)

    with pytest.raises(SamplerError, match="allows no token"):
        GrammarConstraint(Stuck()).allowed(5)


def test_a_token_outside_the_grammar_is_an_error():
    chat = chat_of("qwen3")
    constraint = CallConstraints(chat).begin(tool_of(SCHEMA))
    with pytest.raises(SamplerError, match="constrained turn"):
        constraint.accept(chat.encode("</tool_call>")[0])


# Samplers


class Only:
    """Allows the given tokens in order."""

    def __init__(self, ids):
        self.ids = list(ids)

    def allowed(self, size):
        mask = torch.zeros(size, dtype=torch.bool)
        mask[self.ids[0]] = True
        return mask

    def accept(self, token_id):
        assert token_id == self.ids.pop(0)


def test_constrained_logits_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = constrain(logits, [None, Only([1])])
    assert found.tolist() == [[1.0, 2.0, 3.0], [-torch.inf, 5.0, -torch.inf]]
    assert logits.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert constrain(logits, [None, None]) is logits


@pytest.mark.parametrize("make", [ModelSampler, GenerateSampler])
def test_a_constraint_applies_to_its_row_only(make, tokenizer):
    model = tiny_model(tokenizer)
    stop = tokenizer.eos_token_id
    text = [7, 9, 11, 13, stop]

    def sample(constraints):
        torch.manual_seed(3)
        found = {}
        with make(model, [stop], tokenizer.pad_token_id).open([[1, 2, 3]] * 3, 64) as session:
            for row, constraint in enumerate(constraints):
                session.extend(row, [5], 20 if constraint is None else 8, constraint)
            while session.busy:
                for result in session.step():
                    found[result.row] = result
        return found

    bound = sample([None, Only(text), Only([8, 8, 8, 8, 8, 8, 8, 8, 8])])
    assert bound[1].token_ids == text and bound[1].stopped
    assert bound[2].token_ids == [8] * 8 and not bound[2].stopped
    history = torch.tensor([[1, 2, 3, 5, *bound[0].token_ids]])
    with torch.no_grad():
        scores = torch.log_softmax(model(history).logits[0, 3:-1], dim=-1)
    expected = scores.gather(-1, history[0, 4:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(bound[0].logprobs), expected, atol=1e-4, rtol=0)


def test_a_free_turn_follows_a_constrained_one(tokenizer):
    stop = tokenizer.eos_token_id
    sampler = ModelSampler(tiny_model(tokenizer), [stop], tokenizer.pad_token_id)
    with sampler.open([[1, 2, 3]], 64) as session:
        session.extend(0, [], 8, Only([7, stop]))
        found = []
        while session.busy:
            found += session.step()
        session.extend(0, [4], 5)
        while session.busy:
            found += session.step()
    assert found[0].token_ids == [7, stop] and len(found[1].token_ids) >= 1


# Rollouts


def roll_out(policy_turns, level="schema", rate=1.0, schema=SCHEMA):
    tokenizer = chat_tokenizer("qwen3_instruct_2507")
    chat, stop = chat_of("qwen3_instruct_2507"), tokenizer.eos_token_id
    executor = ToolExecutor(timeout=5.0)
    forcing = Forcing(CallPrefixes(chat), rate, level, 0, None, CallConstraints(chat))
    limits = RolloutLimits(400, 1, 64, 1)
    tool = tool_of(schema)
    requests = [RolloutRequest([1, 2, 3], {"lookup": tool}) for _ in range(policy_turns)]
    sampler = ModelSampler(tiny_model(tokenizer), [stop], tokenizer.pad_token_id)
    with sampler.open([request.prompt_ids for request in requests], 400) as session:
        rollouts = RolloutLoop(session, requests, limits, chat, executor, forcing).run()
    executor.shutdown()
    return rollouts


def test_a_constrained_turn_is_forced_to_its_last_token_and_is_a_valid_call():
    for rollout in roll_out(3):
        trajectory = rollout.trajectory
        trajectory.validate(0)
        first = trajectory.turns[0]
        assert all(trajectory.forced_mask[first.start : first.end])
        assert trajectory.logprobs[first.start : first.end] == [0.0] * (first.end - first.start)
        assert first.stop_reason == "stop" and not first.tool_results[0].is_error
        jsonschema.validate(first.tool_calls[0].arguments, SCHEMA)


def test_a_rollout_batch_tells_how_many_bodies_were_left_free(tmp_path):
    tokenizer = chat_tokenizer("qwen3_instruct_2507")
    odd = {"type": "object", "properties": {"x": {"not": {"type": "string"}}}, "required": ["x"]}
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        lambda completions, **kwargs: [1.0] * len(completions),
        config(
            tmp_path, force_rate=1.0, force_level="schema", assist_warmup_steps=1, max_steps=2,
            max_completion_length=300, max_tool_calling_iterations=1,
        ),
        prompts(16),
        processing_class=tokenizer,
        tools=[tool_of(odd, "odd"), tool_of(SCHEMA)],
        force_policy=lambda trajectory, tools: "odd" if trajectory.turns else "lookup",
    )  # fmt: skip
    trainer.train()
    assisted, free = logs_of(trainer)
    assert 0 < assisted["forced/fraction"] < 1 and assisted["forced/unconstrained"] == 4
    assert assisted["tools/lookup/calls"] == 4 and assisted["tools/lookup/errors"] == 0
    assert free["forced/fraction"] == 0.0 and "forced/unconstrained" not in free


def test_schemas_are_compiled_once_for_each_tool():
    constraints = CallConstraints(chat_of("qwen3"))
    for _ in range(3):
        constraints.begin(tool_of(SCHEMA))
        constraints.begin(tool_of(json.loads(json.dumps(SCHEMA))))
    assert len(constraints._matchers) == 1
    constraints.begin(tool_of({**SCHEMA, "required": []}))
    assert len(constraints._matchers) == 2

"""What prompts show: tools, messages as data sets hold them, and prompts that fit the model."""

import functools
import logging

import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, run_script, tiny_model
from datasets import Dataset
from families import ALL, FIRST_CALL, ONE_CALL, family
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from trl_toolgrpo import DatasetError, Tool, ToolGRPOTrainer, ToolSchemaError
from trl_toolgrpo.chat.prompt_renderer import PromptRenderer
from trl_toolgrpo.validation.chat_templates import check_rendering
from trl_toolgrpo.validation.trainable_parameters import warn_of_dropout


def reward(completions, **kwargs):
    return [float(number % 2) for number in range(len(completions))]


def make_trainer(
    path, rows=None, *, template="qwen3", tools=(add,), model=None, tokenizer=None, eval_rows=None, **options
):
    tokenizer = tokenizer or chat_tokenizer(template)
    sets = [None if r is None else Dataset.from_list(r) for r in (rows, eval_rows)]
    changes = {key: options.pop(key) for key in ("peft_config", "environment_factory") if key in options}
    return ToolGRPOTrainer(
        model or tiny_model(tokenizer),
        reward,
        config(path, **options),
        sets[0] or prompts(),
        sets[1],
        processing_class=tokenizer,
        tools=list(tools) or None,
        **changes,
    )


def read_by_policy(trainer, prompt):
    return trainer._tokenizer.decode(trainer._tokenize_prompts([prompt])[0][0])


# Tools

INNER = {"type": "object", "properties": {"inner_field": {"type": "integer"}}}
SCHEMAS = {
    "one type": ({"type": "string"}, ["string"]),
    "enum of strings": ({"type": "string", "enum": ["red", "blue_one"]}, ["blue_one"]),
    "enum of numbers": ({"type": "integer", "enum": [1, 2, 77]}, ["77"]),
    "enum without a type": ({"enum": ["red", 77, None]}, ["77"]),
    "enum of booleans": ({"type": "boolean", "enum": [True]}, ["true"]),
    "const": ({"const": "only_this"}, ["only_this"]),
    "const with a type": ({"type": "integer", "const": 4711}, ["4711"]),
    "optional": ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["string"]),
    "anyOf": ({"anyOf": [{"type": "boolean"}, {"type": "string"}]}, ["boolean", "string"]),
    "oneOf": ({"oneOf": [{"type": "boolean"}, {"type": "string"}]}, ["boolean", "string"]),
    "oneOf with an object": ({"oneOf": [INNER, {"type": "string"}]}, ["inner_field"]),
    "allOf": ({"allOf": [{"type": "string"}, {"minLength": 3}]}, ["string"]),
    "reference": ({"$ref": "#/$defs/P"}, ["inner_field"]),
    "reference in a list": ({"type": "array", "items": {"$ref": "#/$defs/P"}}, ["inner_field"]),
    "reference in a union": ({"anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]}, ["inner_field"]),
    "nested object": ({"type": "object", "properties": {"outer_field": INNER}}, ["outer_field", "inner_field"]),
    "list of objects": ({"type": "array", "items": INNER}, ["inner_field"]),
    "long list of objects": (
        {
            "type": "array",
            "items": {"type": "object", "properties": {f"long_field_{i}": {"type": "string"} for i in range(6)}},
        },
        ["long_field_5"],
    ),
    "enum in a list": ({"type": "array", "items": {"type": "string", "enum": ["blue_one"]}}, ["blue_one"]),
}


def schema_tool(inner):
    parameters = {"type": "object", "properties": {"argument": inner}, "required": ["argument"]}
    return Tool("f", "Does it.", {**parameters, "$defs": {"P": INNER}}, lambda **arguments: None)


@pytest.mark.parametrize("template", [name for name in ALL if name != "deepseekv3"])  # which shows no tool
def test_a_tool_that_is_accepted_is_shown_whole(template):
    fam, refused = family(template), []
    for label, (inner, needed) in SCHEMAS.items():
        tool = schema_tool(inner)
        try:
            check_rendering(PromptRenderer(fam.tokenizer, (), fam.template), [tool])
        except ToolSchemaError:
            refused.append(label)
            continue
        text = fam.tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], tools=[tool.schema], tokenize=False, chat_template=fam.template
        ).lower()
        assert not [word for word in needed if word not in text], (template, label)
    lost = {"optional", "anyOf", "allOf", "const", "enum of numbers", "enum without a type", "enum of booleans"}
    if template.startswith(("gemma", "diffusion")) or template == "gptoss":
        assert lost < set(refused) and "one type" not in refused and "reference" not in refused
        assert ("oneOf" in refused) == (template != "gptoss")
    else:
        assert not refused


@pytest.mark.parametrize("template", ["gemma4", "gptoss", "qwen3"])
@pytest.mark.parametrize("recording", [True, False])
def test_schemas_are_written_in_words_the_template_knows(tmp_path, template, recording):
    parameters = {
        "type": "object",
        "properties": {
            "city": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "unit": {"const": "kelvin"},
            "place": {"allOf": [{"$ref": "#/$defs/P"}], "description": "Where."},
            "name": {"type": ["string", "null"]},
        },
        "$defs": {"P": INNER},
    }
    tool = Tool("weather", "Tells the weather.", parameters, lambda **arguments: None)
    trainer = make_trainer(tmp_path, template=template, tools=[tool], record_sample_logprobs=recording)
    text = read_by_policy(trainer, [{"role": "user", "content": "hi"}])
    assert "kelvin" in text and "inner_field" in text and "Where." in text
    null = {"gemma4": "nullable:true", "gptoss": "string | null", "qwen3": '"type": "null"'}[template]
    assert null in text
    trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "hi"}]}] * 4)


def test_a_schema_the_template_cannot_show_is_refused(tmp_path):
    with pytest.raises(
        ToolSchemaError, match=r"does not show the values \[1, 2, 77\] of 'argument'.*enum. of strings"
    ):
        make_trainer(tmp_path, template="gemma4", tools=[schema_tool({"type": "integer", "enum": [1, 2, 77]})])
    with pytest.raises(ToolSchemaError, match=r"the property 'argument.long_field_0'"):
        make_trainer(tmp_path, template="gptoss", tools=[schema_tool(SCHEMAS["long list of objects"][0])])


def test_a_recursive_schema_is_kept_or_refused_by_template(tmp_path):
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}, "value": {"type": "integer"}}}
    tool = Tool(
        "walk",
        "Walks.",
        {"type": "object", "properties": {"node": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": node}},
        print,
    )
    assert tool.schema["function"]["parameters"]["$defs"] == {"Node": node}
    check_rendering(PromptRenderer(chat_tokenizer("qwen3")), [tool])
    with pytest.raises(ToolSchemaError, match="reference"):
        check_rendering(PromptRenderer(chat_tokenizer("gemma4")), [tool])


def test_a_hidden_constraint_is_logged(caplog):
    tool = schema_tool({"type": "integer", "minimum": 4711, "description": "How many."})
    check_rendering(PromptRenderer(chat_tokenizer("gemma4")), [tool])
    assert "does not show all of the tool 'f': `minimum` of 'argument'" in caplog.text
    caplog.clear()
    check_rendering(PromptRenderer(chat_tokenizer("qwen3")), [tool])
    assert not caplog.text


def test_a_template_that_shows_no_tools_is_warned_of(tmp_path, caplog):
    make_trainer(tmp_path, template="deepseekv3")
    assert "does not show tools: no prompt tells the policy of add" in caplog.text
    caplog.clear()
    told = [{"role": "system", "content": "Call add with a and b."}, {"role": "user", "content": "hi"}]
    make_trainer(tmp_path, [{"prompt": told}] * 4, template="deepseekv3")
    make_trainer(tmp_path)
    assert "does not show tools" not in caplog.text


class Bringing:
    """An environment whose tools are known at reset."""

    def __init__(self):
        self.tools = []

    def reset(self, **kwargs):
        self.tools = [Tool("weather", "Tells.", {"type": "object", "properties": {"city": {"const": "Oslo_"}}}, print)]


def test_tools_of_a_reset_are_shown_in_plain_words_too(tmp_path):
    trainer = make_trainer(tmp_path, template="gemma4", tools=(), environment_factory=Bringing)
    batch = trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "hi"}]}] * 4)
    assert "Oslo_" in trainer._tokenizer.decode(batch["prompt_ids"][0])


# Messages


def salary(person: str, year: int | None = None, options: dict | None = None) -> str:
    """
    Tells a salary.

    Args:
        person: Whose.
        year: When.
        options: Further ones.
    """
    return "7"


CLEAN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one two"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "call_1", "function": {"name": "salary", "arguments": {"person": "Ada ✓"}}}
        ],
    },
    {"role": "tool", "name": "salary", "content": "seven", "tool_call_id": "call_1"},
    {"role": "user", "content": "go on"},
]


def changed(place, **changes):
    message = {key: value for key, value in {**CLEAN[place], **changes}.items() if value is not ...}
    return [*CLEAN[:place], message, *CLEAN[place + 1 :]]


def called(**changes):
    call = {**CLEAN[2]["tool_calls"][0]}
    call["function"] = {**call["function"], **changes}
    return changed(2, tool_calls=[call])


FORMS = {
    "as it is": CLEAN,
    "nulls of other tools": called(arguments={"person": "Ada ✓", "a": None, "b": None}),
    "arguments as JSON text": called(arguments='{"person": "Ada \\u2713"}'),
    "nulls of other messages": changed(1, tool_calls=None, name=None, tool_call_id=None),
    "no content next to a call": changed(2, content=None),
    "no key for a content": changed(2, content=...),
    "text in parts": changed(
        1, content=[{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image": None}]
    ),
    "a result in parts": changed(3, content=[{"type": "text", "text": "seven"}]),
    "a system message in parts": changed(0, content=[{"type": "text", "text": "Be brief."}]),
    "a result without a name": changed(3, name=None),
    "a call without `function`": changed(
        2, tool_calls=[{"id": "call_1", "name": "salary", "arguments": {"person": "Ada ✓"}}]
    ),
}


@pytest.mark.parametrize("template", ALL)
def test_messages_mean_the_same_in_every_form(tmp_path, template):
    trainer = make_trainer(tmp_path, template=template, tools=[salary])
    clean = [dict(message) for message in CLEAN]
    if template == "deepseekv3":  # which takes arguments as text alone
        clean = called(arguments='{"person": "Ada ✓"}')
    expected = trainer.rollouts.prompts.renderer.text(clean)
    assert "seven" in expected and "Ada ✓" in expected and "Be brief." in expected
    for label, form in FORMS.items():
        assert read_by_policy(trainer, form) == expected, label


@pytest.mark.parametrize("recording", [True, False])
def test_nulls_that_datasets_adds_reach_no_prompt(tmp_path, recording):
    other = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "call_1", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
        ],
    }
    row = {
        "prompt": [
            *CLEAN[:2],
            other,
            {"role": "tool", "name": "add", "content": "3", "tool_call_id": "call_1"},
            *CLEAN[1:],
        ]
    }
    trainer = make_trainer(
        tmp_path, [row] * 4, tools=[add, salary], eval_rows=[row] * 4, record_sample_logprobs=recording
    )
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        prompt = dataset[0]["prompt"]
        assert prompt[2]["tool_calls"][0]["function"]["arguments"]["person"] is None
        text = read_by_policy(trainer, prompt)
        assert '"arguments": {"a": 1, "b": 2}}' in text and '"arguments": {"person": "Ada ✓"}}' in text


def test_nulls_are_dropped_at_any_depth_and_kept_where_the_schema_allows_them(tmp_path, caplog):
    point = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": ["integer", "null"]}}}
    properties = {
        "points": {"type": "array", "items": {"$ref": "#/$defs/P"}},
        "end": {"anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]},
    }
    free = {**properties, "free": {"type": "object"}, "limit": {"type": "integer", "nullable": True}}
    tool = Tool("draw", "Draws.", {"type": "object", "properties": free, "$defs": {"P": point}}, print)
    arguments = {
        "points": [{"x": None, "y": None, "z": None}, {"x": 1, "y": 2}],
        "end": {"x": None, "y": 3},
        "free": {"k": None},
        "limit": None,
        "other": None,
    }
    call = {"type": "function", "function": {"name": "draw", "arguments": arguments}}
    row = {
        "prompt": [
            CLEAN[1],
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "draw", "content": "ok"},
        ]
    }
    trainer = make_trainer(tmp_path, [row] * 4, tools=[tool])
    rewritten = trainer.rollouts.prompts.messages.rewritten(row["prompt"], {"draw": tool})
    kept = rewritten[1]["tool_calls"][0]["function"]["arguments"]
    assert kept == {"points": [{"y": None}, {"x": 1, "y": 2}], "end": {"y": 3}, "free": {"k": None}, "limit": None}
    assert "earlier calls have nulls in draw.free" in caplog.text
    assert row["prompt"][1]["tool_calls"][0]["function"]["arguments"] is arguments and "other" in arguments


def test_integers_that_datasets_makes_floats_are_shown_as_integers(tmp_path):
    point = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "number"}}}
    properties = {
        "a": {"type": "integer"},
        "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "c": {"type": "number"},
        "d": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "p": {"type": "array", "items": point},
        "free": {},
    }
    tool = Tool("draw", "Draws.", {"type": "object", "properties": properties}, print)
    other = Tool("weigh", "Weighs.", {"type": "object", "properties": {"a": {"type": "number"}}}, print)

    def conversation(name, **arguments):
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": None}]}
        call["tool_calls"][0]["function"] = {"name": name, "arguments": arguments}
        return {"prompt": [CLEAN[1], call, {"role": "tool", "name": name, "content": "ok"}]}

    given = {"a": 1, "b": 2, "c": 3, "d": 7, "p": [{"x": 4, "y": 5}], "free": 6}
    halves = {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.5, "p": [{"x": 0.5, "y": 0.5}], "free": 0.5}
    rows = [conversation("draw", **given), conversation("weigh", **halves)] * 2
    trainer = make_trainer(tmp_path, rows, tools=[tool, other])
    prompt = trainer.train_dataset[0]["prompt"]
    assert prompt[1]["tool_calls"][0]["function"]["arguments"]["a"] == 1.0
    shown = '{"a": 1, "b": 2, "c": 3.0, "d": 7, "p": [{"x": 4, "y": 5.0}], "free": 6.0}'
    assert f'"arguments": {shown}' in read_by_policy(trainer, prompt)
    assert '"arguments": {"a": 0.5, ' in read_by_policy(trainer, trainer.train_dataset[1]["prompt"])


@pytest.mark.parametrize("text", ["{'person': 'Ada'}", "[1]", '"text"', "person=Ada"])
def test_arguments_that_are_no_object_are_refused_by_row(tmp_path, text):
    rows = [{"prompt": CLEAN[:2]}, {"prompt": called(arguments=text)}]
    for sets in ({"rows": rows * 2}, {"eval_rows": rows}):
        with pytest.raises(
            DatasetError, match=r"row 1: a message calls the tool 'salary'.*no JSON object.*Write an object"
        ):
            make_trainer(tmp_path, **sets, tools=[salary])


SYSTEM = CLEAN[0]
DEVELOPER = {"role": "developer", "content": "Never say never."}
LOST = ["deepseekv3", "glm4moe", "muse_glimmer", "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"]
RAISES = ["qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"]


@pytest.mark.parametrize("template", ALL)
def test_a_developers_message_is_read_or_refused(tmp_path, template):
    rows = [{"prompt": CLEAN[:2]}, {"prompt": [DEVELOPER, CLEAN[1]]}]
    if template in LOST + RAISES:
        words = (
            "does not show the text of message 0 \\('developer'\\).*'system'"
            if template in LOST
            else "Unexpected message role"
        )
        with pytest.raises(DatasetError, match=f"`train_dataset`, row 1: .*{words}"):
            make_trainer(tmp_path, rows * 2, template=template)
    else:
        trainer = make_trainer(tmp_path, rows * 2, template=template)
        assert DEVELOPER["content"] in read_by_policy(trainer, rows[1]["prompt"])


@pytest.mark.parametrize("template", ALL)
@pytest.mark.parametrize("tools", [(), (salary,)])
def test_every_message_of_a_role_that_no_template_knows_is_read_or_refused(tmp_path, template, tools):
    for message in (
        {"role": "critic", "content": "Unheard words."},
        {"role": "function", "name": "salary", "content": "Unheard words."},
    ):
        rows = [{"prompt": CLEAN[:2]}, {"prompt": [*CLEAN[:4], message]}]
        try:
            trainer = make_trainer(tmp_path, rows * 2, template=template, tools=tools)
        except DatasetError as error:
            assert "`train_dataset`, row 1: the chat template" in str(error)
        else:
            assert "Unheard words." in read_by_policy(trainer, rows[1]["prompt"])


@pytest.mark.parametrize("template", ALL)
def test_parallel_calls_are_read_or_refused(tmp_path, template):
    calls = [
        {"type": "function", "id": f"call_{i}", "function": {"name": "salary", "arguments": {"person": f"person{i}"}}}
        for i in range(2)
    ]
    results = [{"role": "tool", "name": "salary", "content": "seven", "tool_call_id": f"call_{i}"} for i in range(2)]
    prompt = [CLEAN[1], {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    if template in ONE_CALL + FIRST_CALL:
        with pytest.raises(
            DatasetError, match=r"row 0: the chat template (does not show the call of 'salary'|cannot render)"
        ):
            make_trainer(tmp_path, [{"prompt": prompt}] * 4, template=template, tools=[salary])
    else:
        trainer = make_trainer(tmp_path, [{"prompt": prompt}] * 4, template=template, tools=[salary])
        assert "person1" in read_by_policy(trainer, prompt)


def test_a_prompt_the_template_fails_on_is_named_by_row(tmp_path):
    tokenizer = chat_tokenizer()
    failing = "{{ messages[0].missing.key if messages[0].content == 'odd' else '' }}"
    tokenizer.chat_template = failing + tokenizer.chat_template
    rows = [
        {"prompt": [{"role": "user", "content": "even"}]},
        {"prompt": [{"role": "user", "content": "odd"}, CLEAN[1]]},
    ]
    with pytest.raises(
        DatasetError, match=r"row 1: the chat template cannot render the prompt: UndefinedError.*user, user"
    ):
        make_trainer(tmp_path, rows * 2, tokenizer=tokenizer, tools=())


@pytest.mark.parametrize("tools", [(), (add,)])
def test_a_row_without_a_prompt_is_named(tmp_path, tools):
    rows = [*prompts(3).to_list(), {"prompt": None}]
    with pytest.raises(DatasetError, match="`train_dataset`, row 3: the prompt is 'None' of type NoneType"):
        make_trainer(tmp_path, rows, tools=tools)
    with pytest.raises(DatasetError, match="`eval_dataset`, row 3"):
        make_trainer(tmp_path, eval_rows=rows, tools=tools, num_generations_eval=2, per_device_eval_batch_size=2)


@pytest.mark.parametrize("kind", ["pandas", "arrow", "numpy"])
def test_formats_that_give_no_prompts_are_refused(tmp_path, kind):
    tokenizer = chat_tokenizer()
    arguments = {"processing_class": tokenizer, "train_dataset": prompts().with_format(kind)}
    with pytest.raises(DatasetError, match=rf"format '{kind}'.*with_format\(None\)"):
        ToolGRPOTrainer(tiny_model(tokenizer), reward, config(tmp_path), **arguments)
    arguments["train_dataset"] = prompts().with_format("torch")
    ToolGRPOTrainer(tiny_model(tokenizer), reward, config(tmp_path), **arguments)


def test_text_next_to_a_call_and_names_of_speakers_are_warned_of(tmp_path, caplog):
    rows = [{"prompt": changed(2, content="Let me look.")}, {"prompt": changed(1, name="Grace")}]
    make_trainer(tmp_path, rows * 2, template="llama3_1", tools=[salary])
    assert "row 0: the chat template does not show the text of message 2 ('assistant')" in caplog.text
    assert "row 1: the chat template does not show the name of message 1 ('user')" in caplog.text


# Lengths


def test_a_prompt_longer_than_the_model_is_refused(tmp_path, caplog):
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("short", "é" * 400)]
    for sets in ({"rows": rows * 2}, {"eval_rows": rows}):
        with pytest.raises(DatasetError, match=r"row 1: the prompt has \d+ tokens.*the model 600 positions.*Shorten"):
            make_trainer(tmp_path, **sets, model=tiny_model(chat_tokenizer(), max_position_embeddings=600), tools=())
    caplog.clear()
    model = tiny_model(chat_tokenizer(), max_position_embeddings=840)
    make_trainer(tmp_path, rows * 2, model=model, tools=())
    assert "fewer than `max_completion_length" not in caplog.text
    make_trainer(tmp_path, rows * 2, model=model, tools=(), max_completion_length=100)
    assert "fewer than `max_completion_length=100`" in caplog.text


class Wordy:
    """An environment that adds to some prompts more than the model can read."""

    made = 0

    def __init__(self):
        Wordy.made += 1
        self.words = "long " * 300 if Wordy.made % 4 == 1 else "short"

    def reset(self, **kwargs):
        return self.words


def absolute(tokenizer):
    torch.manual_seed(0)
    options = {"n_positions": 400, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0, "pad_token_id": tokenizer.pad_token_id}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), attn_pdrop=0.0, **options, **ends))
    model.config._name_or_path = "tiny-gpt2"
    return model


@pytest.mark.parametrize("kind", ["rotary", "absolute"])
def test_a_prompt_that_grows_beyond_the_model_ends_its_rollout(tmp_path, caplog, kind):
    Wordy.made = 0
    tokenizer = chat_tokenizer()
    model = absolute(tokenizer) if kind == "absolute" else tiny_model(tokenizer, max_position_embeddings=400)
    options = {"environment_factory": Wordy, "model": model, "tokenizer": tokenizer, "tools": ()}
    trainer = make_trainer(tmp_path, **options, logprob_check="off")
    trainer.train()
    caplog.clear()
    batch = trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "hello"}]}] * 4)
    long, *rest = trainer.rollouts.batch.trajectories
    assert long.stop_reason == "length" and long.truncated and not any(long.tool_mask) and len(long.prompt_ids) > 400
    assert not batch["completion_mask"][0].any() and all(mask.any() for mask in batch["completion_mask"][1:])
    assert all(t.completion_ids and any(t.tool_mask) for t in rest)
    assert "1 of 4 prompts have at least as many tokens as the model has positions (400)" in caplog.text


def test_a_budget_beyond_the_model_is_cut(monkeypatch, tmp_path):
    tokenizer = chat_tokenizer()
    ids = tokenizer.apply_chat_template([CLEAN[1]], add_generation_prompt=True, tokenize=True)["input_ids"]
    positions = {"max_position_embeddings": len(ids) + 5}
    got = run_script(
        ToolGRPOTrainer,
        monkeypatch,
        tmp_path,
        [["many words, none of them the last"]],
        rows=[{"prompt": [CLEAN[1]]}] * 4,
        tokenizer=tokenizer,
        model_options=positions,
    )
    assert all(t.stop_reason == "length" and len(t.completion_ids) == 5 for t in got.trajectories)


# Dropout


def dropout_warnings(caplog, path, model, tokenizer, **options):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_trainer(path, model=model, tokenizer=tokenizer, tools=(), **options)
    return [record.getMessage() for record in caplog.records if "active dropout" in record.getMessage()]


def opt(tokenizer, **changes):
    options = {
        "hidden_size": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    }
    still = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "eos_token_id": tokenizer.eos_token_id}
    model = OPTForCausalLM(
        OPTConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **{**options, **still, **changes})
    )
    model.config._name_or_path = "tiny-opt"
    return model


def test_dropout_is_found_whatever_holds_it(tmp_path, caplog):
    tokenizer = chat_tokenizer()
    warned = functools.partial(dropout_warnings, caplog, tmp_path, tokenizer=tokenizer)
    assert "`dropout=0.1`" in warned(model=opt(tokenizer, dropout=0.1))[0]
    assert "`dropout=0.1`" in warned(model=opt(tokenizer, dropout=0.1), disable_dropout=True)[0]
    assert "`attention_dropout=0.2`" in warned(model=opt(tokenizer, attention_dropout=0.2))[0]
    assert not warned(model=opt(tokenizer))
    assert "`attention_dropout=0.3`" in warned(model=tiny_model(tokenizer, attention_dropout=0.3))[0]
    gpt2 = absolute(tokenizer)
    for module in gpt2.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    assert "resid_dropout=0.2" in warned(model=gpt2)[0]
    assert not warned(model=gpt2, disable_dropout=True)  # modules alone, although the configuration speaks of others
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3, init_lora_weights=False)
    assert "`lora_dropout=0.3`" in warned(model=tiny_model(tokenizer), peft_config=lora)[0]
    assert not warned(model=tiny_model(tokenizer))
    model, state = opt(tokenizer, dropout=0.1).eval(), torch.random.get_rng_state()
    warn_of_dropout(model)
    assert torch.equal(torch.random.get_rng_state(), state) and not any(m.training for m in model.modules())

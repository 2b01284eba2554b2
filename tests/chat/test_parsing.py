"""Assistant turns are read back as they were written, over every tool-capable template TRL ships."""

import re
import time

import pytest
from conftest import add, chat_tokenizer, config, prompts, run_script, tiny_model
from families import (
    ALL,
    CALLS,
    FIRST_CALL,
    GEMMA4,
    HEADLESS,
    ONE_CALL,
    TOOLS,
    TRAINING,
    USER,
    calls_of,
    family,
    tool_messages,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import parse_response

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.chat.parsing import _read_call, add_missing_response_template
from trl_toolgrpo.chat.tool_chat import ToolChat


def assert_reads(fam, ids, prefix, calls, content=""):
    turn = fam.chat.parse(ids, prefix, TOOLS, 3)
    assert [(call.name, call.arguments, call.error) for call in turn.calls] == [(n, a, None) for n, a in calls]
    assert [call.id for call in turn.calls] == [f"call_3_{index}" for index in range(len(calls))]
    assert turn.message["role"] == "assistant" and turn.message["content"] == content
    return turn


def assert_as_trl(fam, turn, ids, prefix):
    expected = parse_response(fam.tokenizer, ids, prefix=fam.encode(prefix), tools=TOOLS)
    message = {**turn.message}
    if "tool_calls" in message:
        message["tool_calls"] = [{k: v for k, v in call.items() if k != "id"} for call in message["tool_calls"]]
        assert [call["id"] for call in turn.message["tool_calls"]] == [c.id for c in turn.calls if c.error is None]
    assert message == expected


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_calls_are_read_back(name, count):
    fam = family(name)
    calls, _ = calls_of(name, count)
    ids, prompt = fam.turn(calls)
    assert_as_trl(fam, assert_reads(fam, ids, prompt, calls), ids, prompt)


@pytest.mark.parametrize("name", ALL)
def test_calls_of_a_later_turn_are_read_with_the_opening_of_that_turn(name):
    fam = family(name)
    calls, _ = calls_of(name, 2)
    ids, _ = fam.turn(calls)
    _, opening = fam.chat.tool_suffix(fam.id(fam.end_of_turn), tool_messages(calls, ["10", "20"][: len(calls)]))
    if name in HEADLESS:
        ids = fam.encode(fam.decode(ids).removeprefix("</think>\n\n"))
    assert_reads(fam, ids, opening, calls)


@pytest.mark.parametrize("name", ALL)
def test_plain_text_has_no_calls(name):
    fam = family(name)
    ids, prompt = fam.turn([], "The sum is 3. Done")
    turn = fam.chat.parse(ids, prompt, TOOLS, 0)
    assert turn.calls == [] and "tool_calls" not in turn.message
    assert turn.message["content"] == "The sum is 3. Done"
    assert_as_trl(fam, turn, ids, prompt)


@pytest.mark.parametrize("name", ALL)
def test_empty_and_cut_off_turns_are_messages(name):
    fam = family(name)
    ids, prompt = fam.turn(CALLS[:1])
    for cut in range(len(ids)):
        message = fam.chat.parse(ids[:cut], prompt, TOOLS, 0).message
        assert message["role"] == "assistant" and isinstance(message["content"], str)
    assert fam.chat.parse([], prompt, TOOLS, 0).calls == []


NOTE = {
    "type": "function",
    "function": {
        "name": "note",
        "description": "Takes down a note.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "other": {"type": "string"},
                "count": {"type": "integer"},
                "rate": {"type": "number"},
                "flag": {"type": "boolean"},
                "maybe": {"type": ["string", "null"]},
                "items": {"type": "array"},
                "extra": {"type": "object"},
            },
        },
    },
}
# Pieces of texts: characters of every markup, and the markers of every family
PIECES = [
    *"<>|\"'\\{}[](),=:;/_-.`0a",
    *(
        "\n",
        "\t",
        " ",
        "\r",
        "\x00",
        "\x0b",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2028",
        "é",
        "\U0001f600",
        "null",
        "None",
        "\\n",
    ),
    *("<tool_call>", "</tool_call>", "<function=note>", "</function>", "<parameter=text>", "</parameter>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<think>", "</think>", '"}}\n</tool_call>'),
    *("<|tool_call_start|>[note(", "<|tool_call_end|>", "')]", "')]<|tool_call_end|>", "it's"),
    *("<|tool_call>call:note{", "<tool_call|>", "}<tool_call|>", "<|channel>thought\n", "<channel|>"),
    *("<|channel|>", "<|message|>", "<|start|>assistant", "<|end|>", "<|constrain|>", " to=functions.note"),
    *("<｜tool▁call▁begin｜>", "\n```<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    *('<atem:invoke name="note">', "</atem:invoke>", "</atem:parameter>", "</atem:function_calls>"),
    *('{"name": "note", "parameters": {', "<|eom|>"),
]
CHARACTERS = st.characters(codec="utf-8")
FREE_TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(CHARACTERS, max_size=3)), max_size=7).map("".join)

# In a notation without escapes, a text that holds the markup after it cannot be distinguished from that markup
AMBIGUOUS = {
    r"qwen3_(5|6|8)|nemotron": r"</parameter>\s*(<parameter=|(</function>\s*)?</tool_call>)"
    r"|<tool_call>\s*<function=[^\n>]+>\s*<parameter=",
    r"glm": r"</arg_value>\s*(<arg_key>|</tool_call>)|<tool_call>\s*[^\s<{]+\s*<arg_key>",
    r"muse": r"</atem:parameter>\s*(<atem:parameter name=|</atem:invoke>\s*(</atem:function_calls>|<atem:invoke))"
    r'|<atem:invoke name="[^"]+">\s*<atem:parameter name=',
    r"(diffusion_)?gemma": r'<\|"\|>',
    r"lfm2_2_5(_v2)?(_training)?$": r"'\s*(,\s*[\w.-]+=|\)\s*(,\s*[\w.-]+\(|\]\s*<\|tool_call_end\|>))"
    r"|<\|tool_call_start\|>\s*\[\s*[\w.-]+\(",
}


def is_ambiguous(name, text):
    return any(re.match(names, name) and re.search(pattern, text) for names, pattern in AMBIGUOUS.items())


def assert_note(name, arguments):
    fam = family(name)
    ids, prompt = fam.turn([("note", arguments)])
    turn = fam.chat.parse(ids, prompt, [NOTE], 0)
    assert [(call.name, call.arguments, call.error) for call in turn.calls] == [("note", arguments, None)]
    assert [key for key, value in turn.calls[0].arguments.items() if isinstance(value, bool)] == [
        key for key in turn.calls[0].arguments if isinstance(arguments[key], bool)
    ]
    assert turn.message["content"] == ""


@settings(max_examples=25, deadline=None)
@given(text=FREE_TEXT, other=st.none() | FREE_TEXT)
@example(text=" it's (a, b) and ['c'] \n", other='say "hi"')
@example(text="C:\\new\\table", other="\n\n")
@example(text="", other="\t")
@pytest.mark.parametrize("name", ALL + TRAINING)
def test_any_text_argument_survives_the_round_trip(name, text, other):
    arguments = {"text": text} if other is None else {"text": text, "other": other}
    fam = family(name)
    for value in arguments.values():
        assume(not is_ambiguous(name, value) and not any(stop in value for stop in fam.tokenizer.stop_texts))
    assert_note(name, arguments)


@settings(max_examples=20, deadline=None)
@given(before=FREE_TEXT, after=FREE_TEXT)
@pytest.mark.parametrize("name", [name for name in ALL if any(re.match(names, name) for names in AMBIGUOUS)])
def test_text_that_closes_its_own_call_makes_it_malformed(name, before, after):
    """The argument holds the end of a call: the call must not run with the text before it."""
    endings = {
        "glm": "</arg_value>\n</tool_call>",
        "muse": "</atem:parameter>\n</atem:invoke>\n</atem:function_calls>",
        "lfm": "')]<|tool_call_end|>",
        "gemma": '<|"|>}<tool_call|>',
        "diffusion": '<|"|>}<tool_call|>',
    }
    ending = next((text for prefix, text in endings.items() if name.startswith(prefix)), None)
    ending = ending or "\n</parameter>\n</function>\n</tool_call>"
    fam = family(name)
    for part in (before, after):
        assume(not is_ambiguous(name, part) and not any(stop in part for stop in fam.tokenizer.stop_texts))
        assume(not any(marker in part for marker in ("<tool_call>", "<|tool_call", "atem:invoke", "'", "<|channel>")))
    ids, prompt = fam.turn([("note", {"text": before + ending + after})])
    calls = fam.chat.parse(ids, prompt, [NOTE], 0).calls
    assert calls and all(call.error is not None for call in calls)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b_2", "c"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=20, deadline=None)
@given(
    arguments=st.fixed_dictionaries(
        {},
        optional={
            "count": st.integers(-(2**53) + 1, 2**53 - 1),
            "rate": st.floats(allow_nan=False, allow_infinity=False),
            "flag": st.booleans(),
            "maybe": st.none() | st.sampled_from(["", "nil", "Null", "00", " "]),
            "items": st.lists(JSON_VALUES, max_size=3),
            "extra": st.dictionaries(st.sampled_from(["a", "b_2", "c"]), JSON_VALUES, max_size=3),
        },
    )
)
@pytest.mark.parametrize("name", ALL + TRAINING)
def test_any_json_argument_survives_the_round_trip(name, arguments):
    assert_note(name, arguments)


LINES = st.text(st.characters(codec="utf-8", exclude_characters="<>|{}"), max_size=12)


@settings(max_examples=12, deadline=None)
@given(texts=st.tuples(LINES, LINES, LINES))
@pytest.mark.parametrize("name", ALL + TRAINING)
def test_text_around_calls_is_kept_in_order(name, texts):
    fam = family(name)
    call = ("note", {"text": "x"})
    base = name.removesuffix("_training")
    if base in FIRST_CALL:
        parts = [texts[0], call]  # a call is the last message of a turn
    elif base in ONE_CALL:
        parts = [texts[0], call, texts[1]]
    else:
        parts = [texts[0], call, texts[1], call, texts[2]]
    ids, prompt = fam.turn_of(*parts)
    turn = fam.chat.parse(ids, prompt, [NOTE], 0)
    assert [(c.name, c.arguments, c.error) for c in turn.calls] == [(*p, None) for p in parts if isinstance(p, tuple)]
    stretches = [part.strip() for part in parts if isinstance(part, str)]
    assert turn.message["content"] == "\n".join(stretch for stretch in stretches if stretch)


@pytest.mark.parametrize("name", TRAINING)
def test_training_templates_are_parsed_like_the_originals(name):
    assert (
        family(name).tokenizer.response_template == family(name.removesuffix("_training")).tokenizer.response_template
    )


GOOD = '<tool_call>\n{"name": "get_salary", "arguments": {"year": %d}}\n</tool_call>'
MALFORMED = [
    ('<tool_call>\n{"name": "get_salary", "arguments": {\n</tool_call>', "", "Expecting property name"),
    ('<tool_call>\n{"arguments": {}}\n</tool_call>', "", 'needs a "name"'),
    ('<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>', "", 'needs a "name"'),
    ("<tool_call>\n[1, 2]\n</tool_call>", "", 'needs a "name"'),
    ('<tool_call>\n"get_salary"\n</tool_call>', "", 'needs a "name"'),
    ("<tool_call>\n\n</tool_call>", "", "Expecting value"),
    (
        '<tool_call>\n{"name": "get_salary", "arguments": [1]}\n</tool_call>',
        "get_salary",
        "must be an object, got list",
    ),
    (
        '<tool_call>\n{"name": "get_salary", "arguments": "x"}\n</tool_call>',
        "get_salary",
        "must be an object, got str",
    ),
    ("<tool_call>\n" + "[" * 100_000 + "\n</tool_call>", "", "recursion"),
]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("text", "name", "reason"), MALFORMED)
def test_malformed_call_keeps_its_place_among_the_others(text, name, reason, place):
    fam = family("qwen3")
    written = [GOOD % 1, GOOD % 2]
    written.insert(place, text)
    ids = fam.encode("Look.\n" + "\n".join(written) + "<|im_end|>")
    turn = fam.chat.parse(ids, fam.render([USER], True), TOOLS, 0)
    assert [call.error is None for call in turn.calls] == [index != place for index in range(3)]
    bad = turn.calls.pop(place)
    assert bad.name == name and bad.error and reason in bad.error and len(bad.error) < 1000
    assert [call.arguments for call in turn.calls] == [{"year": 1}, {"year": 2}]
    assert [call["function"]["arguments"] for call in turn.message["tool_calls"]] == [{"year": 1}, {"year": 2}]
    assert [call["id"] for call in turn.message["tool_calls"]] == [f"call_0_{i}" for i in range(3) if i != place]
    assert turn.message["content"].strip() == "Look."


def test_two_malformed_calls_in_a_row_keep_their_places():
    fam = family("qwen3")
    text = f"<tool_call>a</tool_call><tool_call>b</tool_call>{GOOD % 1}<tool_call>c</tool_call>{GOOD % 2}<|im_end|>"
    turn = fam.chat.parse(fam.encode(text), fam.render([USER], True), TOOLS, 0)
    assert [call.error is None for call in turn.calls] == [False, False, True, False, True]
    assert [call.error[-3:] for call in turn.calls if call.error] == ["'a'", "'b'", "'c'"]


HARMONY = "<|channel|>commentary to=functions.get_salary"
BODY = '{"person": "Ada"}<|call|>'


@pytest.mark.parametrize(
    "text",
    [
        f"{HARMONY} <|constrain|>json<|message|>{BODY}",
        f"{HARMONY}<|constrain|>json<|message|>{BODY}",
        f"{HARMONY} json<|message|>{BODY}",
        f"{HARMONY} code<|message|>{BODY}",
        f"{HARMONY}<|message|>{BODY}",
        f" to=functions.get_salary<|channel|>commentary <|constrain|>json<|message|>{BODY}",
        f" to=functions.get_salary<|channel|>commentary json<|message|>{BODY}",
        f"<|channel|>analysis to=functions.get_salary <|constrain|>json<|message|>{BODY}",
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{HARMONY} <|constrain|>json<|message|>{BODY}",
    ],
)
def test_every_form_of_a_harmony_call_is_parsed(text):
    fam = family("gptoss")
    turn = assert_reads(fam, fam.encode(text), fam.render([USER], True), [("get_salary", {"person": "Ada"})])
    assert turn.message.get("thinking") == ("Hm." if "Hm." in text else None)


def test_harmony_preambles_and_answers_are_content():
    fam = family("gptoss")
    prompt = fam.render([USER], True)
    message = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    call = ("get_salary", {"person": "Ada"})
    assert_reads(fam, fam.encode(f"{message}{HARMONY} json<|message|>{BODY}"), prompt, [call], "I look.")
    answer = fam.encode(f"{message}<|channel|>final <|constrain|>json<|message|>[1]<|return|>")
    assert_reads(fam, answer, prompt, [], "I look.\n[1]")
    assert_reads(fam, fam.encode("No channel.<|return|>"), prompt, [], "No channel.")


HANDS_OVER = [name for name in ALL if re.match("gptoss|glm|diffusion_gemma|gemma4(_v[345])?$", name)]


@pytest.mark.parametrize("name", HANDS_OVER)
def test_call_stop_token_without_a_call_is_malformed(name):
    """A stop token that the template writes after calls alone, such as `<|call|>`."""
    fam = family(name)
    prompt = fam.render([USER], True)
    header = "<|channel|>final<|message|>" if name == "gptoss" else ""
    turn = fam.chat.parse(fam.encode(f"{header}Let me see{fam.end_of_turn}"), prompt, TOOLS, 2)
    (call,) = turn.calls
    assert (call.id, call.name) == ("call_2_0", "") and f"ends with {fam.end_of_turn}" in call.error
    assert "Let me see" in turn.message["content"] and "tool_calls" not in turn.message
    assert fam.chat.parse(fam.encode(f"{header}Let me see{fam.end_of_text}"), prompt, TOOLS, 2).calls == []


@pytest.mark.parametrize("name", [name for name in ALL if name not in HANDS_OVER])
def test_other_stop_tokens_end_plain_turns(name):
    fam = family(name)
    for stop in fam.tokenizer.stop_texts:
        assert fam.chat.parse(fam.encode(f"Let me see{stop}"), fam.render([USER], True), TOOLS, 2).calls == []


QWEN, LLAMA = '<tool_call>\n{"name": "note", %s}\n</tool_call>', '{"name": "note", %s}'
XML = "<tool_call>\n<function=note>\n%s</function>\n</tool_call>"
TEXT, GLM_TEXT = "<parameter=text>\nx\n</parameter>\n", "<arg_key>text</arg_key>\n<arg_value>x</arg_value>\n"
INVOKE = '<atem:function_calls>\n<atem:invoke name="note">\n%s</atem:invoke>\n</atem:function_calls>'
MISWRITTEN = [
    # arguments under another key, or under none
    ("qwen3", QWEN % '"parameters": {"text": "x"}', "note"),
    ("qwen3", QWEN % '"args": {"text": "x"}', "note"),
    ("qwen3", QWEN % '"text": "x"', "note"),
    ("qwen3", QWEN % '"arguments": null, "parameters": {"text": "x"}', "note"),
    ("qwen3", QWEN % '"arguments": {}, "parameters": {"text": "x"}', "note"),
    ("llama3_1", LLAMA % '"arguments": {"text": "x"}', ""),
    ("llama3_1", '{"name": "note", "parameters": {"text": }}', ""),
    # arguments in another notation than the template's
    ("qwen3_5_think", XML % '{"text": "x"}\n', ""),
    ("qwen3_5_think", '<tool_call>\n{"name": "note", "arguments": {"text": "x"}}\n</tool_call>', ""),
    ("qwen3_8", XML % ("and " + TEXT), ""),
    ("nemotron_3_nano", XML % (TEXT + "and"), ""),
    ("glm4moe", '<tool_call>note\n{"text": "x"}\n</tool_call>', ""),
    ("glm4moe", '<tool_call>{"name": "note", "arguments": {"text": "x"}}</tool_call>', ""),
    ("glm4moe", f"<tool_call>note\n{GLM_TEXT}and</tool_call>", ""),
    ("muse_glimmer", " to=note<|message|>" + INVOKE % '{"text": "x"}', ""),
    ("muse_glimmer", ' to=note<|message|>{"text": "x"}', ""),
    ("muse_glimmer", " to=note<|message|><atem:function_calls>\n</atem:function_calls>", ""),
    ("gemma4", '<|tool_call>note(text="x")<tool_call|>', ""),
    ("gemma4", "<|tool_call>call:note{text:x}<tool_call|>", ""),
    ("deepseekv3", '<｜tool▁call▁begin｜>function<｜tool▁sep｜>note\n{"text": "x"}<｜tool▁call▁end｜>', ""),
    ("lfm2_v2", '<|tool_call_start|>[note("x")]<|tool_call_end|>', ""),
    ("lfm2_v2", "<|tool_call_start|>[note(text='it's')]<|tool_call_end|>", ""),
    ("lfm2_v2", '<|tool_call_start|>{"name": "note", "arguments": {"text": "x"}}<|tool_call_end|>', ""),
    ("lfm2_v2", "<|tool_call_start|>[]<|tool_call_end|>", ""),
    ("lfm2_2_5", "<|tool_call_start|>[note(text='x)]<|tool_call_end|>", ""),
    ("lfm2_2_5", "<|tool_call_start|>[note('x')]<|tool_call_end|>", ""),
    # arguments that are written twice, not closed, or never ended
    ("qwen3_5_think", XML % (TEXT + TEXT), ""),
    ("glm4moe", f"<tool_call>note\n{GLM_TEXT}{GLM_TEXT}</tool_call>", ""),
    ("gemma4", '<|tool_call>call:note{text:<|"|>x<|"|>,text:<|"|>y<|"|>}<tool_call|>', ""),
    ("qwen3_5_think", XML % "<parameter=text>\nx\n", ""),
    ("qwen3_5_think", f"<tool_call>\n<function=note>\n{TEXT}", ""),
    ("glm4moe", f"<tool_call>note\n{GLM_TEXT}", ""),
    ("gemma4", '<|tool_call>call:note{text:<|"|>x}<tool_call|>', ""),
]


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize(("name", "text", "called"), MISWRITTEN)
def test_call_in_another_form_is_malformed(name, text, called, followed):
    """It is neither run with the tool's defaults nor taken for text, and the call after it is parsed."""
    fam = family(name)
    good, prompt = fam.turn([("note", {"text": "good"})])
    start = re.match(r"\s*(<think>)?\s*(</think>)?\s*", fam.decode(good)).group()
    followed = followed and name not in ONE_CALL and text.rstrip().endswith(("_call>", "call|>", "_end|>"))
    after = fam.decode(good)[len(start) :] if followed else fam.end_of_turn
    turn = fam.chat.parse(fam.encode(start + text + after), prompt, [NOTE], 0)
    assert len(turn.calls) == 1 + followed and turn.calls[0].error and turn.calls[0].name == called
    assert len(turn.calls[0].error) < 1000
    if followed:
        assert (turn.calls[1].arguments, turn.calls[1].error) == ({"text": "good"}, None)


def test_error_names_a_key_other_than_arguments():
    fam = family("qwen3")
    text = QWEN % '"parameters": {"text": "x"}'
    (call,) = fam.chat.parse(fam.encode(text + "<|im_end|>"), fam.render([USER], True), [NOTE], 0).calls
    assert call.error == "`note` needs \"arguments\", got ['parameters']"


def typing_tool(schema):
    parameters = {"type": "object", "properties": {"value": schema}, "$defs": {"Count": {"type": "integer"}}}
    return {"type": "function", "function": {"name": "note", "description": "x", "parameters": parameters}}


STRINGS = [
    ({"type": ["integer", "string"]}, "00123"),
    ({"type": "string", "nullable": True}, "Null"),
    ({"anyOf": [{"type": "string"}, {"type": "number"}]}, "1e3"),
    ({"type": ["string", "boolean"]}, "1"),
    ({"type": "string"}, "7"),
    ({"type": "string"}, "null"),
    ({"oneOf": [{"enum": ["1", "2"]}, {"type": "integer"}]}, "1"),
    ({"allOf": [{"type": "string"}]}, "7"),
    ({}, "7"),
]


@pytest.mark.parametrize(("schema", "value"), STRINGS)
@pytest.mark.parametrize("name", ALL)
def test_text_stays_text_if_the_schema_allows_text(name, schema, value):
    fam = family(name)
    ids, prompt = fam.turn([("note", {"value": value})])
    (call,) = fam.chat.parse(ids, prompt, [typing_tool(schema)], 0).calls
    assert (call.arguments, call.error) == ({"value": value}, None)


@pytest.mark.parametrize("schema", [{"type": ["integer", "null", "boolean"]}, {"type": "string", "nullable": True}])
@pytest.mark.parametrize("value", ["7", "null", "None", "true", "[1]"])
@pytest.mark.parametrize("name", [name for name in ALL if not any(re.match(xml, name) for xml in [*AMBIGUOUS][:3])])
def test_text_stays_text_in_typed_notations(name, value, schema):
    fam = family(name)
    ids, prompt = fam.turn([("note", {"value": value})])
    assert fam.chat.parse(ids, prompt, [typing_tool(schema)], 0).calls[0].arguments == {"value": value}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": ["integer", "string"]}, 123),
        ({"type": ["string", "null"]}, None),
        ({"type": "string", "nullable": True}, None),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, 2.5),
        ({"type": ["boolean", "integer"]}, 1),
        ({"type": ["integer", "boolean"]}, True),
        ({"type": ["integer", "number"]}, 2.0),
        ({"enum": [1, 2, "auto"]}, 2),
        ({"const": 5}, 5),
        ({"$ref": "#/$defs/Count"}, 5),
        ({"allOf": [{"$ref": "#/$defs/Count"}]}, 5),
        ({"anyOf": [{"type": "array"}, {"type": "string"}]}, [1, "a"]),
        ({"type": ["null", "object"]}, {"a": None}),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_untyped_values_get_the_type_of_the_schema(name, schema, value):
    fam = family(name)
    ids, prompt = fam.turn([("note", {"value": value})])
    (call,) = fam.chat.parse(ids, prompt, [typing_tool(schema)], 0).calls
    assert (call.arguments, call.error) == ({"value": value}, None)
    assert type(call.arguments["value"]) is type(value)


@pytest.mark.parametrize("written", ["\nx\n", "x", "\n x \n", "\n\nx\n\n"])
def test_one_newline_at_each_end_of_an_xml_argument_is_markup(written):
    fam = family("qwen3_5_think")
    text = f"</think>{XML % f'<parameter=text>{written}</parameter>'}<|im_end|>"
    (call,) = fam.chat.parse(fam.encode(text), fam.render([USER], True), [NOTE], 0).calls
    assert call.arguments == {"text": written.removeprefix("\n").removesuffix("\n")}


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("lfm")])
def test_text_that_looks_like_a_call_is_no_call_in_lfm2(name):
    fam = family(name)
    assert_reads(fam, fam.encode("Well, f(x) is 3<|im_end|>"), fam.render([USER], True), [], "Well, f(x) is 3")


def test_escaped_lone_surrogate_is_replaced_everywhere():
    fam = family("qwen3")
    call = r'{"name": "a\ud800", "arguments": {"b\udc00": ["c\ud83d", {"d": "\ud83d\ude00\ud83d"}], "e": 1.5}}'
    ids = fam.encode(f"<tool_call>\n{call}\n</tool_call><|im_end|>")
    arguments = {"b\ufffd": ["c\ufffd", {"d": "\U0001f600\ufffd"}], "e": 1.5}
    assert_reads(fam, ids, fam.render([USER], True), [("a\ufffd", arguments)])


def test_arguments_nested_too_deep_to_be_copied_are_malformed():
    call = _read_call({"name": "add", "arguments": {"a": nested(100_000)}}, "call_0_0")
    assert (call.name, call.arguments, call.error) == ("add", {}, '"arguments" of `add` are nested too deep')
    assert _read_call({"name": "add", "arguments": {"a": nested(50)}}, "call_0_0").error is None


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_call_without_type_or_arguments_is_a_call():
    fam = family("qwen3")
    ids = fam.encode('<tool_call>\n{"name": "get_salary"}\n</tool_call><|im_end|>')
    assert_reads(fam, ids, fam.render([USER], True), [("get_salary", {})])


def test_arguments_written_as_text_are_typed_by_the_schema_in_place():
    fam = family("qwen3_5_nothink")
    call = (
        "<tool_call>\n<function=get_salary>\n<parameter=person>\n7\n</parameter>\n<parameter=year>\n7\n</parameter>\n"
    )
    ids = fam.encode(call + "</function>\n</tool_call><|im_end|>")
    assert_reads(fam, ids, fam.render([USER], True), [("get_salary", {"person": "7", "year": 7})])


@pytest.mark.parametrize("name", ALL)
def test_thoughts_are_not_content(name):
    """If the response template has a field for thoughts, they are separated from content and calls."""
    fam = family(name)
    fields = fam.tokenizer.response_template["fields"]
    field = next((field for field in ("reasoning_content", "thinking") if field in fields), None)
    openings = {
        "gptoss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        "muse_glimmer": (" to=self<|message|>", "<|eom|><|start|>assistant"),
        **dict.fromkeys([*GEMMA4, "gemma4_v2"], ("<|channel>thought\n", "<channel|>")),
    }
    assert (field is None) == name.startswith("llama")
    if field is None:
        return
    prompt = fam.render([USER], True)
    opening, closing = openings.get(name, ("<think>", "</think>"))
    if prompt.rstrip().endswith("<think>"):
        opening = ""
    if name == "qwen3_5_nothink":
        prompt = prompt.removesuffix("<think>\n\n</think>\n\n")
    calls, _ = calls_of(name, 1)
    call = fam.decode(fam.turn(calls)[0])
    call = re.sub(r"^\s*(<think>)?\s*</think>\s*", "", call)
    turn = fam.chat.parse(fam.encode(f"{opening}hmm, let me see{closing}{call}"), prompt, TOOLS, 0)
    assert turn.message[field].strip() == "hmm, let me see" and turn.message["content"] == ""
    assert [(c.name, c.arguments) for c in turn.calls] == calls


@pytest.mark.parametrize("name", ALL)
def test_long_turn_is_parsed_fast(name):
    fam = family(name)
    prompt = fam.render([USER], True)
    started = time.process_time()
    fam.chat.parse(fam.encode("the sum is " * 2000), prompt, TOOLS, 0)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("nemotron")])
def test_thought_closed_by_the_prompt_is_not_reopened(name):
    fam = family(name)
    prompt = fam.tokenizer.apply_chat_template(
        [USER], tokenize=False, add_generation_prompt=True, enable_thinking=False, chat_template=fam.template
    )
    assert prompt.endswith("<think></think>")
    ids, _ = fam.turn([("note", {"text": "a</think>b"})])
    ids = fam.encode(fam.decode(ids).removeprefix("</think>"))
    turn = assert_reads(fam, ids, prompt, [("note", {"text": "a</think>b"})])
    assert "reasoning_content" not in turn.message


@pytest.mark.parametrize("name", ALL)
def test_repeatedly_opened_call_is_parsed_fast(name):
    """A policy that repeats itself to the end of its budget."""
    fam = family(name)
    ids, prompt = fam.turn([("note", {"text": "x"})])
    call = re.sub(r"^\s*(<think>)?\s*</think>\s*", "", fam.decode(ids))
    for part in (call[: call.rindex("x") + 1], call.removesuffix(fam.end_of_turn)):
        text = part * (60_000 // len(part))
        ids = fam.encode(text)
        started = time.process_time()
        fam.chat.parse(ids, prompt, [NOTE], 0)
        assert time.process_time() - started < 4


# Through the trainer


def test_call_stop_token_without_a_call_is_answered_and_counted(monkeypatch, tmp_path):
    def get_salary(person: str) -> str:
        """
        Looks up a salary.

        Args:
            person: Whose.
        """
        return f"{person}: 10"

    turns = [
        "<|channel|>analysis<|message|>I look it up.<|call|>",
        f"<|channel|>commentary<|message|>Again.<|end|><|start|>assistant{HARMONY} <|constrain|>json<|message|>{BODY}",
        "<|channel|>final<|message|>10<|return|>",
    ]
    found = run_script(
        ToolGRPOTrainer,
        monkeypatch,
        tmp_path,
        [turns],
        tools=[get_salary],
        template="gptoss",
        eos=["<|return|>", "<|call|>"],
        max_completion_length=2000,
    )
    for trajectory, messages in zip(found.trajectories, found.completions, strict=True):
        assert trajectory.stop_reason == "stop" and [len(turn.tool_calls) for turn in trajectory.turns] == [1, 1, 0]
        assert [message["role"] for message in messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
        assert "could not be read" in messages[1]["content"] and "ends with <|call|>" in messages[1]["content"]
        assert messages[2]["content"] == "Again." and messages[3]["content"] == "Ada: 10"
        assert messages[4]["content"] == "10"
    assert found.metric("tools/malformed_calls") > 0


@pytest.mark.parametrize("name", ["qwen3_training", "glm4moe_training", "qwen3", "gptoss", "qwen3_5_think"])
@pytest.mark.parametrize("comment", ["", "{# ours #}", "{#- ours -#}\n"])
def test_trainer_recognizes_a_chat_template_by_its_rendering(tmp_path, name, comment):
    tokenizer = chat_tokenizer(name)
    tokenizer.chat_template = own = tokenizer.chat_template + comment
    model = tiny_model(tokenizer)
    trainer = ToolGRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        config(tmp_path),
        prompts(),
        processing_class=tokenizer,
        tools=[add],
    )
    known = family(name.removesuffix("_training"))
    assert tokenizer.response_template == known.tokenizer.response_template and tokenizer.chat_template == own
    assert trainer.chat_template == (None if name.endswith("_training") else known.template)


def test_chat_template_with_another_rendering_is_not_recognized():
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace('"arguments": ', '"input": ')
    add_missing_response_template(tokenizer)
    assert tokenizer.response_template is None
    tokenizer.chat_template = chat_tokenizer("qwen3").chat_template.replace("# Tools", "# What you can call")
    add_missing_response_template(tokenizer)
    assert tokenizer.response_template == family("qwen3").tokenizer.response_template


def test_given_response_template_is_kept():
    tokenizer = chat_tokenizer("gptoss")
    tokenizer.response_template = own = {"start_anchor": "x", "fields": {"content": {"close": "y", "content": "text"}}}
    add_missing_response_template(tokenizer)
    assert tokenizer.response_template is own
    assert ToolChat(tokenizer, [tokenizer.eos_token_id]).response_template is own

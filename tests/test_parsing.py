"""Assistant turns are read back as they were written, over every tool-capable template TRL ships."""

import re
import time

import pytest
from families import ALL, CALLS, GEMMA4, HEADLESS, TOOLS, USER, calls_of, family, tool_messages
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import parse_response

from trl_toolgrpo.rollout.parsing import _read_call


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


@settings(max_examples=30, deadline=None)
@given(
    arguments=st.dictionaries(
        st.sampled_from(["person", "note"]),
        st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=12),
        max_size=2,
    )
)
@pytest.mark.parametrize("name", ["qwen3", "gptoss", "deepseekv3"])
def test_any_text_survives_a_call_written_as_json(name, arguments):
    fam = family(name)
    ids, prompt = fam.turn([("get_salary", arguments)])
    assert_reads(fam, ids, prompt, [("get_salary", arguments)])


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


def test_half_an_emoji_written_as_an_escape_is_replaced_wherever_it_stands():
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
def test_thoughts_are_no_content(name):
    """Where the response template has a field for thoughts, they come apart from content and calls."""
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
def test_long_turn_is_read_in_time(name):
    fam = family(name)
    prompt = fam.render([USER], True)
    started = time.process_time()
    fam.chat.parse(fam.encode("the sum is " * 2000), prompt, TOOLS, 0)
    assert time.process_time() - started < 2

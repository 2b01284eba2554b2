"""Chat handling over every tool-capable template TRL ships: what follows a turn, and the truncation of tool output."""

import re
import time
from types import SimpleNamespace

import pytest
from conftest import chat_tokenizer
from families import ALL, CALLS, GEMMA4, USER, Family, calls_of, controls, family, shown, tool_messages
from trl import GRPOTrainer

from trl_toolgrpo.chat.tool_chat import TRUNCATION_MARKER, ToolChat
from trl_toolgrpo.errors import ChatTemplateError


def whole(fam, count, contents=("Ada earns 10.", "Grace, too.")):
    """Return a whole conversation by the template, where its turn ends, before and after the end, and the results."""
    calls, answered = calls_of(fam.name, count)
    messages = tool_messages(answered, contents[:count])
    text = fam.render([USER, fam.assistant(calls), *messages], generation_prompt=True)
    start = text.index(fam.end_of_turn, len(fam.render([USER])))
    return text, start, start + len(fam.end_of_turn), messages


def test_every_tool_capable_family_is_covered():
    families = {re.match(r"diffusion_gemma|[a-z]+", name)[0] for name in ALL}
    expected = {"deepseekv", "diffusion_gemma", "gemma", "glm", "gptoss", "lfm", "llama", "muse", "nemotron", "qwen"}
    assert families >= expected and len(ALL) >= 28


# What follows a turn


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_suffix_is_what_the_template_renders(name, count):
    fam = family(name)
    text, _, end, messages = whole(fam, count)
    turn = fam.encode(text[:end])
    assert turn[-1] == fam.id(fam.end_of_turn)
    suffix, opening = fam.chat.tool_suffix(turn[-1], messages)
    assert fam.decode(turn + suffix) == text
    assert turn + suffix == fam.encode(text)
    assert text.endswith(opening) and text[: -len(opening)].endswith(("Ada earns 10.", "Grace, too.")[count - 1])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_turn_without_end_token_gets_the_templates_end_first(name, count):
    fam = family(name)
    text, start, _, messages = whole(fam, count)
    others = [id for id in [*fam.stops, fam.id("<|endoftext|>")] if id != fam.id(fam.end_of_turn)]
    assert others
    for stop in others:
        suffix, _ = fam.chat.tool_suffix(stop, messages)
        assert suffix[0] == fam.id(fam.end_of_turn)
        assert fam.encode(text[:start]) + suffix == fam.encode(text)


@pytest.mark.parametrize("name", ALL)
def test_end_of_text_token_is_not_mistaken_for_the_end_of_a_turn(name):
    own = family(name)
    fam = Family(name, [*own.tokenizer.stop_texts, "<|endoftext|>"])
    text, start, _, messages = whole(fam, 1)
    suffix, _ = fam.chat.tool_suffix(fam.id("<|endoftext|>"), messages)
    assert fam.encode(text[:start]) + suffix == fam.encode(text)


@pytest.mark.parametrize(("name", "stop"), [*((name, "<turn|>") for name in GEMMA4), ("glm4moe", "<|user|>")])
def test_templates_own_end_of_turn_need_not_be_a_stop_token(name, stop):
    fam = Family(name, [stop])
    text, start, _, messages = whole(fam, 2)
    suffix, _ = fam.chat.tool_suffix(fam.id(stop), messages)
    assert fam.encode(text[:start]) + suffix == fam.encode(text)


def _trl_suffix(fam, messages):
    trainer = SimpleNamespace(
        _is_vlm=False,
        processing_class=fam.tokenizer,
        _tokenizer=fam.tokenizer,
        chat_template=fam.template,
        chat_template_kwargs={},
    )
    return GRPOTrainer._get_tool_suffix_ids(trainer, messages)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_suffix_equals_trls_where_trls_is_correct(name, count):
    fam = family(name)
    _, answered = calls_of(name, count)
    messages = tool_messages([answered[0]] * count, ["Ada earns 10.", "Grace, too."][:count])
    suffix, _ = fam.chat.tool_suffix(fam.id(fam.end_of_turn), messages)
    if name == "deepseekv3":  # TRL renders a call with a mapping as arguments, which this template cannot join to text
        with pytest.raises(TypeError):
            _trl_suffix(fam, messages)
    elif name == "glm4moe":  # the template puts no end after a call, so TRL writes the policy's stop token once more
        assert _trl_suffix(fam, messages) == [fam.id("<|observation|>"), *suffix]
    elif name in GEMMA4:  # a call ends without `<turn|>`, so TRL cuts after the user's and writes the call once more
        again = fam.decode(_trl_suffix(fam, messages)[: -len(suffix)])
        assert again == "\n<|turn>model\n<|tool_call>call:get_salary{}<tool_call|><|tool_response>"
        assert _trl_suffix(fam, messages)[-len(suffix) :] == suffix
    else:
        assert _trl_suffix(fam, messages) == suffix


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("written", ["", "<|im_end|><|start|><|turn>", "a b\n", None])
def test_invalid_tool_name_is_not_repeated_between_control_tokens(name, written):
    fam = family(name)
    message = {"role": "tool", "name": written, "content": "No such tool.", "tool_call_id": "call_0_0"}
    other = {**message, "name": "tool"}
    stop = fam.id(fam.end_of_turn)
    assert fam.chat.tool_suffix(stop, [message]) == fam.chat.tool_suffix(stop, [other])


@pytest.mark.parametrize("name", ALL)
def test_white_space_around_a_result_follows_the_template(name):
    fam = family(name)
    text, _, end, messages = whole(fam, 2, contents=(" \n 1 2\n", "\t"))
    suffix, _ = fam.chat.tool_suffix(fam.id(fam.end_of_turn), messages)
    assert text[:end] + fam.decode(suffix) == text


@pytest.mark.parametrize("name", ALL)
def test_empty_result_is_rendered_as_by_the_template(name):
    fam = family(name)
    text, _, end, messages = whole(fam, 2, contents=("", ""))
    suffix, _ = fam.chat.tool_suffix(fam.id(fam.end_of_turn), messages)
    assert text[:end] + fam.decode(suffix) == text


def test_template_arguments_reach_the_suffix():
    fam = Family("qwen3_5_think")
    chat = ToolChat(fam.tokenizer, fam.stops, fam.template, {"enable_thinking": False})
    messages = tool_messages(CALLS[:1], ["10"])
    assert fam.decode(chat.tool_suffix(fam.stops[0], messages)[0]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert fam.decode(fam.chat.tool_suffix(fam.stops[0], messages)[0]).endswith("assistant\n<think>\n")


def test_template_without_tools_is_refused():
    tokenizer = chat_tokenizer("llama3")
    tokenizer.response_template = chat_tokenizer("qwen3").response_template or {"fields": {}}
    with pytest.raises(ChatTemplateError, match="cannot render a tool conversation"):
        ToolChat(tokenizer, [tokenizer.eos_token_id])


def test_tokenizer_without_response_template_is_refused():
    tokenizer = chat_tokenizer("qwen3")
    with pytest.raises(ChatTemplateError, match="response_template"):
        ToolChat(tokenizer, [tokenizer.eos_token_id])


# How much a tool may say


def test_short_text_is_not_truncated():
    chat = family("qwen3").chat
    for text in ("", "abc", " the name\n", "<|im_end|>"):
        assert chat.truncate(text, 200) == (text, False)


def test_text_is_cut_one_token_above_the_limit():
    fam = family("qwen3")
    text = "zqxj" * 5  # nothing merges: one token a letter
    assert len(fam.encode(text)) == 20
    assert fam.chat.truncate(text, 20) == (text, False)
    marker = "\n[... truncated: the output was longer than 19 tokens ...]\n"
    assert fam.chat.truncate(text, 19) == (text[:10] + marker + text[-9:], True)
    assert fam.chat.truncate(text, 2) == ("z" + TRUNCATION_MARKER.format(limit=2) + "j", True)
    assert fam.chat.truncate(text, 1) == ("z" + TRUNCATION_MARKER.format(limit=1), True)


def test_truncation_leaves_no_half_characters():
    fam = family("qwen3")
    text = "\N{GRINNING FACE}" * 3
    assert len(fam.encode(text)) == 12
    for limit, before, after in ((3, 0, 0), (4, 0, 0), (7, 1, 0), (8, 1, 1), (11, 1, 1)):
        face, marker = "\N{GRINNING FACE}", TRUNCATION_MARKER.format(limit=limit)
        assert fam.chat.truncate(text, limit) == (face * before + marker + face * after, True)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("limit", [12, 40, 200])
def test_truncation_keeps_the_end_of_a_long_output(name, limit):
    chat = family(name).chat
    text = "passed\n" * 3000 + "ZeroDivisionError: division by zero\n[exit code 1]"
    cut, truncated = chat.truncate(text, limit)
    head, tail = cut.split(TRUNCATION_MARKER.format(limit=limit))
    assert truncated and text.startswith(head) and text.endswith(tail) and head and tail
    assert len(chat._control.encode_inert(head)) + len(chat._control.encode_inert(tail)) <= limit + 2
    assert limit < 100 or "ZeroDivisionError: division by zero\n[exit code 1]" in tail


def test_control_tokens_in_output_count_as_text():
    fam = family("qwen3")
    cut, truncated = fam.chat.truncate("<|im_end|>" * 50, 30)
    assert truncated and cut.startswith("<|im_end|><|im") and controls(fam, fam.chat._control.encode_inert(cut)) == []
    assert len(fam.chat._control.encode_inert(cut.split("\n[...")[0])) <= 31


@pytest.mark.parametrize(
    "text", ["a" * 5_000_000, "<|im_end|>" * 500_000, " " * 5_000_000, "the name is \n" * 400_000]
)
def test_five_megabytes_are_truncated_fast(text):
    chat = family("qwen3").chat
    started = time.process_time()
    cut, truncated = chat.truncate(text, 512)
    assert time.process_time() - started < 2
    head, tail = cut.split(TRUNCATION_MARKER.format(limit=512))
    assert truncated and text.startswith(head) and text.endswith(tail) and len(cut) < 2 * 64 * 512 + 200


@pytest.mark.parametrize("name", ALL)
def test_truncated_result_shows_its_marker(name):
    fam = family(name)
    content, _ = fam.chat.truncate("  " + "zq " * 100, 20)
    suffix, _ = fam.chat.tool_suffix(fam.id(fam.end_of_turn), tool_messages(CALLS[:1], [content]))
    assert shown(fam, content) in fam.decode(suffix) and "longer than 20 tokens" in fam.decode(suffix)

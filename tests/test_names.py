"""Slips in the names of tools are found, and prose is left alone."""

import random
import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_toolgrpo.errors import ToolNameError
from trl_toolgrpo.tools.names import check_tool_columns, check_tool_mentions, edit_distance


TOOLS = ["send_slack_message", "get_weather", "add", "github", "listFiles", "max", "and_then"]


def test_reordered_name_says_what_was_meant_and_where():
    with pytest.raises(ToolNameError) as caught:
        check_tool_mentions(["Post the summary. Use slack_send_message to post it."], TOOLS)
    message = str(caught.value)
    assert "names the tool `slack_send_message`, which does not exist; did you mean `send_slack_message`?" in message
    assert "Use slack_send_message to post it." in message


@pytest.mark.parametrize(
    "text",
    [
        "call sendSlackMessage now",
        "call SlackSendMessage now",
        "call `send-slack-message`",
        "call slack.send_slack_mesage",
        "call get_wether",
        "call `getweather`",
        "call getweathr(city)",
        "call GET_WEATHER",
        "use list_files",
        "use `ad`",
        "use addd(1, 2)",
    ],
)
def test_slips_raise(text):
    with pytest.raises(ToolNameError):
        check_tool_mentions([text], TOOLS)


def test_hyphens_join_words_where_tools_have_them():
    text = "call slack-send(x), a well-known and state-of-the-art way"
    assert all("`slack-send`" not in warning for warning in check_tool_mentions([text], ["send_slack"]))
    with pytest.raises(ToolNameError, match="`slack-send`"):
        check_tool_mentions([text], ["send-slack"])


@pytest.mark.parametrize(
    "text",
    [
        "Please add the numbers, and then ad more.",
        "Weather and Slack: send the message, get weather.",
        "Search GitHub for it.",
        "Add(s) and max(es)",
        "Use send_slack_message, `get_weather`, add(1, 2) and listFiles().",
        "Use client.send_slack_message(text) or `client.get_weather`.",
        "*_add_* and __send_slack_message__ in bold",
        "See https://example.com/slack_send_message?get_wether=1",
        "f(x) = g(x) + `a`",
        "Ends with send_slack_message.Then go on.",
        "well-known state-of-the-art",
        "",
    ],
)
def test_prose_and_right_names_do_not_fire(text):
    assert check_tool_mentions([text], TOOLS) == []


def test_known_identifiers_are_not_tools():
    with pytest.raises(ToolNameError):
        check_tool_mentions(["the `get_weathers` column"], TOOLS)
    assert check_tool_mentions(["the `get_weathers` column"], TOOLS, known_identifiers=["get_weathers"]) == []


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("use weather_report", "get_weather"),
        ("use send_message", "send_slack_message"),
        ("use `sin`", "sum"),
        ("any(x) is Python", "and"),
        ("the `weather`", "get_weather"),
    ],
)
def test_uncertain_cases_warn_once(text, tool):
    warnings = check_tool_mentions([text, text, f"again: {text}"], [tool])
    assert len(warnings) == 1
    assert f"did you mean `{tool}`?" in warnings[0]


def test_trivial_words_do_not_warn():
    assert check_tool_mentions(["use get_time and the_user"], ["get_weather", "set_user_id"]) == []


def test_columns():
    check_tool_columns(["add", "max"], TOOLS)
    with pytest.raises(ToolNameError, match="`weather`, which does not exist; did you mean `get_weather`"):
        check_tool_columns(["add", "weather"], TOOLS)
    with pytest.raises(ToolNameError, match="did you mean `send_slack_message`"):
        check_tool_columns(["message_slack_send"], TOOLS)
    with pytest.raises(ToolNameError, match="The tools are: `add`"):
        check_tool_columns(["zzzz"], ["add"])


@cache
def reference_distance(first, second):
    if not first or not second:
        return len(first) + len(second)
    return min(
        reference_distance(first[1:], second) + 1,
        reference_distance(first, second[1:]) + 1,
        reference_distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.integers(0, 4))
def test_edit_distance_is_levenshtein_up_to_the_limit(first, second, limit):
    assert edit_distance(first, second, limit) == min(reference_distance(first, second), limit + 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.permutations(["send", "slack", "message"]), st.sampled_from(["_", "camel"]))
def test_every_order_and_spelling_is_caught(words, joint):
    name = "_".join(words) if joint == "_" else words[0] + "".join(word.title() for word in words[1:])
    if name == "send_slack_message":
        assert check_tool_mentions([name], TOOLS) == []
    else:
        with pytest.raises(ToolNameError, match="did you mean `send_slack_message`"):
            check_tool_mentions([f"Use {name}."], TOOLS)


def test_thousands_of_prompts_are_quick():
    rng = random.Random(0)
    letters = "bcdfgjklm"
    words = ["".join(rng.choices(letters, k=5)) for _ in range(500)]
    prompts = [
        " ".join(rng.choices(words, k=150)) + f" use get_weather and {rng.choice(words)}_{rng.choice(words)}"
        for _ in range(1000)
    ]
    tools = [f"tool_{'aeiou'[i % 5] * 6}_{i}" for i in range(100)] + TOOLS
    start = time.thread_time()
    assert check_tool_mentions(prompts, tools) == []
    assert time.thread_time() - start < 1.0

"""Rollout records are strict: every broken field is named, and nothing is filled in."""

import math
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_toolgrpo import ToolCall, ToolResult, Trajectory, TrajectoryError, Turn
from trl_toolgrpo.rollout.trajectory import STOP_REASONS, locate


def record(**changes):
    """Return a record of two turns with a tool result of two tokens between them."""
    base = {
        "prompt_ids": [1, 2, 3],
        "completion_ids": [4, 5, 6, 7, 8],
        "logprobs": [-0.1, -0.2, 0.0, 0.0, -0.5],
        "tool_mask": [1, 1, 0, 0, 1],
        "forced_mask": [1, 0, 0, 0, 0],
        "turns": [
            {
                "start": 0,
                "end": 2,
                "tool_calls": [{"id": "call_0_0", "name": "add", "arguments": {"a": 1}}],
                "tool_results": [{"content": "3"}],
                "sample_seconds": 0.5,
                "tool_seconds": 0.25,
            },
            {"start": 4, "end": 5},
        ],
        "stop_reason": "stop",
    }
    return {**base, **changes}


def turn(**changes):
    return [{**record()["turns"][0], **changes}, record()["turns"][1]]


def message_of(broken, rollout=7):
    with pytest.raises(TrajectoryError) as caught:
        Trajectory.from_dict(broken, rollout)
    return str(caught.value)


def test_record_is_read_unchanged():
    trajectory = Trajectory.from_dict(record())
    assert [getattr(trajectory, f.name) for f in fields(Trajectory)][:5] == list(record().values())[:5]
    call, result = ToolCall("call_0_0", "add", {"a": 1}), ToolResult("3")
    assert trajectory.turns == [Turn(0, 2, "stop", [call], [result], 0.5, 0.25), Turn(4, 5)]
    assert trajectory.stop_reason == "stop" and not trajectory.truncated
    assert trajectory.trainable_mask == [0, 1, 0, 0, 1]


def test_reading_does_not_modify_the_record():
    given_record = record()
    Trajectory.from_dict(given_record)
    assert given_record == record()


@pytest.mark.parametrize("name", [f.name for f in fields(Trajectory) if f.name != "values"])
def test_missing_field_is_named(name):
    broken = record()
    del broken[name]
    message = message_of(broken)
    assert message == f"Rollout 7: field `{name}` is missing; got {', '.join(broken)}."


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("old_log_probs", "logprobs"),
        ("old_logprobs", "logprobs"),
        ("old_per_token_logps", "logprobs"),
        ("sampling_per_token_logps", "logprobs"),
        ("log_probs", "logprobs"),
        ("logprob", "logprobs"),
        ("env_mask", "tool_mask"),
        ("tool_masks", "tool_mask"),
        ("response_ids", "completion_ids"),
        ("completions_ids", "completion_ids"),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_misnamed_field_is_unknown_even_where_the_right_one_is_there(wrong, meant, kept):
    broken = {wrong: record()[meant], **record()}
    if not kept:
        del broken[meant]
    expected = ", ".join(f.name for f in fields(Trajectory))
    assert message_of(broken) == (f"Rollout 7: unknown field `{wrong}`, expected {expected}. Did you mean `{meant}`?")


def test_values_are_optional_and_checked():
    count = len(record()["completion_ids"])
    assert Trajectory.from_dict(record()).values is None
    given = [0.5] * count
    assert Trajectory.from_dict(record(values=given)).values == given
    assert f"`values` has {count - 1} values, expected {count}" in message_of(record(values=given[1:]))
    message = message_of(record(values=[float("nan"), *given[1:]]))
    assert "`values` expected finite values, got nan at position 0" in message


def test_rewards_of_a_turn_add_up_and_are_finite():
    turn = Turn(0, 1, reward=0.5, tool_results=[ToolResult("a", reward=1.0), ToolResult("b")])
    assert turn.total_reward == 1.5 and Turn(0, 1).total_reward == 0.0
    broken = record()
    broken["turns"][0]["reward"] = float("inf")
    assert "a reward of `turns[0]` expected a finite number, got inf" in message_of(broken)


def test_unknown_field_without_a_likeness_gets_no_hint():
    assert message_of(record(zzz=1)).endswith(", turns, stop_reason, values.")
    assert "unknown field `3`" in message_of({3: 1, **record()})


@pytest.mark.parametrize("name", ["logprobs", "tool_mask", "forced_mask"])
@pytest.mark.parametrize("got", [0, 4, 6])
def test_short_or_long_field_says_expected_and_got(name, got):
    broken = record(**{name: [0] * got})
    assert message_of(broken) == (f"Rollout 7: field `{name}` has {got} values, expected 5, one per completion token.")


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e-9, 3, None, "-0.5", True, False, [0.0], 10**400, -(10**400)]
)
@pytest.mark.parametrize("position", [0, 2, 4])
def test_logprob_has_to_be_finite_and_at_most_zero(value, position):
    values = [-0.1, -0.2, 0.0, 0.0, -0.5]
    values[position] = value
    assert message_of(record(logprobs=values)) == (
        f"Rollout 7: field `logprobs` expected finite values of at most 0, got {value!r} at position {position}."
    )


def test_logprob_of_zero_and_very_low_ones_are_fine():
    values = [0.0, -0.0, 0, -1e30, -745]
    assert Trajectory.from_dict(record(logprobs=values)).logprobs == values


@pytest.mark.parametrize("name", ["prompt_ids", "completion_ids"])
@pytest.mark.parametrize("value", [-1, 1.0, "4", None, True, math.nan])
def test_tokens_are_ids(name, value):
    ids = [*record()[name][:-1], value]
    assert message_of(record(**{name: ids})) == (
        f"Rollout 7: field `{name}` expected token ids, got {value!r} at position {len(ids) - 1}."
    )


@pytest.mark.parametrize("name", ["tool_mask", "forced_mask"])
@pytest.mark.parametrize("value", [2, -1, 0.5, 1.0, True, None, "1", math.nan])
def test_masks_are_zeros_and_ones(name, value):
    mask = [1, value, 0, 0, 0]
    assert message_of(record(**{name: mask})) == (
        f"Rollout 7: field `{name}` expected 0 or 1, got {value!r} at position 1."
    )


def test_forced_token_is_an_assistants_token():
    message = message_of(record(forced_mask=[0, 0, 0, 1, 0]))
    assert message == "Rollout 7: field `forced_mask` marks token 3, which `tool_mask` says no assistant wrote."


@pytest.mark.parametrize("name", ["prompt_ids", "completion_ids", "logprobs", "tool_mask", "forced_mask", "turns"])
@pytest.mark.parametrize("value", [None, 3, "abc", {"a": 1}])
def test_wrong_type_of_a_field_is_named(name, value):
    assert message_of(record(**{name: value})) == (
        f"Rollout 7: field `{name}` expected a list, got {type(value).__name__}."
    )


@pytest.mark.parametrize("value", ["eos", "", None, 0, ["stop"]])
def test_stop_reason_is_a_known_one(value):
    assert message_of(record(stop_reason=value)) == (
        f"Rollout 7: field `stop_reason` expected one of {STOP_REASONS}, got {value!r}."
    )


@pytest.mark.parametrize("reason", STOP_REASONS)
def test_all_but_stop_count_as_truncated(reason):
    trajectory = Trajectory.from_dict(record(stop_reason=reason))
    assert trajectory.truncated == (reason != "stop")


@pytest.mark.parametrize("spans", [[(0, 6)], [(-1, 2)], [(2, 1)], [(0, 3), (2, 5)], [(3, 5), (0, 2)]])
def test_turns_are_ordered_spans_of_the_completion(spans):
    message = message_of(record(turns=[{"start": start, "end": end} for start, end in spans]))
    assert message.startswith("Rollout 7: field `turns` expected ordered spans within 5 completion tokens, got [")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"start": "0"}, "field `turns[0].start` expected an index, got '0'."),
        ({"start": 0.0}, "field `turns[0].start` expected an index, got 0.0."),
        ({"end": None}, "field `turns[0].end` expected an index, got None."),
        ({"stop_reason": "eos"}, "field `turns[0].stop_reason` expected one of ('stop', 'length'), got 'eos'."),
        ({"tool_calls": None}, "field `turns[0].tool_calls` expected a list, got NoneType."),
        ({"tool_calls": "add"}, "field `turns[0].tool_calls` expected a list, got str."),
        ({"tool_calls": ["add"]}, "field `turns[0].tool_calls` expected ToolCall records, got str."),
        ({"tool_results": [3]}, "field `turns[0].tool_results` expected ToolResult records, got int."),
        ({"sample_seconds": math.nan}, "field `turns[0].sample_seconds` expected seconds, got nan."),
        ({"tool_seconds": -1.0}, "field `turns[0].tool_seconds` expected seconds, got -1.0."),
        ({"tool_seconds": "1"}, "field `turns[0].tool_seconds` expected seconds, got '1'."),
    ],
)
def test_wrong_field_of_a_turn_is_named(changes, expected):
    assert message_of(record(turns=turn(**changes))) == f"Rollout 7: {expected}"


@pytest.mark.parametrize(
    ("turns", "path"),
    [
        ([{"end": 2}], "field `turns[].start` is missing; got end."),
        ([{"start": 0}], "field `turns[].end` is missing; got start."),
        (turn(stop="x"), "unknown field `turns[].stop`, expected start, end, stop_reason"),
        (turn(tool_calls=[{"id": "1"}]), "field `turns[].tool_calls[].name` is missing; got id."),
        (turn(tool_calls=[{"id": "1", "name": "a", "args": {}}]), "Did you mean"),
        (turn(tool_results=[{}]), "field `turns[].tool_results[].content` is missing"),
        ([3], "field `turns` expected Turn records, got int."),
    ],
)
def test_keys_of_turns_calls_and_results_are_strict_too(turns, path):
    assert path in message_of(record(turns=turns))


@pytest.mark.parametrize("value", [None, [1], "record", 3])
def test_record_has_to_be_a_dict(value):
    assert message_of(value) == f"Rollout 7: expected a dict of fields, got {type(value).__name__}."


def test_rollout_may_have_any_name_or_none():
    assert message_of({}, "train/3").startswith("Rollout train/3: ")
    assert message_of({}, 0).startswith("Rollout 0: ")
    assert message_of({}, None).startswith("Trajectory: ")


def test_error_is_a_value_error_and_a_trajectory_can_be_checked_at_any_time():
    trajectory = Trajectory.from_dict(record())
    trajectory.logprobs.pop()
    with pytest.raises(ValueError, match="Rollout 2: field `logprobs` has 4 values, expected 5"):
        trajectory.validate(2)
    trajectory.turns = None
    trajectory.logprobs.append(0.0)
    with pytest.raises(TrajectoryError, match="field `turns` expected a list, got NoneType"):
        trajectory.validate()


def test_every_position_belongs_to_the_last_turn_that_started():
    trajectory = Trajectory.from_dict(record())
    assert [locate(trajectory, place) for place in range(5)] == [0, 0, 0, 0, 1]
    trajectory.turns = []
    assert locate(trajectory, 3) == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=4,
)
CALL = st.builds(
    ToolCall,
    st.text(max_size=4),
    st.text(max_size=4),
    st.dictionaries(st.text(max_size=3), JSON, max_size=2),
    st.none() | st.text(),
)
REWARD = st.none() | st.floats(allow_nan=False, allow_infinity=False)
RESULT = st.builds(ToolResult, JSON, st.booleans(), st.none() | st.text(max_size=4), REWARD)


@st.composite
def trajectories(draw):
    masks, turns = [], []
    for _ in range(draw(st.integers(0, 3))):
        wrote, forced, read = draw(st.integers(1, 4)), draw(st.integers(0, 1)), draw(st.integers(0, 3))
        seconds = draw(st.tuples(st.floats(0, 9), st.floats(0, 9)))
        calls, results = draw(st.lists(CALL, max_size=2)), draw(st.lists(RESULT, max_size=2))
        reason = draw(st.sampled_from(["stop", "length"]))
        turns.append(Turn(len(masks), len(masks) + wrote, reason, calls, results, *seconds))
        masks += [(1, 1)] * forced + [(1, 0)] * (wrote - forced) + [(0, 0)] * read
    count = len(masks)
    ids = st.integers(0, 200_000)
    logprob = st.floats(-1e4, 0.0)
    return Trajectory(
        draw(st.lists(ids, max_size=4)),
        draw(st.lists(ids, min_size=count, max_size=count)),
        [draw(logprob) if assistant and not forced else 0.0 for assistant, forced in masks],
        [assistant for assistant, _ in masks],
        [forced for _, forced in masks],
        turns,
        draw(st.sampled_from(STOP_REASONS)),
    )


@settings(max_examples=60, deadline=None)
@given(trajectories())
def test_every_trajectory_survives_the_round_trip(trajectory):
    written = trajectory.to_dict()
    assert Trajectory.from_dict(written, 0) == trajectory
    assert written["turns"] == trajectory.to_dict()["turns"] and all(isinstance(t, dict) for t in written["turns"])
    assert sum(trajectory.trainable_mask) == sum(trajectory.tool_mask) - sum(trajectory.forced_mask)


@settings(max_examples=60, deadline=None)
@given(trajectories(), st.data())
def test_every_record_with_a_field_cut_short_is_refused(trajectory, data):
    written = trajectory.to_dict()
    name = data.draw(st.sampled_from(["completion_ids", "logprobs", "tool_mask", "forced_mask"]))
    if written[name]:
        written[name] = written[name][:-1]
        assert "Rollout 5: " in message_of(written, 5)

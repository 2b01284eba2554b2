"""Advantages: against a loop in plain Python and against closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_toolgrpo import ToolResult, Trajectory, Turn
from trl_toolgrpo.algorithms.advantages import (
    explained_variance,
    first_of_step,
    generalized_advantages,
    moments,
    place_rewards,
    rewards_to_go,
    steps_of,
    whiten,
)


def trajectory_of(turns, stop_reason="stop"):
    """
    A rollout from its turns: `(forced, sampled, tool, reward)` counts the tokens that were forced, then sampled, then
    those of the tool's result, and gives the turn's reward.
    """
    tool_mask, forced_mask, made = [], [], []
    for forced, sampled, tool, reward in turns:
        start = len(tool_mask)
        tool_mask += [1] * (forced + sampled) + [0] * tool
        forced_mask += [1] * forced + [0] * (sampled + tool)
        results = [] if reward is None else [ToolResult("x", reward=reward)]
        made.append(Turn(start, start + forced + sampled, tool_results=results))
    count = len(tool_mask)
    return Trajectory([1], [5] * count, [0.0] * count, tool_mask, forced_mask, made, stop_reason)


def by_hand(trajectory, terminal, values, gamma, lam, unit):
    """Compute advantages and returns of one rollout with loops and dicts alone."""
    flags = trajectory.trainable_mask
    trainable = [place for place in range(len(flags)) if flags[place]]
    rewards = dict.fromkeys(trainable, 0.0)
    if trainable:
        rewards[trainable[-1]] += terminal
    for turn in trajectory.turns:
        before = [place for place in trainable if place < turn.end]
        for result in turn.tool_results:
            if before:
                rewards[before[-1]] += result.reward
    if unit == "token":
        steps = [[place] for place in trainable]
    else:
        spans = [[place for place in trainable if turn.start <= place < turn.end] for turn in trajectory.turns]
        steps = [span for span in spans if span]
    advantage, following = 0.0, 0.0
    advantages, returns = {}, {}
    for step in reversed(steps):
        value = values[step[0]]
        delta = sum(rewards[place] for place in step) + gamma * following - value
        advantage = delta + gamma * lam * advantage
        following = value
        returns[step[0]] = advantage + value
        for place in step:
            advantages[place] = advantage
    return advantages, returns


COUNTS = st.integers(0, 4)
TURNS = st.lists(st.tuples(COUNTS, COUNTS, COUNTS, st.none() | st.floats(-2, 2)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(TURNS, st.floats(-5, 5), st.sampled_from(["stop", "length"])), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["token", "turn"]),
    st.integers(0, 999),
)  # fmt: skip
def test_gae_is_that_of_a_plain_loop(rollouts, gamma, lam, unit, seed):
    """With tool results, forced tokens, empty turns, truncation and rewards of turns."""
    trajectories = [trajectory_of(turns, reason) for turns, _, reason in rollouts]
    width = max(1, *(len(t.completion_ids) for t in trajectories)) + 2
    values = torch.randn(len(rollouts), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    terminal = torch.tensor([reward for _, reward, _ in rollouts], dtype=torch.float64)
    steps = steps_of(trajectories, width, unit)
    placed = place_rewards(terminal, trajectories, width)
    advantages, returns = generalized_advantages(placed, values, steps, gamma, lam)
    first = first_of_step(steps)
    for row, trajectory in enumerate(trajectories):
        expected, targets = by_hand(trajectory, terminal[row].item(), values[row].tolist(), gamma, lam, unit)
        for place in range(width):
            assert advantages[row, place].item() == pytest.approx(expected.get(place, 0.0), abs=1e-9)
            assert returns[row, place].item() == pytest.approx(targets.get(place, 0.0), abs=1e-9)
            assert bool(first[row, place]) == (place in targets)


def test_a_terminal_reward_decays_geometrically():
    """Without a critic and with one reward at the end, A_t = (gamma lambda)^(n - 1 - t): the sum in closed form."""
    count, gamma, lam = 6, 0.9, 0.8
    steps = torch.arange(count)[None]
    rewards = torch.zeros(1, count)
    rewards[0, -1] = 1.0
    advantages, _ = generalized_advantages(rewards, torch.zeros(1, count), steps, gamma, lam)
    expected = [(gamma * lam) ** (count - 1 - t) for t in range(count)]
    torch.testing.assert_close(advantages[0], torch.tensor(expected, dtype=torch.float64))


def test_the_limits_of_lambda():
    torch.manual_seed(0)
    rewards, values, steps = torch.randn(2, 5), torch.randn(2, 5), torch.arange(5).expand(2, 5)
    one_step, _ = generalized_advantages(rewards, values, steps, 0.7, 0.0)
    following = torch.nn.functional.pad(values, (0, 1))[:, 1:]
    torch.testing.assert_close(one_step, (rewards + 0.7 * following - values).double())
    monte_carlo, _ = generalized_advantages(rewards, values, steps, 0.7, 1.0)
    torch.testing.assert_close(monte_carlo, rewards_to_go(rewards, steps, 0.7) - values.double())


def test_without_a_critic_every_token_gets_the_return_of_its_rollout():
    trajectories = [trajectory_of([(0, 3, 2, None), (1, 2, 0, None)]), trajectory_of([(0, 1, 0, None)])]
    steps = steps_of(trajectories, 9, "token")
    placed = place_rewards(torch.tensor([0.7, -2.0]), trajectories, 9)
    advantages, _ = generalized_advantages(placed, torch.zeros(2, 9), steps, 1.0, 1.0)
    assert advantages[0].tolist() == pytest.approx([0.7] * 3 + [0] * 3 + [0.7] * 2 + [0])
    assert advantages[1].tolist() == pytest.approx([-2.0] + [0] * 8)


def test_one_turn_has_the_advantage_of_its_rollout():
    trajectories = [trajectory_of([(0, 4, 0, None)])]
    steps = steps_of(trajectories, 4, "turn")
    placed = place_rewards(torch.tensor([1.5]), trajectories, 4)
    advantages, returns = generalized_advantages(placed, torch.tensor([[0.5, 9.0, 9.0, 9.0]]), steps, 0.3, 0.2)
    assert advantages.tolist() == [[1.0] * 4]
    assert returns.tolist() == [[1.5, 0, 0, 0]]


def test_rewards_fall_on_the_last_trainable_token():
    # Tokens 0 to 8: forced, sampled, sampled, tool, tool | sampled, tool | forced, forced
    trajectory = trajectory_of([(1, 2, 2, 0.5), (0, 1, 1, -1.0), (2, 0, 0, 4.0)])
    placed = place_rewards(torch.tensor([10.0]), [trajectory], 10)
    assert placed[0].tolist() == [0, 0, 0.5, 0, 0, 10.0 - 1.0 + 4.0, 0, 0, 0, 0]
    forced = trajectory_of([(3, 0, 0, 1.0)])
    assert place_rewards(torch.tensor([1.0]), [forced], 4).tolist() == [[0.0] * 4]
    own = Trajectory([1], [5], [0.0], [1], [0], [Turn(0, 1, reward=0.25)], "stop")
    assert place_rewards(torch.tensor([1.0]), [own], 1).tolist() == [[1.25]]


def test_steps_by_hand():
    trajectory = trajectory_of([(1, 2, 1, None), (2, 0, 0, None), (0, 2, 0, None)])
    assert steps_of([trajectory], 9, "token").tolist() == [[-1, 0, 1, -1, -1, -1, 2, 3, -1]]
    assert steps_of([trajectory], 9, "turn").tolist() == [[-1, 0, 0, -1, -1, -1, 1, 1, -1]]
    assert first_of_step(steps_of([trajectory], 9, "turn")).int().tolist() == [[0, 1, 0, 0, 0, 0, 1, 0, 0]]


def test_a_rollout_without_a_trainable_token_contributes_nothing():
    steps = steps_of([trajectory_of([(3, 0, 2, None)])], 5, "token")
    advantages, returns = generalized_advantages(torch.ones(1, 5), torch.ones(1, 5), steps, 1.0, 0.95)
    assert not advantages.any() and not returns.any()
    assert not whiten(advantages, steps >= 0, moments(advantages, steps >= 0)).any()


def test_whitening_is_over_all_processes():
    torch.manual_seed(0)
    values, mask = torch.randn(6, 7, dtype=torch.float64) * 3 + 2, torch.rand(6, 7) > 0.3
    sums = moments(values[:2], mask[:2]) + moments(values[2:], mask[2:])
    white = torch.cat([whiten(values[:2], mask[:2], sums), whiten(values[2:], mask[2:], sums)])
    taken = white[mask]
    assert taken.mean().item() == pytest.approx(0, abs=1e-9) and taken.std(correction=0).item() == pytest.approx(1)
    assert not white[~mask].any()


def test_explained_variance_by_hand():
    returns = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = torch.ones(1, 4)

    def explained(values):
        return explained_variance(moments(returns, mask), moments(returns - values, mask))

    assert explained(returns) == 1.0
    assert explained(torch.full((1, 4), 2.5)) == pytest.approx(0.0)
    assert explained(returns.flip(1)) == pytest.approx(1 - 5.0 / 1.25)  # errors -3, -1, 1, 3
    constant = torch.ones(1, 4)
    assert explained_variance(moments(constant, mask), moments(constant, mask)) is None

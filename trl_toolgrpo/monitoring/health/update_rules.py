"""Health rules on updates: ratio, log-probs, forcing, reference, critic, gradient, advantages, entropy and KL.

Each rule is a function of the metrics of the steps so far; its docstring says what evidence it asks for.
"""

import math
from statistics import median

from ...types import JSONObject
from .monitor import (  # fmt: skip
    CHANCE,
    HealthFinding,
    Rule,
    RunFacts,
    Window,
    batches,
    earliest,
    improved,
    latest,
    mean,
    trained,
)


_WATCHED = ("loss", "grad_norm", "kl", "entropy", "ratio/mean", "value/loss", "value/grad_norm")

_CRITIC_BATCHES = 16

OVERFLOWS = 17
"""Steps in a row that loss scaling may leave out: a scale of 65,536 is halved each time, and 1 must be enough."""


def _not_finite(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    One figure that is not finite is enough, since no sound update has any. With loss scaling the norm of a gradient
    that overflowed is none: the step is left out, and the scale comes down.
    """
    entry = window[-1]
    broken = [name for name in _WATCHED if _is_broken(entry, name)]
    if facts.loss_scaling and set(broken) <= {"grad_norm", "value/grad_norm"}:
        last = window[-OVERFLOWS:]
        if len(last) < OVERFLOWS or not all(any(_is_broken(e, name) for name in broken) for e in last):
            return None
    if not broken:
        return None
    return HealthFinding(
        f"{', '.join(f'`{name}`' for name in broken)} is not a finite number. An update with it destroys the "
        f"weights, and every later step is lost. Usual causes: a learning rate that is too high, a reward or "
        f"log-prob that is infinite, float16 without loss scaling. Go back to the last checkpoint, lower "
        f"`learning_rate` (or `value_learning_rate`), set `max_grad_norm`, and train in bfloat16 or float32."
    )


def _is_broken(entry: JSONObject, name: str) -> bool:
    return name in entry and (entry[name] is None or not math.isfinite(entry[name]))


def _ratio_mean(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    Before the policy has moved the ratio is 1 but for rounding. After that its mean over tokens that were sampled
    stays 1 in expectation, and what it is off by on one batch is its spread over the root of the number of tokens, in
    addition to what the update fits to this very batch. The log-probs compared before the policy had moved tell which
    of the two causes is named.
    """
    entry = window[-1]
    value = entry.get("ratio/mean")
    if value is None:
        return None
    fresh = "sampling/logp_diff_mean" in entry and facts.steps_per_batch == 1
    if fresh:
        limit = max(0.05, facts.rounding_spread) if facts.low_precision else 0.01
    else:
        tokens = facts.rollouts * max([1.0, *latest(window, "completions/mean_length", 1)])
        limit = max(0.15, 5 * (entry.get("ratio/std") or 0.0) / math.sqrt(tokens))
    if abs(value - 1) <= limit:
        return None
    gap = latest(window, "sampling/logp_diff_mean", 1)
    if not fresh and not gap:
        cause = (
            "No log-probs were compared before the policy had moved, since no token of that step takes part, so that "
            "the cause is not known: either they differ (`logprob_check='always'` compares them), or the policy has "
            "moved far within one rollout batch."
        )
    elif fresh or gap[0] > facts.largest_gap:
        cause = (
            "The recorded log-probs are not those of the policy that sampled. Look at `sampling/logp_diff_max`, and "
            "set `logprob_check='always'` to see the first token."
        )
    else:
        cause = (
            f"The recorded log-probs are right: before the policy had moved they differed from the trainer's by "
            f"{gap[0]:.1e} nats. So the policy has moved far within one rollout batch. Lower `learning_rate`, "
            f"`num_iterations` or `steps_per_generation`."
        )
    return HealthFinding(
        f"The mean ratio of the policy to the one that sampled is {value:.3f}, and should be 1 within {limit:.2g}. "
        f"{cause}{_spread_by_rounding(entry, facts)}",
        value,
        limit,
    )


def _spread_by_rounding(entry: JSONObject, facts: RunFacts) -> str:
    """Return for a message how much of a fresh ratio's spread is due to the dtype; empty in float32."""
    if not facts.low_precision or "sampling/logp_diff_mean" not in entry or entry.get("ratio/std") is None:
        return ""
    return (
        f" (The ratio's spread is {entry['ratio/std']:.3f}; rounding in {facts.dtype} explains about "
        f"{facts.rounding_spread:.3f} of it, and is no fault.)"
    )


def _ratio_spread(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    A spread is due from the second optimizer step on a batch, if the first has moved the policy: it had a gradient
    and more than the first steps of a learning rate that warms up. Twice in a row, and below what float32 rounds.
    """
    reused = [
        place for place, entry in enumerate(window)
        if "ratio/std" in entry and "sampling/logp_diff_mean" not in entry and entry["step"] > facts.policy_from + 1
    ][-2:]  # fmt: skip
    if len(reused) < 2 or reused[-1] != len(window) - 1:
        return None
    for place in reused:
        before = window[place - 1] if place else {}
        has_rate = (before.get("learning_rate") or 0) > 0 and facts.at_full_rate(before)
        if not has_rate or (before.get("grad_norm") or 0) <= 1e-6 or window[place]["ratio/std"] > 1e-6:
            return None
    value, rate = window[-1]["ratio/std"], window[-1].get("learning_rate") or 0.0
    moved = latest(window, "policy/moved", 1)
    cause = (
        f"The weights do move, so either the old log-probs are recomputed with the present policy, or a learning rate "
        f"of {rate:.1e} is too small to show. Check that `record_sample_logprobs=True`, and raise `learning_rate`."
        if moved and moved[0] > 0
        else "Either the weights do not move (frozen parameters, a learning rate that rounds to nothing in bfloat16), "
        "or the old log-probs are recomputed with the present policy. Check that `record_sample_logprobs=True`, that "
        "parameters require gradients, and keep trained weights in float32."
    )
    return HealthFinding(
        f"The ratio has no spread (std {value:.1e}) in a second optimizer step on a rollout batch, where the policy "
        f"should have moved since it sampled. {cause}",
        value,
        1e-6,
    )


def _logprob_gap(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    Two correct passes agree to rounding, however few the tokens; what rounding does in the run's own dtype was
    measured on its first batch. It grows with the logits while a policy trains, and single tokens show many times its
    mean.
    """
    gap, widest = window[-1].get("sampling/logp_diff_mean"), window[-1].get("sampling/logp_diff_max")
    if gap is None or widest is None:
        return None
    most_at_once = max(1.0, 40 * facts.logprob_tolerance) if facts.low_precision else 1.0
    value, limit = (gap, facts.largest_gap) if gap > facts.largest_gap else (widest, most_at_once)
    if value <= limit:
        return None
    rope = (
        f"Its rotary embeddings (`{facts.rope}`) depend on the longest sequence that a pass reads, so that rollouts "
        f"which end near the border are scored with other frequencies than they were sampled with: lower "
        f"`max_completion_length` so that prompt and completion stay below it. Other causes: "
        if facts.rope
        else "Usual causes: "
    )
    return HealthFinding(
        f"Log-probs recorded while sampling and those the trainer computes differ by {gap:.2e} nats on average and "
        f"{widest:.2e} at most, before the policy has moved; rounding in {facts.dtype} explains "
        f"{facts.logprob_tolerance:.2g} on average. Every ratio is wrong by as much. {rope}dropout in the policy, "
        f"another temperature, dtype or set of weights in the sampler, or a model that scores a sequence otherwise in "
        f"a padded batch than alone. Set `disable_dropout=True`, compare dtypes, and set `logprob_check='always'` to "
        f"see the first token.",
        value,
        limit,
    )


def _forced_in_update(window: Window, facts: RunFacts) -> HealthFinding | None:
    """Find forced tokens in an update; one is enough, since this is a count and not a sample."""
    value = window[-1].get("forced/fraction")
    if not value or "forced/loss" in window[-1]:
        return None
    return HealthFinding(
        f"{value:.1%} of the tokens in a policy-gradient update were forced, not sampled. They carry no weight "
        f"themselves, but the rollouts with them are not the policy's own, and their rewards train it for what it "
        f"did not choose. `disable_forcing_in_updates=False` was set; set it to True, and force in assisted steps "
        f"only.",
        value,
        0.0,
    )


def _reference_still(window: Window, facts: RunFacts) -> HealthFinding | None:
    """Find syncs that were due and did not come; one may wait for its rollout batch, and for the next log."""
    if facts.sync_steps is None:
        return None
    step = window[-1]["step"]
    due = (step - facts.steps_per_batch - 1) // facts.sync_steps
    value = window[-1].get("ref/syncs") or 0.0
    if value >= due:
        return None
    return HealthFinding(
        f"The reference was synced {value:.0f} times in {step} steps, {due} times were due. The KL term holds the "
        f"policy to where it began. Something has removed the sync callback, or syncs fail: look for callbacks that "
        f"were taken out, and call `trainer.sync_reference()` to see what it says.",
        value,
        float(due),
    )


def _reference_differs(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    Tensors are counted. The KL of two equal policies is what rounding makes of it, about half the square of the
    difference of their log-probs; it is measured against recorded log-probs, and says nothing where those are wrong.
    """
    entry = window[-1]
    tensors, divergence = entry.get("ref/tensors_differ") or 0.0, entry.get("ref/kl") or 0.0
    limit = max(1e-2, 10 * facts.logprob_tolerance**2) if facts.low_precision else 1e-4
    if (entry.get("sampling/logp_diff_mean") or 0.0) > facts.largest_gap:
        divergence = 0.0
    if not tensors and not (facts.copies_policy and divergence > limit):
        return None
    return HealthFinding(
        f"Right after a sync {tensors:.0f} tensors of the reference differ from what they should be, and the KL of "
        f"the policy to it is {divergence:.1e}, which should be 0 to rounding. Usual causes: dropout in the policy, "
        f"or code that writes to the reference. Set `disable_dropout=True` and `lora_dropout` to 0.",
        divergence,
        limit,
    )


def _policy_still(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    `policy/moved` is there only where the optimizer had a gradient and a learning rate to move the policy with, and
    compares bits. While the rate warms up, its first steps may round to nothing.
    """
    moved = latest(window, "policy/moved", 2)
    if "policy/moved" not in window[-1] or window[-1].get("grad_norm") == 0 or len(moved) < 2 or any(moved):
        return None
    if not facts.at_full_rate(window[-1]):
        return None
    return HealthFinding(
        "The policy does not move: it has a gradient and a learning rate, and not one of its weights has changed over "
        "the last 2 logged steps. Every further update is wasted. Usual causes: an optimizer made for other "
        "parameters, a callback that restores weights, a learning rate so low that it rounds to nothing in the dtype "
        "of the weights. Leave `optimizers` out, keep trained weights in float32, or raise `learning_rate`.",
        0.0,
        0.0,
    )


def _critic_still(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    A loss without a gradient, twice in a row: no sound head has that, but one that already predicts the returns has
    neither, as where every reward is 0. Or a head that explains exactly nothing of four batches, although its
    learning rate has warmed up. With loss scaling a gradient that overflowed is not logged.
    """
    entry = window[-1]
    if "value/loss" not in entry:
        return None
    steps = OVERFLOWS if facts.loss_scaling else 2
    explained = [e for e in window[-64:] if e.get("value/explained_variance") is not None][-4:]
    last = window[-steps:]
    frozen = len(last) == steps and all(e.get("value/loss") and not e.get("value/grad_norm") for e in last)
    nothing = all(abs(e["value/explained_variance"]) < 1e-6 and facts.at_full_rate(e) for e in explained)
    if not frozen and not (len(explained) == 4 and nothing):
        return None
    return HealthFinding(
        "The value head does not learn: it gets no gradient, or explains exactly nothing batch after batch. Its "
        "advantages are raw returns. Check that its parameters require gradients and are in the optimizer, and that "
        "`value_learning_rate` is not 0 (1e-3 is the default, 1e-2 suits short runs).",
        entry.get("value/grad_norm") or 0.0,
        0.0,
    )


def _critic_worse(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    What is explained of 16 batches together, each weighed by the variance of its rewards: one small batch with hardly
    any variance can be at -100 by itself. Most of them must be below 0 as well, and the task must not be solved, which
    leaves next to nothing to explain.
    """
    found = [e for e in batches(window) if e.get("value/explained_variance") is not None]
    recent = found[-_CRITIC_BATCHES:]
    variances = [(e.get("reward_std") or 0.0) ** 2 for e in recent]
    if len(recent) < _CRITIC_BATCHES or not any(variances):
        return None
    values = [e["value/explained_variance"] for e in recent]
    pooled = sum(v * x for v, x in zip(variances, values, strict=True)) / sum(variances)
    if max(pooled, median(values)) >= -0.15 or sum(value < 0 for value in values) < 0.75 * len(values):
        return None
    at_first = mean([(e.get("reward_std") or 0.0) ** 2 for e in found[:_CRITIC_BATCHES]])
    if improved(found) and mean(variances) < 0.5 * at_first:
        return None
    return HealthFinding(
        f"The critic explains {pooled:.2f} of the variance of returns over the last {len(values)} batches: it does "
        f"worse than their mean, and its advantages are noisier than none. Lower `value_learning_rate`, raise "
        f"`value_epochs`, or warm the critic up first (`value_warmup_steps`).",
        pooled,
        -0.15,
    )


def _value_loss(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    A policy that learns changes how much rewards vary, and the loss with it: what is compared is the loss over their
    variance. All but one of the last 16 batches must be above all but one of the first 16, of at least 40, which has
    a chance below one in a million where nothing has changed.
    """
    found = [e for e in batches(window) if e.get("value/loss") is not None and (e.get("reward_std") or 0) > 0]
    explained = latest(window, "value/explained_variance", 16)
    if len(found) < 40 or not explained or median(explained) > 0.1:
        return None
    shares = [e["value/loss"] / e["reward_std"] ** 2 for e in found]
    first, last = sorted(shares[:16]), sorted(shares[-16:])
    losses = [e["value/loss"] for e in found]
    if last[1] <= first[-2] or mean(last) <= 1.2 * mean(first) or mean(losses[-16:]) <= mean(losses[:16]):
        return None
    return HealthFinding(
        f"The value loss has not fallen: {mean(losses[:16]):.3g} over the first 16 batches, {mean(losses[-16:]):.3g} "
        f"over the last 16, {mean(last) / mean(first):.1f} times as much of the variance of rewards, while the critic "
        f"explains {median(explained):.2f} of it. Raise `value_learning_rate` or `value_epochs`; if the loss "
        f"oscillates, lower `value_learning_rate` and set `value_clip`.",
        mean(last),
        1.2 * mean(first),
    )


def _gradient_zero(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    Exactly 0 in three steps in a row. Where no group has a spread that is right, and another rule says so; where the
    estimator has left out all groups that have one it is what was asked for; in assisted steps it is right where no
    rollout earns a reward, which is no accident over 96 rollouts.
    """
    assisted = "forced/loss" in window[-1]
    count = max(3, math.ceil(96 / facts.rollouts)) if assisted else 3
    last = window[-count:]
    if len(last) < count or any(entry.get("grad_norm") != 0 for entry in last):
        return None
    # Of the groups that take part, all may be without a spread
    shares = [(e.get("frac_reward_zero_std", 0), e.get("groups/admitted", 1)) for e in batches(window, 3)]
    idle = [flat for flat, admitted in shares if flat >= admitted]
    if idle and not assisted:
        return None
    return HealthFinding(
        f"The gradient was exactly 0 in {count} steps in a row, although there was something to learn from. In "
        f"assisted steps no rollout earned a reward: make forced calls valid (`force_level='schema'`). Else "
        f"parameters are frozen, or every token is masked: look at `completions/clipped_ratio` with "
        f"`mask_truncated_completions`.",
        0.0,
        0.0,
    )


def _gradient_spike(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    Norms vary by a factor from batch to batch, and by a larger one where few groups have a spread. A spike is beyond
    20 times the median, and beyond six times the usual deviation of the logarithm from its median, over 24 norms or
    more; and beyond six times the largest of them.
    """
    value = window[-1].get("grad_norm")
    before = [norm for norm in latest(window[:-1], "grad_norm", 32) if norm > 0]
    if value is None or not math.isfinite(value) or len(before) < 24:
        return None
    usual = median(before)
    deviation = 1.48 * median([abs(math.log(norm / usual)) for norm in before])
    limit = max(usual * max(20.0, math.exp(min(6 * deviation, 700))), 6 * max(before), facts.max_grad_norm)
    if value <= limit:
        return None
    return HealthFinding(
        f"The norm of the gradient is {value:.3g}, {value / usual:.0f} times its median of {usual:.3g}. One such "
        f"step can undo many. Usual causes: a rare token with a tiny probability, an outlier among rewards, a "
        f"learning rate that is too high. Set `max_grad_norm`, bound rewards, lower `learning_rate`.",
        value,
        limit,
    )


def _advantages_zero(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    Few groups without a spread are an accident, above all where most rollouts succeed or most fail. The groups before
    them decide how many are not: as many as have a chance below one in a million. Where no group has had a spread, it
    takes 24 groups, or 24 rollouts that all have the same reward: if one of five succeeded, 24 would fail by
    accident once in 200 runs. The same reward for everyone that is neither 0 nor 1 comes of the reward function, and
    three batches tell.

    Silent where reward has come up since: then the task is solved.
    """
    found = [entry for entry in batches(window) if entry.get("frac_reward_zero_std") is not None]
    count = next((n for n, entry in enumerate(reversed(found)) if not _is_flat(entry, facts)), len(found))
    streak, before = found[-count:] if count else [], found[: len(found) - count][-64:]
    if count < 3:
        return None
    value, groups = streak[-1]["reward"], count * facts.groups
    if before:
        flat = sum(entry["frac_reward_zero_std"] for entry in before) * facts.groups
        share = (flat + 2) / (len(before) * facts.groups + 2)
        if improved(found) or share**groups > CHANCE:
            return None
    else:
        same = all(entry["reward"] == value and entry.get("reward_std") == 0 for entry in streak)
        enough = same and (value not in (0, 1) or count * facts.rollouts >= 24)
        if not enough and groups < 24:
            return None
    seen, effect = (
        ("In no group", "every advantage is 0 and nothing is learned")
        if facts.group_advantages
        else ("Nowhere in any", "the critic has nothing to tell good rollouts by, and nothing is learned")
    )
    return HealthFinding(
        f"{seen} of the last {count} rollout batches do rewards differ (mean reward {value:.3g}), so that {effect}. "
        f"The task is too hard or too easy for the policy, or the reward does not look at what it does. Check the "
        f"reward function on sample conversations, mix in easier questions or partial credit, raise "
        f"`num_generations` or `temperature`; for a policy that never calls a tool see `assist_warmup_steps`.",
        1.0,
        1.0,
    )


def _is_flat(entry: JSONObject, facts: RunFacts) -> bool:
    """Return whether no rollout of a batch has an advantage from its reward."""
    return entry["frac_reward_zero_std"] == 1 and (facts.group_advantages or entry.get("reward_std") == 0)


def _entropy_collapse(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    Three steps in a row below a tenth of what it was, with less than 1 nat left in a whole rollout, since a policy
    that has learned a format is sure of most tokens and open at a few; or below a twentieth. From the start, less than
    0.05 nats a rollout: of 20 rollouts one would differ. A policy that is sure because it has learned is no fault: its
    reward has come up.
    """
    steps = trained(window, facts)
    last = latest(steps, "entropy", 3)
    if len(last) < 3 or min(last) == 0 or improved(batches(steps)):
        return None
    first = earliest(steps[:-3], "entropy", 8)
    length = max([1.0, *latest(steps, "completions/mean_length", 3)])
    limit = max(min(0.1 * mean(first), 1 / length), 0.05 * mean(first), 0.05 / length)
    if max(last) >= limit:
        return None
    began = f" (it began at {mean(first):.2g})" if first else ""
    return HealthFinding(
        f"The entropy of the policy is {mean(last):.2g} nats a token{began}, {length * mean(last):.2g} in a whole "
        f"rollout, and reward has not come up with it: nearly every rollout of a group says the same, and "
        f"exploration is over. Raise `temperature` to 1, lower `learning_rate`, add a KL term (`beta`), or go back to "
        f"a checkpoint before the fall.",
        mean(last),
        limit,
    )


def _kl_runaway(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    Three steps in a row, since the estimator has a heavy tail: a single token that the reference finds impossible can
    make the mean of a batch. A policy whose reward has come up has had to leave its reference, and may be further.
    """
    last = latest(window, "kl", 3)
    limit = 2.0 if improved(trained(window, facts)) else 0.5
    if window[-1].get("kl") is None or len(last) < 3 or min(last) <= limit:
        return None
    return HealthFinding(
        f"The policy is {last[-1]:.2f} nats a token away from its reference, and a fluent model stays below about "
        f"{limit:g}. It trades language for reward, or the updates are too large. Raise `beta`, lower "
        f"`learning_rate`, or let the reference follow (`sync_ref_model=True`).",
        last[-1],
        limit,
    )


UPDATE_RULES = (
    Rule("not_finite", _not_finite, "error"),
    Rule("ratio_mean", _ratio_mean, "error"),
    Rule("ratio_spread", _ratio_spread),
    Rule("logprob_gap", _logprob_gap, "error"),
    Rule("forced_in_update", _forced_in_update),
    Rule("reference_still", _reference_still),
    Rule("reference_differs", _reference_differs, "error"),
    Rule("policy_still", _policy_still, "error"),
    Rule("critic_still", _critic_still),
    Rule("critic_worse", _critic_worse),
    Rule("value_loss", _value_loss),
    Rule("gradient_zero", _gradient_zero),
    Rule("gradient_spike", _gradient_spike),
    Rule("advantages_zero", _advantages_zero),
    Rule("entropy_collapse", _entropy_collapse),
    Rule("kl_runaway", _kl_runaway),
)
"""The rules of this module."""

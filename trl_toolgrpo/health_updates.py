"""Health rules on updates: ratio, log-probs, forcing, reference, critic, gradient, advantages, entropy and KL.

Owns the thresholds and the words; each rule is a function of the metrics of the steps so far. Fed by `health.py`.
"""

import math
from statistics import median

from .health import Finding, Rule, RunFacts, Window, batches, earliest, improved, latest, mean, trained


_WATCHED = ("loss", "grad_norm", "kl", "entropy", "ratio/mean", "value/loss", "value/grad_norm")


def _not_finite(window: Window, facts: RunFacts) -> Finding | None:
    entry = window[-1]
    broken = [n for n in _WATCHED if n in entry and (entry[n] is None or not math.isfinite(entry[n]))]
    if not broken:
        return None
    return Finding(
        f"{', '.join(f'`{name}`' for name in broken)} is not a finite number. An update with it destroys the "
        f"weights, and every later step is lost. Usual causes: a learning rate that is too high, a reward or "
        f"log-prob that is infinite, float16 without loss scaling. Go back to the last checkpoint, lower "
        f"`learning_rate` (or `value_learning_rate`), set `max_grad_norm`, and train in bfloat16 or float32."
    )


def _ratio_mean(window: Window, facts: RunFacts) -> Finding | None:
    entry = window[-1]
    value = entry.get("ratio/mean")
    if value is None:
        return None
    fresh = "sampling/logp_diff_mean" in entry and facts.steps_per_batch == 1
    limit = (max(0.05, facts.rounding_spread) if facts.low_precision else 0.01) if fresh else 0.15
    if abs(value - 1) <= limit:
        return None
    return Finding(
        f"The mean ratio of the policy to the one that sampled is {value:.3f}, and should be 1 within {limit:g}. The "
        f"recorded log-probs are not those of the policy that sampled, or the policy has moved far within one rollout "
        f"batch. Look at `sampling/logp_diff_max` and set `logprob_check='always'`; if log-probs agree, lower "
        f"`learning_rate` or `num_iterations`.{_spread_by_rounding(entry, facts)}",
        value,
        limit,
    )


def _spread_by_rounding(entry: dict, facts: RunFacts) -> str:
    """What of the spread of a fresh ratio is the dtype's, for a message; empty in float32."""
    if not facts.low_precision or "sampling/logp_diff_mean" not in entry or entry.get("ratio/std") is None:
        return ""
    return (
        f" (The ratio's spread is {entry['ratio/std']:.3f}; rounding in {facts.dtype} explains about "
        f"{facts.rounding_spread:.3f} of it, and is no fault.)"
    )


def _ratio_spread(window: Window, facts: RunFacts) -> Finding | None:
    """A spread is due from the second optimizer step on a batch, if the first has moved the policy."""
    reused = [
        place for place, entry in enumerate(window)
        if "ratio/std" in entry and "sampling/logp_diff_mean" not in entry and entry["step"] > facts.policy_from + 1
    ][-2:]  # fmt: skip
    if len(reused) < 2 or reused[-1] != len(window) - 1:
        return None
    for place in reused:
        before = window[place - 1] if place else {}
        has_moved = (before.get("learning_rate") or 0) > 0 and (before.get("grad_norm") or 0) > 1e-6
        if not has_moved or window[place]["ratio/std"] > 1e-6:
            return None
    value = window[-1]["ratio/std"]
    return Finding(
        f"The ratio has no spread (std {value:.1e}) in a second optimizer step on a rollout batch, where the policy "
        f"has moved since it sampled. Either the weights do not move (frozen parameters, a learning rate that rounds "
        f"to nothing in bfloat16), or the old log-probs are recomputed with the present policy. Check that "
        f"`record_sample_logprobs=True`, that parameters require gradients, and keep trained weights in float32.",
        value,
        1e-6,
    )


def _logprob_gap(window: Window, facts: RunFacts) -> Finding | None:
    gap, widest = window[-1].get("sampling/logp_diff_mean"), window[-1].get("sampling/logp_diff_max")
    if gap is None or widest is None:
        return None
    known = facts.logprob_tolerance
    # Rounding grows with the logits while a policy trains, and single tokens show many times its mean
    most, most_at_once = (4 * known, max(1.0, 40 * known)) if facts.low_precision else (known, 1.0)
    value, limit = (gap, most) if gap > most else (widest, most_at_once)
    if value <= limit:
        return None
    return Finding(
        f"Log-probs recorded while sampling and those the trainer computes differ by {gap:.2e} nats on average and "
        f"{widest:.2e} at most, before the policy has moved; rounding in {facts.dtype} explains {known:.2g} on "
        f"average. Every ratio is wrong by as much. Usual causes: dropout in the policy, another temperature, dtype "
        f"or set of weights in the sampler. Set `disable_dropout=True`, compare dtypes, and set "
        f"`logprob_check='always'` to see the first token.",
        value,
        limit,
    )


def _forced_in_update(window: Window, facts: RunFacts) -> Finding | None:
    value = window[-1].get("forced/fraction")
    if not value or "forced/loss" in window[-1]:
        return None
    return Finding(
        f"{value:.1%} of the tokens in a policy-gradient update were forced, not sampled. They carry no weight "
        f"themselves, but the rollouts behind them are not the policy's own, and their rewards train it for what it "
        f"did not choose. `disable_forcing_in_updates=False` was set; set it to True, and force in assisted steps "
        f"only.",
        value,
        0.0,
    )


def _reference_still(window: Window, facts: RunFacts) -> Finding | None:
    if facts.sync_steps is None:
        return None
    step = window[-1]["step"]
    due = (step - facts.steps_per_batch - 1) // facts.sync_steps  # one may wait for its batch, and for the next log
    value = window[-1].get("ref/syncs") or 0.0
    if value >= due:
        return None
    return Finding(
        f"The reference was synced {value:.0f} times in {step} steps, {due} times were due. The KL term holds the "
        f"policy to where it began. Something has removed the sync callback, or syncs fail: look for callbacks that "
        f"were taken out, and call `trainer.sync_reference()` to see what it says.",
        value,
        float(due),
    )


def _reference_differs(window: Window, facts: RunFacts) -> Finding | None:
    entry = window[-1]
    tensors, divergence = entry.get("ref/tensors_differ") or 0.0, entry.get("ref/kl") or 0.0
    limit = 1e-2 if facts.low_precision else 1e-4
    if not tensors and not (facts.copies_policy and divergence > limit):
        return None
    return Finding(
        f"Right after a sync {tensors:.0f} tensors of the reference differ from what they should be, and the KL of "
        f"the policy to it is {divergence:.1e}, which should be 0 to rounding. Usual causes: dropout in the policy, "
        f"or code that writes to the reference. Set `disable_dropout=True` and `lora_dropout` to 0.",
        divergence,
        limit,
    )


def _policy_still(window: Window, facts: RunFacts) -> Finding | None:
    """`policy/moved` is there only where the optimizer had a gradient and a learning rate to move the policy with."""
    moved = latest(window, "policy/moved", 2)
    if "policy/moved" not in window[-1] or window[-1].get("grad_norm") == 0 or len(moved) < 2 or any(moved):
        return None
    return Finding(
        "The policy does not move: it has a gradient and a learning rate, and not one of its weights has changed over "
        "the last 2 logged steps. Every further update is wasted. Usual causes: an optimizer made for other "
        "parameters, a callback that restores weights, a learning rate so low that it rounds to nothing in the dtype "
        "of the weights. Leave `optimizers` out, keep trained weights in float32, or raise `learning_rate`.",
        0.0,
        0.0,
    )


def _critic_still(window: Window, facts: RunFacts) -> Finding | None:
    """A head that already tells the returns has no loss, and so no gradient, as where every reward is 0."""
    entry = window[-1]
    if "value/loss" not in entry:
        return None
    explained = [e["value/explained_variance"] for e in window if e.get("value/explained_variance") is not None]
    frozen = len(window) >= 2 and all(e.get("value/loss") and not e.get("value/grad_norm") for e in window[-2:])
    if not frozen and not (len(explained) >= 4 and all(abs(value) < 1e-6 for value in explained[-4:])):
        return None
    return Finding(
        "The value head does not learn: it gets no gradient, or explains exactly nothing batch after batch. Its "
        "advantages are raw returns. Check that its parameters require gradients and are in the optimizer, and that "
        "`value_learning_rate` is not 0 (1e-3 is the default, 1e-2 suits short runs).",
        entry.get("value/grad_norm") or 0.0,
        0.0,
    )


def _critic_worse(window: Window, facts: RunFacts) -> Finding | None:
    values = latest(window, "value/explained_variance", 8)
    if len(values) < 8 or mean(values) >= -0.15:
        return None
    return Finding(
        f"The critic explains {mean(values):.2f} of the variance of returns over the last 8 batches: it does worse "
        f"than their mean, and its advantages are noisier than none. Lower `value_learning_rate`, raise "
        f"`value_epochs`, or warm the critic up first (`value_warmup_steps`).",
        mean(values),
        -0.15,
    )


def _value_loss(window: Window, facts: RunFacts) -> Finding | None:
    first, last = earliest(window, "value/loss", 10), latest(window, "value/loss", 10)
    explained = latest(window, "value/explained_variance", 10)
    if len(batches(window)) < 30 or not last or mean(last) <= 1.2 * mean(first) or mean(explained) > 0.1:
        return None
    return Finding(
        f"The value loss has not fallen: {mean(first):.3g} over the first 10 steps, {mean(last):.3g} over the last "
        f"10, while the critic explains {mean(explained):.2f} of the variance. Raise `value_learning_rate` or "
        f"`value_epochs`; if the loss oscillates, lower `value_learning_rate` and set `value_clip`.",
        mean(last),
        1.2 * mean(first),
    )


def _gradient_zero(window: Window, facts: RunFacts) -> Finding | None:
    """Where no group has a spread a gradient of 0 is right, and another rule says so."""
    last = window[-3:]
    if len(last) < 3 or any(entry.get("grad_norm") != 0 for entry in last):
        return None
    flat = [e for e in batches(window, 3) if e.get("frac_reward_zero_std") == 1]
    if flat and "forced/loss" not in window[-1]:
        return None
    return Finding(
        "The gradient was exactly 0 in 3 steps in a row, although there was something to learn from. In assisted "
        "steps no rollout earned a reward: make forced calls valid (`force_level='schema'`). Else parameters are "
        "frozen, or every token is masked: look at `completions/clipped_ratio` with `mask_truncated_completions`.",
        0.0,
        0.0,
    )


def _gradient_spike(window: Window, facts: RunFacts) -> Finding | None:
    value = window[-1].get("grad_norm")
    before = [norm for norm in latest(window[:-1], "grad_norm", 32) if norm > 0]
    if value is None or not math.isfinite(value) or len(before) < 8:
        return None
    limit = max(20 * median(before), facts.max_grad_norm)
    if value <= limit:
        return None
    return Finding(
        f"The norm of the gradient is {value:.3g}, {value / median(before):.0f} times its median of "
        f"{median(before):.3g}. One such step can undo many. Usual causes: a rare token with a tiny probability, an "
        f"outlier among rewards, a learning rate that is too high. Set `max_grad_norm`, bound rewards, lower "
        f"`learning_rate`.",
        value,
        limit,
    )


def _advantages_zero(window: Window, facts: RunFacts) -> Finding | None:
    """Silent where groups had a spread once and reward has come up since: then the task is solved."""
    found = batches(window)
    shares = [entry.get("frac_reward_zero_std") for entry in found]
    if len(shares) < 3 or any(share != 1 for share in shares[-3:]):
        return None
    had_spread = any(share is not None and share < 1 for share in shares)
    if had_spread and (improved(found) or len(shares) < 6 or any(share != 1 for share in shares[-6:])):
        return None
    value = found[-1]["reward"]
    return Finding(
        f"In no group of the last 3 rollout batches do rewards differ (mean reward {value:.3g}), so every advantage "
        f"is 0 and nothing is learned. The task is too hard or too easy for the policy, or the reward does not look "
        f"at what it does. Check the reward function on sample conversations, mix in easier questions or partial "
        f"credit, raise `num_generations` or `temperature`; for a policy that never calls a tool see "
        f"`assist_warmup_steps`.",
        1.0,
        1.0,
    )


def _entropy_collapse(window: Window, facts: RunFacts) -> Finding | None:
    """A policy that is sure because it has learned is none: reward has come up."""
    steps = trained(window, facts)
    first, last = earliest(steps, "entropy", 3), latest(steps, "entropy", 3)
    if len(last) < 3 or improved(batches(steps)):
        return None
    limit = max(0.1 * mean(first), 1e-3) if len(steps) > 3 else 1e-3
    if mean(last) >= limit:
        return None
    return Finding(
        f"The entropy of the policy is {mean(last):.2g} nats a token (it began at {mean(first):.2g}), and reward has "
        f"not come up with it: every rollout of a group says the same, and exploration is over. Raise `temperature` "
        f"to 1, lower `learning_rate`, add a KL term (`beta`), or go back to a checkpoint before the fall.",
        mean(last),
        limit,
    )


def _kl_runaway(window: Window, facts: RunFacts) -> Finding | None:
    last = latest(window, "kl", 3)
    if window[-1].get("kl") is None or not ((len(last) == 3 and min(last) > 0.5) or last[-1] > 10):
        return None
    return Finding(
        f"The policy is {last[-1]:.2f} nats a token away from its reference, and a fluent model stays below about "
        f"0.5. It trades language for reward, or the updates are too large. Raise `beta`, lower `learning_rate`, or "
        f"let the reference follow (`sync_ref_model=True`).",
        last[-1],
        0.5,
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

"""A rollout batch from prompts to checked trajectories: where sampler, chat, tool runtime and loop come together."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..chat.tool_chat import ToolChat
from ..config.checks import gpu_paths_of
from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError, TrajectoryError
from ..models.model_settings import context_length
from ..models.rotary import RowFrequencies
from ..redaction import Redactor
from ..sampling.choice import generates_padded, make_sampler, unsupported_reason
from ..sampling.constraint import CallConstraints
from ..sampling.noise import RolloutNoise
from ..sampling.protocol import Autocast, Sampler
from ..tools.runtime.executor import ToolExecutor
from ..trl_hooks import Run
from ..types import Message
from .cache_budget import parts_that_fit
from .cache_choice import ChosenCache
from .forcing import CallPrefixes, ForcePolicy, Forcing
from .loop import Rollout, RolloutLimits, RolloutLoop, RolloutRequest, RolloutStats
from .rewards import Rewards
from .trajectory import Trajectory


logger = logging.getLogger(__name__)


def check_gathering(run: Run) -> None:
    """
    Check that the parameters of a policy are gathered once for a whole rollout batch.

    Raises:
        ConfigError: if they are not, so that each token a process samples would wait for all other processes.
    """
    state, why = run.accelerator.state, "Rollouts of different length would then wait for each other forever."
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3 and not run.args.ds3_gather_for_generation:
        raise ConfigError(
            f"You passed `ds3_gather_for_generation=False` with DeepSpeed ZeRO-3: weights are gathered anew for each "
            f"token. {why}",
            remedy="Leave it at True, use ZeRO-2, or set `record_sample_logprobs=False` for TRL's own path.",
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ConfigError(
            f"You passed FSDP version 1, which gathers weights anew for each token. {why}",
            remedy="Set `fsdp_version: 2`, as in accelerate_configs/fsdp2.yaml, or `record_sample_logprobs=False` for "
            "TRL's own path.",
        )


@dataclass
class RolloutBatch:
    """
    The rollouts of one process.

    Args:
        rollouts (`list[Rollout]`):
            In the order of their prompts.
        stats (`RolloutStats`):
            How long it took.
        invalid (`list[bool]`):
            Whether each record was broken and masked out.
        unconstrained (`int`):
            Number of forced calls at level `"schema"` whose body was left free, since the schema cannot be satisfied.
        without_room (`list[bool]`):
            Whether each prompt fills the model's context, so that nothing was sampled.
        prompts, completions (`Sequence`):
            Of each rollout, the messages or the text, as reward functions get them.
        rewards ([`Rewards`], *optional*):
            Once reward functions have scored the batch.
        source (`str`, *optional*, defaults to `"transformers"`):
            What sampled it: the backend, or the class of a custom sampler.
        cache_gib (`float`, *optional*):
            The bound on keys and values that was chosen by the memory of a GPU, in GiB.
    """

    rollouts: list[Rollout]
    stats: RolloutStats
    invalid: list[bool] = field(default_factory=list)
    unconstrained: int = 0
    without_room: list[bool] = field(default_factory=list)
    prompts: Sequence[str | list[Message]] = ()
    completions: Sequence[str | list[Message]] = ()
    rewards: Rewards | None = None
    source: str = "transformers"
    cache_gib: float | None = None

    @property
    def trajectories(self) -> list[Trajectory]:
        """The trajectories, in order."""
        return [rollout.trajectory for rollout in self.rollouts]

    def holds(self, input_ids: Tensor, width: int) -> bool:
        """Return whether these are the rollouts of a batch of ids, int64, shape (B, P + `width`), padded on both
        sides."""
        rows, start = input_ids.tolist(), input_ids.size(1) - width
        return len(rows) == len(self.rollouts) and all(
            row[start - len(t.prompt_ids) : start + len(t.completion_ids)] == [*t.prompt_ids, *t.completion_ids]
            for row, t in zip(rows, self.trajectories, strict=True)
        )

    def logprobs(self, width: int, device: torch.device) -> Tensor:
        """Return recorded log-probs, nats, float32, shape (B, `width`), right-padded with 0.0."""
        return _padded([trajectory.logprobs for trajectory in self.trajectories], width).to(device)

    def attention_mask(self, width: int, device: torch.device) -> Tensor:
        """Return 1 for every token of a completion, whether or not it trains, int64, shape (B, `width`)."""
        lengths = torch.tensor([len(trajectory.completion_ids) for trajectory in self.trajectories])
        return (torch.arange(width) < lengths[:, None]).long().to(device)

    def entropies(self, width: int, device: torch.device) -> Tensor | None:
        """Return recorded entropies, nats, float32, shape (B, `width`), right-padded with 0.0; `None` if there are
        none."""
        recorded = [rollout.entropies for rollout in self.rollouts if rollout.entropies is not None]
        return _padded(recorded, width).to(device) if len(recorded) == len(self.rollouts) else None

    def mask_dropped(self, output: dict[str, Tensor], truncated: bool) -> None:
        """Zero the masks (B, T) of rollouts that take no part in the update: invalid and empty ones, and truncated
        ones if `truncated`."""
        dropped = [
            invalid or not any(trajectory.tool_mask) or (truncated and trajectory.truncated)
            for invalid, trajectory in zip(self.invalid, self.trajectories, strict=True)
        ]
        keep = ~torch.tensor(dropped, device=output["completion_mask"].device)[:, None]
        for name in ("completion_mask", "tool_mask"):
            if name in output:
                output[name] = output[name] * keep


def _padded(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    padded = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    return padded


@dataclass(eq=False)
class RolloutEngine:
    """
    Produces rollout batches.

    Args:
        args ([`ToolGRPOConfig`]):
            Limits and temperature.
        stop_ids (`Sequence[int]`):
            Tokens that end a turn.
        pad_id (`int`):
            Padding token id.
        chat (`ToolChat`, *optional*):
            Needed if rollouts have tools.
        executor (`ToolExecutor`, *optional*):
            Needed if rollouts have tools.
        force_policy (`Callable`, *optional*):
            Names the tool of a forced call; uniform by default.
        choose_cache (`Callable`, *optional*):
            Chooses the bound on keys and values where `rollout_cache_gib` is `None`, given the policy, the prompts and
            whether the default sampler samples; by default there is none.
        report (`Callable[[str], None]`, *optional*):
            Shows a line about the run.
    """

    args: ToolGRPOConfig
    stop_ids: Sequence[int]
    pad_id: int
    chat: ToolChat | None = None
    executor: ToolExecutor | None = None
    force_policy: ForcePolicy | None = None
    choose_cache: Callable[[PreTrainedModel, Sequence[Sequence[int]], bool], ChosenCache | None] | None = None
    report: Callable[[str], None] = logger.info

    def __post_init__(self) -> None:
        args = self.args
        self.redactor = Redactor()  # replaced by that of the run in the trainer
        iterations = args.max_tool_calling_iterations
        self.limits = RolloutLimits(
            max_completion_length=args.max_completion_length or 1,
            max_tool_calling_iterations=2**31 if iterations is None else iterations,
            max_tool_output_tokens=args.max_tool_output_tokens,
            parse_error_budget=args.parse_error_budget,
        )
        self.sampler: Sampler | None = None  # samples instead of the policy itself, if it is set
        self._supported: bool | None = None
        self._pads = True
        self._warned_of_border = False
        self._chosen: ChosenCache | None = None
        self._abandoned = 0
        forced = self.chat if args.force_rate > 0 else None
        self._prefixes = CallPrefixes(forced) if forced is not None else None
        constrains = args.force_level == "schema"
        self._constraints = CallConstraints(forced) if forced is not None and constrains else None

    def run(
        self,
        policy: PreTrainedModel,
        requests: Sequence[RolloutRequest],
        autocast: Autocast,
        force: bool = False,
        noise: RolloutNoise | None = None,
    ) -> RolloutBatch:
        """
        Sample every rollout to its end.

        Args:
            policy (`PreTrainedModel` or `PeftModel`):
                The unwrapped policy, its parameters gathered.
            requests (`Sequence[RolloutRequest]`):
                Prompts and tools.
            autocast (`Callable`):
                Makes the autocast context that the trainer scores under.
            force (`bool`, *optional*, defaults to `False`):
                Whether turns may be forced, at `force_rate`.
            noise ([`RolloutNoise`], *optional*):
                Makes the batch depend on nothing but the policy, the prompts, what tools return and this noise.

        Raises:
            TrajectoryError: for a broken record, unless `strict_trajectories=False`.
        """
        self.limits.max_sequence_length = context_length(policy.config) or math.inf
        longest_of_sampler = getattr(self.sampler, "max_sequence_length", None)
        if longest_of_sampler is not None:
            self.limits.max_sequence_length = min(self.limits.max_sequence_length, longest_of_sampler)
        batch = RolloutBatch([], RolloutStats(), source=self.args.rollout_backend)
        if self.sampler is not None and self.args.rollout_backend == "transformers":
            batch.source = type(self.sampler).__name__
        prompts = self._sampler_prompts(requests)
        without_room = [not self.limits.has_room(request.prompt_ids) for request in requests]
        if any(without_room):
            logger.warning(
                "%s of %s prompts have at least as many tokens as the model has positions (%s), which leaves no room "
                "for a completion. These rollouts end with stop reason `length` and take no part in the update. "
                "Shorten what the data set and the environments put into the prompt.",
                *(sum(without_room), len(requests), self.limits.max_sequence_length),
            )
        parts = self._parts_that_fit(policy, prompts, autocast)
        batch.cache_gib = None if self._chosen is None else self._chosen.bytes / 2**30
        longest = self.limits.max_sequence_length
        for start, stop, limit in self._parts_by_frequency(policy, prompts, parts):
            self.limits.max_sequence_length = min(longest, limit)
            drawn = None if noise is None else noise.after(start)
            part = self._run_part(policy, requests[start:stop], autocast, force, drawn)
            batch.rollouts += part.rollouts
            batch.stats.seconds += part.stats.seconds
            batch.stats.tool_wait_seconds += part.stats.tool_wait_seconds
        self.limits.max_sequence_length = longest
        if self.executor is not None:
            abandoned = self.executor.abandoned
            batch.stats.abandoned, self._abandoned = abandoned - self._abandoned, abandoned
        if self._constraints is not None:
            batch.unconstrained, self._constraints.unsatisfiable = self._constraints.unsatisfiable, 0
        batch.invalid = [self._is_invalid(row, rollout) for row, rollout in enumerate(batch.rollouts)]
        for trajectory in batch.trajectories:
            if not trajectory.completion_ids:  # TRL needs one token; the policy did not write it, so none trains
                trajectory.completion_ids, trajectory.logprobs = [self.pad_id], [0.0]
                trajectory.tool_mask, trajectory.forced_mask, trajectory.values = [0], [0], None
        batch.without_room = without_room
        return batch

    def _run_part(
        self,
        policy: PreTrainedModel,
        requests: Sequence[RolloutRequest],
        autocast: Autocast,
        force: bool,
        noise: RolloutNoise | None,
    ) -> RolloutBatch:
        """Sample the rollouts that are in progress together."""
        sampler = self.sampler or make_sampler(
            policy,
            self._is_supported(policy, autocast),
            pads=self._pads,
            paths=self._paths(policy),
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            temperature=self.args.temperature,
            autocast=autocast,
            noise=noise,
        )
        forcing = self._forcing(noise) if force else None
        with sampler.open(self._sampler_prompts(requests), self.limits.max_completion_length) as session:
            needed = (session, requests, self.limits, self.chat, self.executor, forcing)
            loop = RolloutLoop(*needed, in_order=noise is not None, redactor=self.redactor)
            return RolloutBatch(loop.run(), loop.stats)

    def _paths(self, policy: PreTrainedModel) -> frozenset[str]:
        """Return the faster ways of `gpu_paths` that sampling takes."""
        on_gpu = next(policy.parameters()).device.type == "cuda"
        return gpu_paths_of(self.args.gpu_paths) if on_gpu else frozenset()

    def _sampler_prompts(self, requests: Sequence[RolloutRequest]) -> list[list[int]]:
        """Return prompts as a sampler reads them: one unused token for a rollout that does not begin."""
        begins = [self.limits.has_room(request.prompt_ids) and not request.failed for request in requests]
        return [r.prompt_ids if begun else r.prompt_ids[-1:] for r, begun in zip(requests, begins, strict=True)]

    def _parts_that_fit(
        self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], autocast: Autocast
    ) -> list[tuple[int, int]]:
        """Divide rollouts into parts that fit into memory; with the first ones it is chosen how much they may take."""
        if self.sampler is not None:  # another sampler has a cache of its own
            return [(0, len(prompts))]
        supported, chosen = self._is_supported(policy, autocast), None
        if self.args.rollout_cache_gib is None and self.choose_cache is not None and self._chosen is None:
            chosen = self._chosen = self.choose_cache(policy, prompts, supported)
        parts = parts_that_fit(self.args, policy, prompts, supported, self._chosen)
        if chosen is not None:
            count = "at once" if len(parts) == 1 else f"in {len(parts)} parts"
            self.report(f"`rollout_cache_gib`: {chosen}. The first rollouts are sampled {count}.")
        return parts

    def _parts_by_frequency(
        self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], parts: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, float]]:
        """Divide parts further, into rollouts that keep the same rotary frequencies; each with the number of tokens,
        prompt included, after which the frequencies would change."""
        frequencies = RowFrequencies(policy)
        limits = [frequencies.limit(len(prompt)) for prompt in prompts]
        crossing = sum(
            len(prompt) + self.limits.max_completion_length > limit
            for prompt, limit in zip(prompts, limits, strict=True)
        )
        if crossing and not self._warned_of_border:
            self._warned_of_border = True
            logger.warning(
                "The rotary frequencies of this model (`%s`) change after %s tokens, and with them the log-probs of "
                "the tokens before: those recorded up to there are not those that the trainer computes. Rollouts "
                "that begin below that length end there, with stop reason `length`, as %s of these %s may. Shorten "
                "the prompts or lower `max_completion_length`, so that both fit into it.",
                *(frequencies.kinds, frequencies.border, crossing, len(prompts)),
            )
        for start, stop in parts:
            at = start
            for limit, rows in itertools.groupby(limits[start:stop]):
                count = len(list(rows))
                yield at, at + count, limit
                at += count

    def _forcing(self, noise: RolloutNoise | None) -> Forcing | None:
        if self._prefixes is None:
            return None
        seed = int(torch.randint(2**31, ()).item()) if noise is None else 0
        level, rate = self.args.force_level, self.args.force_rate
        return Forcing(self._prefixes, rate, level, seed, self.force_policy, self._constraints, noise)

    def _is_supported(self, policy: PreTrainedModel, autocast: Autocast = nullcontext) -> bool:
        """Return whether the default sampler can handle the policy; the answer is found once."""
        if self._supported is None:
            size = cast(nn.Embedding, policy.get_input_embeddings()).weight.shape[0]
            reason = unsupported_reason(policy, [(index * 7 + 3) % size for index in range(8)], autocast)
            self._supported = reason is None
            if reason is not None:
                logger.warning("Sampling falls back to `model.generate` for this model: %s.", reason)
                self._pads = generates_padded(policy)
                if not self._pads:
                    logger.warning(
                        "`model.generate` treats rows of a padded batch differently from each of them alone, so "
                        "rollouts are sampled one after the other, which is slow."
                    )
        return self._supported

    def _is_invalid(self, row: int, rollout: Rollout) -> bool:
        """Raise for a broken record, or without `strict_trajectories` leave nothing of it to train on."""
        try:
            if rollout.fault is not None:
                raise TrajectoryError(f"Rollout {row}: {rollout.fault}")
            rollout.trajectory.validate(row)
        except TrajectoryError as error:
            if self.args.strict_trajectories:
                raise
            logger.warning("Masked out of the update: %s", error)
            rollout.trajectory.mask_out()
            rollout.entropies = None
            return True
        return False

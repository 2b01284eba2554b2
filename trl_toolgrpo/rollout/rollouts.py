"""The rollouts of a run: tools, prompts, sampler and loop, as a rollout batch passes through them."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..chat.tool_chat import ToolChat
from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError
from ..redaction import Redactor
from ..sampling.protocol import Sampler
from ..tools.tool import Tool
from ..trl_hooks import Run
from ..types import Row
from .batch_noise import BatchNoise
from .cache_choice import choose_cache
from .engine import RolloutBatch, RolloutEngine
from .forcing import ForcePolicy
from .given_rollouts import checked_rollouts
from .prompts import RolloutPrompts
from .rewards import RewardCheck, Rewards
from .tools_of_rollouts import RolloutTools
from .vllm_rollouts import VLLMRollouts


logger = logging.getLogger(__name__)


class Rollouts:
    """
    Makes rollout batches, and holds the one in use as [`Rollouts.batch`].

    TRL's `_generate` calls in turn [`Rollouts.tokenize`], [`Rollouts.first_turn`] and, with tools,
    [`Rollouts.whole_rollouts`]; its reward functions follow. On TRL's own path (`recording=False`) the tools are here
    and all else is TRL's.

    Args:
        run ([`Run`]):
            The run, before TRL's constructor.
        tools, environment_factory, mcp_servers:
            As passed to the trainer.
        sampler ([`Sampler`], *optional*):
            Samples in place of the policy itself.
    """

    prompts: RolloutPrompts
    engine: RolloutEngine
    chat: ToolChat | None = None
    vllm: VLLMRollouts | None = None

    def __init__(
        self,
        run: Run,
        tools: list[Callable | Tool] | None,
        environment_factory: Any,
        mcp_servers: Any,
        sampler: Sampler | None = None,
    ) -> None:
        self._run, self.sampler = run, sampler
        self._loaded_at: int | None = None  # step of the policy that the sampler has; `None` if it has changed since
        self.tools = RolloutTools(run, tools, environment_factory, mcp_servers)
        self.noise = BatchNoise(run)
        self.batch: RolloutBatch | None = None
        self._reward_check = RewardCheck(run)
        self._redactor = Redactor()

    def prepare(self, force_policy: ForcePolicy | None, report: Callable[[str], None]) -> None:
        """Prepare what needs the model, which TRL's constructor has made; `report` shows a line about the run."""
        run, tools = self._run, self.tools
        if not run.recording:
            if tools.mcp is not None:
                self._make_chat()
            return
        if run.environment_factories is not None:
            tools.read_environments()
        run.standalone_tools = []  # the executor calls tools, not TRL's loop
        self.chat = self._make_chat() if run.tools else None
        pad_id = run.tokenizer.pad_token_id
        self.engine = RolloutEngine(run.args, run.eos_token_ids, pad_id, self.chat, tools.executor, force_policy)
        self.engine.sampler, self.engine.redactor = self.sampler, self._redactor
        self.engine.choose_cache, self.engine.report = partial(choose_cache, run), report
        if run.args.rollout_backend == "vllm" and run.args.replay is None:  # a replayed run samples nothing
            self.vllm = VLLMRollouts(run)
            self.engine.sampler = self.vllm.sampler

    def _make_chat(self) -> ToolChat:
        run = self._run
        chat = ToolChat(run.tokenizer, run.eos_token_ids, run.chat_template, run.chat_template_kwargs)
        self.tools.check_descriptions(chat)
        return chat

    def check_prompts(self, train_dataset: object, eval_dataset: object) -> None:
        """Check the prompts of the data sets; see [`RolloutPrompts.check`]."""
        self.prompts = RolloutPrompts(self._run, self.tools)
        self.prompts.check(train_dataset, eval_dataset)

    @property
    def redactor(self) -> Redactor:
        """Keeps secrets out of what `reset` and tools say."""
        return self._redactor

    @redactor.setter
    def redactor(self, redactor: Redactor) -> None:
        self._redactor = redactor
        if "engine" in vars(self):
            self.engine.redactor = redactor

    # A rollout batch

    @contextmanager
    def for_rows(self, rows: Sequence[Row]) -> Iterator[None]:
        """Have rollouts made of rows of the data set while open; afterwards environments and servers are free."""
        self.batch, self.prompts.rows = None, rows
        try:
            yield
        finally:
            self.prompts.rows = ()
            self.tools.take_back()

    def tokenize(self, prompts: list, trl: Callable[[list], tuple]) -> tuple:
        """Tokenize prompts; see [`RolloutPrompts.tokenize`]."""
        return self.prompts.tokenize(prompts, trl, self._redactor)

    def first_turn(self, prompt_ids: list[list[int]], force: bool) -> tuple[list[list[int]], list[list[float]] | None]:
        """
        Return the completions of TRL's first turn and their log-probs.

        With tools a rollout is one state machine, run as a whole in [`Rollouts.whole_rollouts`]; until then each has a
        token that stands for it.
        """
        if self._run.tools:
            return [[self._run.tokenizer.eos_token_id] for _ in prompt_ids], None
        trajectories = self.sample(prompt_ids, force).trajectories
        return [t.completion_ids for t in trajectories], [t.logprobs for t in trajectories]

    def whole_rollouts(self, prompt_ids: list[list[int]], force: bool) -> tuple:
        """Sample whole rollouts, and return what TRL's tool loop does: masks, messages, ids, log-probs, calls."""
        batch = self.sample(prompt_ids, force)
        trajectories = batch.trajectories
        results = [result for t in trajectories for turn in t.turns for result in turn.tool_results]
        return (
            [t.trainable_mask for t in trajectories],  # TRL's `tool_mask`: forced tokens do not train either
            [rollout.messages for rollout in batch.rollouts],
            [t.completion_ids for t in trajectories],
            [t.logprobs for t in trajectories],
            len(results),
            sum(result.is_error for result in results),
            [[] for _ in trajectories],
        )

    def sample(self, prompt_ids: list[list[int]], force: bool) -> RolloutBatch:
        """
        Sample every rollout of this process to its end; no step of it waits for another process.

        Args:
            prompt_ids (`list[list[int]]`):
                Prompts.
            force (`bool`):
                Whether turns may be forced, at `force_rate`.
        """
        run = self._run
        requests = self.tools.requests(prompt_ids)
        noise = self.noise.next_noise(len(requests))
        with run.profiled("rollout"), run.gathered_policy() as policy:
            if self.vllm is not None:
                self.vllm.send(policy)
            else:
                self._load_policy(policy)
            self.batch = self.engine.run(policy, requests, run.accelerator.autocast, force, noise)
        return self.batch

    def _load_policy(self, policy: PreTrainedModel) -> None:
        """Give a sampler of the user's the policy, if it asks for it and has not had that of this optimizer step."""
        load, version = getattr(self.sampler, "load_policy", None), self._run.state.global_step
        if load is not None and self._loaded_at != version:
            load(policy, version)
            self._loaded_at = version

    def of_rollout_func(self) -> Any:
        """Return the `rollout_func` of the run, with a check of what it returns; `None` if there is none."""
        run = self._run
        if run.rollout_func is None:
            return None
        metrics = run.metrics
        return checked_rollouts(
            run.rollout_func,
            run.args.strict_trajectories,
            lambda invalid: metrics["rollout/invalid"].append(float(invalid)),
            run.tokenizer.pad_token_id,
        )

    def add_fields(self, prompts: list, output: tuple) -> tuple:
        """Return what TRL's `_generate` returned, with the fields that reward functions get from this package."""
        self.tools.log_restarts()
        prompt_ids, *rest, extra_fields, images, tool_images = output
        if self.tools.sessions:
            extra_fields = {**extra_fields, "mcp_sessions": list(self.tools.sessions)}
        if self.batch is not None:
            self.batch.prompts, self.batch.completions = prompts, output[3]
            extra_fields = {**extra_fields, "trajectories": self.batch.trajectories}
            # A prompt longer than the model has no completion to learn from, and scoring could not read it
            longer = zip(prompt_ids, self.batch.without_room, strict=True)
            prompt_ids = [ids[-1:] if without_room else ids for ids, without_room in longer]
        return (prompt_ids, *rest, extra_fields, images, tool_images)

    def keep_rewards(self, scores: Tensor, count: int) -> Rewards:
        """
        Return the rewards of the batch, which keeps them; see [`RewardCheck.rewards`].

        Args:
            scores (`Tensor`):
                What TRL's reward functions gave, shape (N, F).
            count (`int`):
                Rollouts of this process.
        """
        rewards = self._reward_check.rewards(self.tools.without_failed(scores), count, self.tools.lost)
        if self.batch is not None:
            self.batch.rewards = rewards
        return rewards

    def policy_was_replaced(self) -> None:
        """Have the policy sent or loaded again, since it has changed without an optimizer step."""
        self._loaded_at = None
        if self.vllm is not None:
            self.vllm.policy_was_replaced()


def check_sampler(sampler: object, args: ToolGRPOConfig, unrecorded: str | None) -> None:
    """
    Check that a sampler of the user's can sample the rollouts of a run.

    Args:
        sampler ([`Sampler`] or `None`):
            What was passed to the trainer.
        args ([`ToolGRPOConfig`]):
            Configuration.
        unrecorded (`str`, *optional*):
            What makes rollouts TRL's own, for the message.

    Raises:
        ConfigError: if it is no sampler, or would not be asked, or cannot keep what the configuration promises.
    """
    if sampler is None:
        return
    if inspect.isclass(sampler):
        raise ConfigError(f"You passed the class `{sampler.__name__}` as `sampler`.", remedy="Pass an object of it.")
    name = type(sampler).__name__
    if not callable(getattr(sampler, "open", None)):
        raise ConfigError(
            f"You passed `sampler={name}`, which has no method `open(prompts, max_length)`.",
            remedy="Pass an object with the methods of `trl_toolgrpo.Sampler`.",
        )
    reasons = {
        f"{unrecorded}, whose rollouts are TRL's own": unrecorded is not None,
        f"`rollout_backend={args.rollout_backend!r}`, which is a sampler itself": args.rollout_backend == "vllm",
        "`deterministic_rollouts=True`, whose noise it does not take": args.deterministic_rollouts,
        "`force_level='schema'`, whose constraints are those of the default sampler": args.force_rate > 0
        and args.force_level == "schema",
        "`rollout_cache_gib`, which bounds the cache of the default sampler": args.rollout_cache_gib is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(
                f"You passed `sampler={name}` with {reason}.",
                remedy="Leave out one of the two.",
            )

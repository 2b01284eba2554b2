"""The prompts of a run: checked at construction, and tokenized so that what tools and environments say stays inert."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from ..chat.control_tokens import ControlTokens
from ..chat.inert_prompts import InertPrompts, with_observation
from ..chat.prompt_messages import PromptMessages
from ..chat.prompt_renderer import PromptRenderer
from ..models.model_settings import context_length
from ..redaction import Redactor
from ..tools.tool import Tool
from ..trl_hooks import Run
from ..types import Message, Row
from ..validation.chat_templates import warn_of_hidden_tools
from ..validation.data import named_datasets, prompt_rows
from ..validation.prompts import check_prompt_lengths, check_prompts
from ..validation.tool_mentions import check_tool_names, warn_of_mentions
from .tools_of_rollouts import RolloutTools


class RolloutPrompts:
    """
    The prompts of a run, from messages to token ids.

    Args:
        run ([`Run`]):
            The run, its trainer constructed.
        tools ([`RolloutTools`]):
            Its tools.
    """

    def __init__(self, run: Run, tools: RolloutTools) -> None:
        self._run, self._tools = run, tools
        tools.show_in_prompts(self._renderer_of)
        self.renderer = self._renderer_of([tools.toolset.shown(tool) for tool in tools.toolset.known])
        takes_text, is_processor = self.renderer.takes_arguments_as_text(), self.renderer.is_processor
        self.messages = PromptMessages(takes_text, joins_text=not is_processor)
        self._inert: InertPrompts | None = None
        if run.recording:
            self._inert = InertPrompts(ControlTokens(run.tokenizer, run.eos_token_ids), self.renderer)
        self.rows: Sequence[Row] = ()  # of the data set, whose rollouts are made

    def _renderer_of(self, tools: Iterable[Tool]) -> PromptRenderer:
        """Return what renders prompts with some tools."""
        run = self._run
        schemas = [tool.schema for tool in tools]
        return PromptRenderer(run.processing_class, schemas, run.chat_template, run.chat_template_kwargs)

    def check(self, train_dataset: object, eval_dataset: object) -> None:
        """Check that prompts show the tools and their own messages, name only tools that exist, and fit the model."""
        toolset, mode = self._tools.toolset, self._run.args.tool_mention_check
        suspicious: dict[str, str] = {}
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            rows = prompt_rows(dataset)
            if name == "train_dataset" and not toolset.decided_at_reset:
                warn_of_hidden_tools(self.renderer, toolset.known, rows)
            if not toolset.decided_at_reset:
                suspicious = check_tool_names(name, dataset, rows, toolset.known, mode) | suspicious
            if self._run.rollout_func is None:  # which renders prompts by itself
                self._check_dataset(name, rows)
        if self._run.is_main_process:
            warn_of_mentions(suspicious)

    def _check_dataset(self, name: str, rows: Sequence[Row]) -> None:
        tools = {tool.name: tool for tool in self._tools.toolset.known}
        prompts = [(number, row["prompt"]) for number, row in enumerate(rows) if "prompt" in row]
        check_prompts(name, prompts, self.messages, self.renderer, tools)
        args = self._run.args
        positions = context_length(self._run.model.config)
        if positions is not None and args.use_vllm and args.vllm_max_model_length is not None:
            positions = min(positions, args.vllm_max_model_length)
        if positions is not None and not self.renderer.is_processor:  # images take positions, too
            rewritten = partial(self.messages.rewritten, tools=tools)
            check_prompt_lengths(name, prompts, self.renderer, positions, args.max_completion_length or 1, rewritten)

    def tokenize(self, prompts: list, trl: Callable[[list], tuple], redactor: Redactor) -> tuple:
        """
        Tokenize prompts as TRL does, each with the tools of its own environment, from messages that the chat template
        can read. What a tool or the `reset` of an environment says does not become a control token, and what `reset`
        says does not repeat a secret.

        Args:
            prompts (`list`):
                Texts or lists of messages.
            trl (`Callable`):
                TRL's method.
            redactor ([`Redactor`]):
                That of the run.
        """
        toolset, environments = self._tools.toolset, self._run.environments
        known = {tool.name: tool for tool in toolset.known}
        rewritten, inert = [], []
        with self._tools_of_each(len(prompts)):
            for row, prompt in enumerate(prompts):
                if environments:
                    prompt = with_observation(self._row_prompt(row), prompt, redactor.text)
                tools = known
                if environments and toolset.decided_at_reset and _calls_tools(prompt):
                    tools = self._tools.tools_of(environments[row], toolset.of_rollout)[0]
                rewritten.append(self.messages.rewritten(prompt, tools))
                inert.append(self._inert_prompt(row, tools, prompt))
            prompt_ids, *rest = trl(rewritten)
        return [ids if own is None else own for own, ids in zip(inert, prompt_ids, strict=True)], *rest

    @contextmanager
    def _tools_of_each(self, count: int) -> Iterator[None]:
        """Have TRL render each prompt with the tools of its own environment, where environments bring some."""
        run, toolset = self._run, self._tools.toolset
        if not run.recording or run.environments is None or not toolset.decided_at_reset:
            yield
            return
        kept = run.environment_of_rows, run.tools_of_environments
        run.tools_of_environments = {
            row: self._tools.tools_of(e, toolset.prompt_tools) for row, e in enumerate(run.environments)
        }  # by row, for these prompts alone
        run.environment_of_rows = list(range(count))
        try:
            yield
        finally:
            run.environment_of_rows, run.tools_of_environments = kept

    def _inert_prompt(self, row: int, tools: dict[str, Tool], prompt: str | list[Message]) -> list[int] | None:
        """Return a prompt's tokens if tools or its `reset` say what TRL would take for control tokens, else `None`."""
        run = self._run
        if self._inert is None or not isinstance(prompt, list):
            return None
        schemas = run.tools
        if run.environment_factories is not None:
            schemas = run.tools_of_environments[run.environment_of_rows[row]]
        marked = with_observation(self._row_prompt(row), prompt, self._inert.mark) if run.environments else prompt
        return self._inert.encode(self.messages.rewritten(marked, tools), self._inert.schemas(schemas or ()))

    def _row_prompt(self, row: int) -> str | list[Message] | None:
        """Return the prompt of a row of the data set, before its environment was reset."""
        return self.rows[row].get("prompt") if row < len(self.rows) else None


def _calls_tools(prompt: str | list[Message]) -> bool:
    return isinstance(prompt, list) and any(message.get("tool_calls") for message in prompt)

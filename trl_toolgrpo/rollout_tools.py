"""The tools of a run and of each rollout: those passed, those of environments, those of MCP servers.

Owns, as a mixin of the trainer, how MCP servers join the tools of a run, are lent to rollouts and are shown to reward
functions, and how environments are read; the servers themselves are in `tools/mcp.py`.
"""

import contextlib
import inspect
import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
)

from .config import ToolGRPOConfig
from .data_checks import named_datasets, prompt_rows
from .errors import ConfigError, EnvironmentTimeoutError, ToolSchemaError
from .inert_prompts import InertPrompts, with_observation
from .prompt_checks import PromptRenderer, check_prompt_lengths, check_prompts
from .redaction import Redactor
from .rollout.chat import ToolChat
from .rollout.context_length import context_length
from .rollout.control_tokens import ControlTokens
from .rollout.loop import RolloutRequest
from .rollout.prompt_messages import PromptMessages
from .rollout.response_templates import without_comments
from .template_checks import shown_tool, warn_of_hidden_tools
from .tool_mentions import check_tool_names, warn_of_mentions
from .tools.environments import EnvironmentFailures, scoring_plain_instances, scoring_without_failed
from .tools.execute import ToolExecutor
from .tools.mcp import MCPTools
from .tools.mcp_config import MCPServer, read_servers
from .tools.mcp_session import MCPSession
from .tools.prompt import PromptTool
from .tools.toolset import ToolSet
from .tools.types import Tool


T = TypeVar("T")

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
_TOOL_OF_RESET = Tool("tool", "Known once the environment is reset.", _NO_ARGUMENTS, lambda: None)


class RolloutTools(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]; see its arguments `tools`, `environment_factory` and `mcp_servers`."""

    args: ToolGRPOConfig
    model: Any
    processing_class: Any
    _recording: bool
    _toolset: ToolSet
    _executor: ToolExecutor | None
    _environment_failures: EnvironmentFailures
    _messages: PromptMessages
    _renderer: PromptRenderer
    _mcp: MCPTools | None = None
    _sessions: Sequence[MCPSession] = ()
    _redactor: Redactor
    _inert: InertPrompts | None = None
    _rows: Sequence[dict[str, Any]] = ()  # of the data set, whose rollouts are made
    _lost: Tensor | None = None  # rollouts of all processes whose environment failed or hangs, bool, shape (N,)

    def _start_servers(self, mcp_servers: Any, tools: Any, environment_factory: Any) -> Any:
        """Start the MCP servers; the run's tools, theirs included."""
        servers = read_servers(mcp_servers)
        if not servers:
            return tools
        self._refuse_own_servers(servers)
        taken = {tool.name for tool in ToolSet(tools).own} | _method_names(environment_factory)
        self._mcp = MCPTools(servers, taken)
        weakref.finalize(self, self._mcp.close)
        return [*(tools or []), *self._mcp.tools]

    def _refuse_own_servers(self, servers: Iterable[MCPServer]) -> None:
        for server in servers:
            if server.per_rollout and not self._recording:
                raise ConfigError(
                    f"You passed the MCP server {server.name!r} with `per_rollout=True` and rollouts of TRL's own "
                    f"(`rollout_func`, `record_sample_logprobs=False` or a multimodal model), whose tools do "
                    f"not know the rollout they are called by. Share the server, or leave the rollouts to this "
                    f"trainer."
                )

    def _check_prompts(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Check that prompts show the tools and their own messages, name only tools that exist, and fit the model."""
        self._refuse_own_servers(self._mcp.servers.values() if self._mcp is not None else ())
        kwargs: Any = self.chat_template_kwargs
        template = self.chat_template
        self._show_tools(template, kwargs)
        shown = [self._toolset.shown(tool) for tool in self._toolset.known]
        renderer = PromptRenderer(self.processing_class, [tool.schema for tool in shown], template, kwargs)
        self._renderer = renderer
        if self._recording:
            self._inert = InertPrompts(ControlTokens(self._tokenizer, self.eos_token_ids), renderer)
        self._messages = PromptMessages(renderer.takes_arguments_as_text(), joins_text=not renderer.is_processor)
        suspicious: dict[str, str] = {}
        mode = self.args.tool_mention_check
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            rows = prompt_rows(dataset)
            if name == "train_dataset" and not self._toolset.decided_at_reset:
                warn_of_hidden_tools(renderer, self._toolset.known, rows)
            if not self._toolset.decided_at_reset:
                suspicious = check_tool_names(name, dataset, rows, self._toolset.known, mode) | suspicious
            if self.rollout_func is None:  # which renders prompts by itself
                self._check_dataset_prompts(name, rows, renderer)
        if self.accelerator.is_main_process:
            warn_of_mentions(suspicious)

    def _show_tools(self, template: str | None, kwargs: Any) -> None:
        """Check that the template shows each tool, in other words where it does not know those of the schema."""
        found: dict[str, Tool] = {}
        renderer = PromptRenderer(self.processing_class, (), template, kwargs)

        def shown(tool: Tool) -> Tool:
            key = json.dumps(tool.schema)
            if key not in found:
                found[key] = shown_tool(renderer, tool)
            parameters = found[key].parameters
            return tool if parameters == tool.parameters else replace(tool, parameters=parameters)

        pairs = [(tool, shown(tool)) for tool in self._toolset.known]
        rewritten = {tool.name: plain for tool, plain in pairs if plain != tool}
        self._toolset.shown = shown
        if not rewritten:
            return

        def prompt_tools(tools: list[Any]) -> list[Any]:
            return [PromptTool(rewritten[t.__name__]) if t.__name__ in rewritten else t for t in tools]

        self.tools = prompt_tools(self.tools)
        if self.environment_factories is not None:
            self._env_tools = {name: prompt_tools(tools) for name, tools in self._env_tools.items()}

    def _check_dataset_prompts(self, name: str, rows: Sequence[dict[str, Any]], renderer: PromptRenderer) -> None:
        tools = {tool.name: tool for tool in self._toolset.known}
        prompts = [(number, row["prompt"]) for number, row in enumerate(rows) if "prompt" in row]
        check_prompts(name, prompts, self._messages, renderer, tools)
        args: Any = self.args
        positions = context_length(self.model.config)
        if positions is not None and args.use_vllm and args.vllm_max_model_length is not None:
            positions = min(positions, args.vllm_max_model_length)
        if positions is not None and not renderer.is_processor:  # images take positions, too

            def rewritten(prompt: Any) -> Any:
                return self._messages.rewritten(prompt, tools)

            check_prompt_lengths(name, prompts, renderer, positions, args.max_completion_length or 1, rewritten)

    def _tokenize_prompts(self, prompts: list) -> Any:
        """
        TRL's rendering of prompts, of messages that the chat template can read. What a tool or the `reset` of an
        environment says becomes no control token, and what `reset` says repeats no secret.
        """
        known = {tool.name: tool for tool in self._toolset.known}
        rewritten, shown = [], []
        for row, prompt in enumerate(prompts):
            if self.environments:
                prompt = with_observation(self._given(row), prompt, self._redactor.text)
            tools = known
            if self.environments and self._toolset.decided_at_reset and _calls_tools(prompt):
                tools = self._tools_of(self.environments[row], self._toolset.of_rollout)[0]
            rewritten.append(self._messages.rewritten(prompt, tools))
            shown.append((tools, prompt))
        found = super()._tokenize_prompts(rewritten)
        if self._inert is None:
            return found
        prompt_ids, *rest = found
        inert = [self._inert_prompt(row, *asked) for row, asked in enumerate(shown)]
        return [ids if own is None else own for own, ids in zip(inert, prompt_ids, strict=True)], *rest

    def _inert_prompt(self, row: int, tools: dict[str, Tool], prompt: Any) -> list[int] | None:
        """Tokens of a prompt where tools or its environment's `reset` say what TRL would take for control tokens."""
        if self._inert is None or not isinstance(prompt, list):
            return None
        schemas = self.tools if self.environment_factories is None else self._env_tools[self._batch_environments[row]]
        marked = with_observation(self._given(row), prompt, self._inert.mark) if self.environments else prompt
        return self._inert.encode(self._messages.rewritten(marked, tools), self._inert.schemas(schemas or ()))

    def _given(self, row: int) -> Any:
        """The prompt of a row of the data set, before its environment was reset."""
        return self._rows[row].get("prompt") if row < len(self._rows) else None

    def _make_chat(self) -> ToolChat:
        """
        The conversation's tokens. Prompts are no tool output: what a server says of its tools is rendered as it is, so
        it must be harmless.
        """
        kwargs: Any = self.chat_template_kwargs
        chat = ToolChat(self._tokenizer, self.eos_token_ids, self.chat_template, kwargs)
        for tool in self._mcp.tools if self._mcp is not None else ():
            pieces = chat.pieces(json.dumps(tool.schema, ensure_ascii=False))
            found = {chat.tokenizer.convert_ids_to_tokens(piece) for piece in pieces if isinstance(piece, int)}
            if found:
                raise ToolSchemaError(
                    f"An MCP server describes its tool {tool.name!r} with control tokens of the model "
                    f"({', '.join(sorted(found))}), which would forge every prompt that shows it. Leave the tool out "
                    f"(`tools: [...]` of the server names those you want), or do not use the server."
                )
        return chat

    def _lend_servers(self, requests: list[RolloutRequest]) -> list[RolloutRequest]:
        """Rollouts with the MCP servers that are their own."""
        if self._mcp is None:
            return requests
        self._mcp.prepare(len(requests))
        self._sessions = [self._mcp.session() for _ in requests]
        lent = []
        for request, session in zip(requests, self._sessions, strict=True):
            tools, own = self._mcp.of_rollout(request.tools, session)
            if own:  # with an environment, the calls of both are in one order
                owner = session if request.environment is None else request.environment
                request = replace(request, tools=tools, environment=owner, owned=request.owned | own)
            lent.append(request)
        return lent

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        if self._mcp is None:
            return output
        metrics = self._metrics["train" if self.model.training else "eval"]
        restarts = gather_object([self._mcp.restarts()])
        for name in self._mcp.servers:
            metrics[f"tools/mcp/{name.replace('/', '_')}/restarts"].append(float(sum(part[name] for part in restarts)))
        if not self._sessions:
            return output
        *rest, extra_fields, images, tool_images = output
        return (*rest, {**extra_fields, "mcp_sessions": list(self._sessions)}, images, tool_images)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._rows = ()
            self._drop_lost_environments()
            if self._mcp is not None:  # made ready for the next rollouts during the update
                self._mcp.take_back(self._sessions)
                self._sessions = ()

    # Environments

    def _score_without_failed(self) -> None:
        """Let reward functions score only rollouts whose environment has not failed."""
        if self.environment_factories is not None:
            failures = self._environment_failures
            self.reward_funcs = [
                f if isinstance(f, nn.Module) else scoring_without_failed(scoring_plain_instances(f), failures)
                for f in self.reward_funcs
            ]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's rewards; a rollout whose environment failed has none, whatever a model would give its text."""
        rewards = super()._calculate_rewards(*args, **kwargs)
        if not self.environments:
            return rewards
        failures = self._environment_failures
        found = [[failures.includes(environment), self._is_lost(environment)] for environment in self.environments]
        failed, self._lost = self.accelerator.gather(torch.tensor(found, device=rewards.device)).unbind(dim=1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["environments/failures"].append(float(failed.sum()))
        return rewards.masked_fill(failed[:, None], torch.nan)

    def _tools_of(self, environment: Any, read: Callable[..., T]) -> T:
        """What is read of the tools of a rollout; of one whose environment failed, only those the trainer got."""
        if environment is not None and not self._environment_failures.includes(environment):
            with contextlib.suppress(EnvironmentTimeoutError):
                return read(environment)
        return read()

    def _read_environments(self) -> None:
        """Hold the methods of environments as schemas too, and prepare for tools that only a reset one knows."""
        had_tools = bool(self.tools)
        self._env_tools = self._toolset.add_environments({n: pool[0] for n, pool in self._environment_pool.items()})
        self.tools: list[Any] = [PromptTool(tool) for tool in self._toolset.known]
        if had_tools or not self._toolset.decided_at_reset:
            return
        self.tools = [PromptTool(_TOOL_OF_RESET)]
        with without_comments(self.processing_class):
            if getattr(self._tokenizer, "response_template", None) is None:
                add_response_schema(self.processing_class)
            if not is_chat_template_prefix_preserving(self.processing_class):
                self.chat_template = get_training_chat_template(self.processing_class)

    def _drop_lost_environments(self) -> None:
        """Environments that failed, or whose thread hangs, are not handed out again, and nothing is kept of them."""
        if self.environments:
            for name, pool in self._environment_pool.items():
                lost = [environment for environment in pool if self._is_lost(environment)]
                self._environment_pool[name] = [e for e in pool if not any(e is other for other in lost)]
                for environment in lost if self._executor is not None else ():
                    self._executor.release(environment)
            self._environment_failures.of_batch.clear()

    def _is_lost(self, environment: Any) -> bool:
        hangs = self._executor is not None and self._executor.is_abandoned(environment)
        return hangs or self._environment_failures.includes(environment)


def _calls_tools(prompt: Any) -> bool:
    return isinstance(prompt, list) and any(message.get("tool_calls") for message in prompt)


def _method_names(environment_factory: Any) -> set[str]:
    """Names that the tools of environments will have, as far as their classes tell."""
    factories = environment_factory.values() if isinstance(environment_factory, dict) else [environment_factory]
    classes = [factory for factory in factories if inspect.isclass(factory)]
    return {name for kind in classes for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}

"""The tools of a run and of each rollout: those passed, those of environments, and those of MCP servers.

A mixin for the trainer: how MCP servers join the tools of a run, are lent to rollouts and shown to reward functions,
and how environments are read. The servers themselves are in `tools/mcp/`.
"""

import contextlib
import inspect
import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.chat_template_utils import add_response_schema, get_training_chat_template, is_chat_template_prefix_preserving

from ..chat.control_tokens import ControlTokens
from ..chat.inert_prompts import InertPrompts, with_observation
from ..chat.prompt_messages import PromptMessages
from ..chat.prompt_renderer import PromptRenderer
from ..chat.response_templates import without_comments
from ..chat.tool_chat import ToolChat
from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError, EnvironmentTimeoutError, ToolSchemaError
from ..models.model_settings import context_length
from ..redaction import Redactor
from ..tools.mcp.config import MCPServer, read_servers
from ..tools.mcp.servers import MCPTools
from ..tools.mcp.session import MCPSession
from ..tools.prompt_tool import PromptTool
from ..tools.runtime.environments import EnvironmentFailures, scoring_without_failed
from ..tools.runtime.executor import ToolExecutor
from ..tools.tool import Tool
from ..tools.toolset import ToolSet
from ..types import Batch, JSONSchema, Message, Row
from ..validation.chat_templates import shown_tool, warn_of_hidden_tools
from ..validation.data import named_datasets, prompt_rows
from ..validation.prompts import check_prompt_lengths, check_prompts
from ..validation.tool_mentions import check_tool_names, warn_of_mentions
from .loop import RolloutRequest


T = TypeVar("T")

_NO_ARGUMENTS: JSONSchema = {"type": "object", "properties": {}}
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
    _rows: Sequence[Row] = ()  # of the data set, whose rollouts are made
    _lost: Tensor | None = None  # rollouts of all processes whose environment failed or hangs, bool, shape (N,)

    def _start_servers(
        self, mcp_servers: Iterable[object] | None, tools: list[Callable | Tool] | None, environment_factory: object
    ) -> list[Callable | Tool] | None:
        """Start the MCP servers; return the run's tools, including theirs."""
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
                    f"(`rollout_func`, `record_sample_logprobs=False` or a multimodal model), whose tools do not know "
                    f"the rollout they are called by.",
                    remedy="Share the server, or leave the rollouts to this trainer.",
                )

    def _check_prompts(self, train_dataset: object, eval_dataset: object) -> None:
        """Check that prompts show the tools and their own messages, name only tools that exist, and fit the model."""
        self._refuse_own_servers(self._mcp.servers.values() if self._mcp is not None else ())
        self._show_tools()
        renderer = self._renderer = self._renderer_of([self._toolset.shown(tool) for tool in self._toolset.known])
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

    def _renderer_of(self, tools: Iterable[Tool]) -> PromptRenderer:
        """Return what renders prompts with some tools."""
        kwargs: Any = self.chat_template_kwargs
        return PromptRenderer(self.processing_class, [tool.schema for tool in tools], self.chat_template, kwargs)

    def _show_tools(self) -> None:
        """Check that the template shows each tool, and reword a schema that it cannot show as it is."""
        found: dict[str, Tool] = {}
        renderer = self._renderer_of(())

        def shown(tool: Tool) -> Tool:
            key = json.dumps(tool.schema)
            if key not in found:
                found[key] = shown_tool(renderer, tool)
            parameters = found[key].parameters
            return tool if parameters == tool.parameters else replace(tool, parameters=parameters)

        self._toolset.shown = shown
        rewritten = {tool.name: PromptTool(plain) for tool in self._toolset.known if (plain := shown(tool)) != tool}
        self.tools = [rewritten.get(tool.__name__, tool) for tool in self.tools]
        if self.environment_factories is not None:
            for name, tools in self._env_tools.items():
                self._env_tools[name] = [rewritten.get(tool.__name__, tool) for tool in tools]

    def _check_dataset_prompts(self, name: str, rows: Sequence[Row], renderer: PromptRenderer) -> None:
        tools = {tool.name: tool for tool in self._toolset.known}
        prompts = [(number, row["prompt"]) for number, row in enumerate(rows) if "prompt" in row]
        check_prompts(name, prompts, self._messages, renderer, tools)
        args = self.args
        positions = context_length(self.model.config)
        if positions is not None and args.use_vllm and args.vllm_max_model_length is not None:
            positions = min(positions, args.vllm_max_model_length)
        if positions is not None and not renderer.is_processor:  # images take positions, too
            rewritten = partial(self._messages.rewritten, tools=tools)
            check_prompt_lengths(name, prompts, renderer, positions, args.max_completion_length or 1, rewritten)

    def _tokenize_prompts(self, prompts: list) -> tuple:
        """
        Tokenize prompts as TRL does, from messages that the chat template can read. What a tool or the `reset` of an
        environment says does not become a control token, and what `reset` says does not repeat a secret.
        """
        known = {tool.name: tool for tool in self._toolset.known}
        rewritten, inert = [], []
        for row, prompt in enumerate(prompts):
            if self.environments:
                prompt = with_observation(self._row_prompt(row), prompt, self._redactor.text)
            tools = known
            if self.environments and self._toolset.decided_at_reset and _calls_tools(prompt):
                tools = self._tools_of(self.environments[row], self._toolset.of_rollout)[0]
            rewritten.append(self._messages.rewritten(prompt, tools))
            inert.append(self._inert_prompt(row, tools, prompt))
        prompt_ids, *rest = super()._tokenize_prompts(rewritten)
        return [ids if own is None else own for own, ids in zip(inert, prompt_ids, strict=True)], *rest

    def _inert_prompt(self, row: int, tools: dict[str, Tool], prompt: str | list[Message]) -> list[int] | None:
        """Return a prompt's tokens if tools or its `reset` say what TRL would take for control tokens, else `None`."""
        if self._inert is None or not isinstance(prompt, list):
            return None
        schemas: Any = self.tools
        if self.environment_factories is not None:
            schemas = self._env_tools[self._batch_environments[row]]
        marked = with_observation(self._row_prompt(row), prompt, self._inert.mark) if self.environments else prompt
        return self._inert.encode(self._messages.rewritten(marked, tools), self._inert.schemas(schemas or ()))

    def _row_prompt(self, row: int) -> str | list[Message] | None:
        """Return the prompt of a row of the data set, before its environment was reset."""
        return self._rows[row].get("prompt") if row < len(self._rows) else None

    def _make_chat(self) -> ToolChat:
        """
        Make what turns a conversation into tokens. A prompt is not tool output: what a server says about its tools
        is rendered as it is, so it must be harmless.
        """
        kwargs: Any = self.chat_template_kwargs
        chat = ToolChat(self._tokenizer, self.eos_token_ids, self.chat_template, kwargs)
        for tool in self._mcp.tools if self._mcp is not None else ():
            pieces = chat.pieces(json.dumps(tool.schema, ensure_ascii=False))
            found = {chat.tokenizer.convert_ids_to_tokens(piece) for piece in pieces if isinstance(piece, int)}
            if found:
                raise ToolSchemaError(
                    f"An MCP server describes its tool {tool.name!r} with control tokens of the model "
                    f"({', '.join(sorted(found))}), which would forge every prompt that shows it.",
                    remedy="Leave the tool out (`tools: [...]` of the server names those you want), or do not use the "
                    "server.",
                )
        return chat

    def _lend_servers(self, requests: list[RolloutRequest]) -> list[RolloutRequest]:
        """Return the rollouts with MCP servers of their own."""
        if self._mcp is None:
            return requests
        self._mcp.prepare(len(requests))
        self._sessions = [self._mcp.session() for _ in requests]
        lent = []
        for request, session in zip(requests, self._sessions, strict=True):
            tools, own = self._mcp.of_rollout(request.tools, session)
            if own:  # the calls of these servers and of the environment keep one order
                owner = session if request.environment is None else request.environment
                request = replace(request, tools=tools, environment=owner, owned=request.owned | own)
            lent.append(request)
        return lent

    def _generate(self, prompts: list) -> tuple:
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

    def _generate_and_score_completions(self, inputs: list[Row]) -> Batch:
        self._rows = inputs
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._rows = ()
            self._drop_lost_environments()
            if self._mcp is not None:  # servers are made ready for the next rollouts during the update
                self._mcp.take_back(self._sessions)
                self._sessions = ()

    def _score_without_failed(self) -> None:
        """Let reward functions score only rollouts whose environment has not failed."""
        if self.environment_factories is not None:
            failures = self._environment_failures
            self.reward_funcs = [
                f if isinstance(f, nn.Module) else scoring_without_failed(f, failures)
                for f in self.reward_funcs
            ]

    def _calculate_rewards(self, inputs: list[Row], *args: list) -> Tensor:
        """Return TRL's rewards, with none for a rollout whose environment failed, even if a model scores its text."""
        rewards = super()._calculate_rewards(inputs, *args)
        if not self.environments:
            return rewards
        failures = self._environment_failures
        found = [[failures.includes(environment), self._is_lost(environment)] for environment in self.environments]
        failed, self._lost = self.accelerator.gather(torch.tensor(found, device=rewards.device)).unbind(dim=1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["environments/failures"].append(float(failed.sum()))
        return rewards.masked_fill(failed[:, None], torch.nan)

    def _tools_of(self, environment: object, read: Callable[..., T]) -> T:
        """Read the tools of a rollout; where its environment failed, only those passed to the trainer."""
        if environment is not None and not self._environment_failures.includes(environment):
            with contextlib.suppress(EnvironmentTimeoutError):
                return read(environment)
        return read()

    def _read_environments(self) -> None:
        """Add the methods of environments to the tools, and prepare for tools that are known only after a reset."""
        had_tools = bool(self.tools)
        self._env_tools = self._toolset.add_environments({n: pool[0] for n, pool in self._environment_pool.items()})
        self.tools = [PromptTool(tool) for tool in self._toolset.known]
        if had_tools or not self._toolset.decided_at_reset:
            return
        self.tools = [PromptTool(_TOOL_OF_RESET)]
        with without_comments(self.processing_class):
            if getattr(self._tokenizer, "response_template", None) is None:
                add_response_schema(self.processing_class)
            if not is_chat_template_prefix_preserving(self.processing_class):
                self.chat_template = get_training_chat_template(self.processing_class)

    def _drop_lost_environments(self) -> None:
        """Drop environments that failed or whose thread hangs, so that they are not handed out again."""
        if self.environments:
            for name, pool in self._environment_pool.items():
                lost = [environment for environment in pool if self._is_lost(environment)]
                self._environment_pool[name] = [e for e in pool if not any(e is other for other in lost)]
                for environment in lost if self._executor is not None else ():
                    self._executor.release(environment)
            self._environment_failures.of_batch.clear()

    def _is_lost(self, environment: object) -> bool:
        hangs = self._executor is not None and self._executor.is_abandoned(environment)
        return hangs or self._environment_failures.includes(environment)


def _calls_tools(prompt: str | list[Message]) -> bool:
    return isinstance(prompt, list) and any(message.get("tool_calls") for message in prompt)


def _method_names(environment_factory: object) -> set[str]:
    """Return the names that the tools of environments will have, as far as their classes tell."""
    factories = environment_factory.values() if isinstance(environment_factory, dict) else [environment_factory]
    classes = [factory for factory in factories if inspect.isclass(factory)]
    return {name for kind in classes for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}

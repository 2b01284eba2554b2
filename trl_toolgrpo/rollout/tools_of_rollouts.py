"""The tools of a run and of each rollout: those passed, those of environments, and those of MCP servers.

How MCP servers join the tools of a run, are lent to rollouts and shown to reward functions, and how environments are
read. The servers themselves are in `tools/mcp/`.
"""

import contextlib
import inspect
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl.chat_template_utils import add_response_schema, get_training_chat_template, is_chat_template_prefix_preserving

from ..chat.prompt_renderer import PromptRenderer
from ..chat.response_templates import without_comments
from ..chat.tool_chat import ToolChat
from ..errors import ConfigError, EnvironmentTimeoutError, ToolSchemaError
from ..tools.mcp.config import MCPServer, read_servers
from ..tools.mcp.servers import MCPTools
from ..tools.mcp.session import MCPSession
from ..tools.prompt_tool import PromptTool
from ..tools.runtime.environments import EnvironmentFailures, on_own_thread, scoring_without_failed
from ..tools.runtime.executor import ToolExecutor
from ..tools.tool import Tool
from ..tools.toolset import ToolSet
from ..trl_hooks import Run
from ..types import JSONSchema
from ..validation.chat_templates import shown_tool
from .loop import RolloutRequest


T = TypeVar("T")

_NO_ARGUMENTS: JSONSchema = {"type": "object", "properties": {}}
_TOOL_OF_RESET = Tool("tool", "Known once the environment is reset.", _NO_ARGUMENTS, lambda: None)


class RolloutTools:
    """
    The tools of a run, and what calls them.

    MCP servers are started now, before TRL's constructor, which gets [`RolloutTools.for_trl`] and
    [`RolloutTools.environment_factory`].

    Args:
        run ([`Run`]):
            The run.
        tools (`list[Callable | Tool]`, *optional*), environment_factory, mcp_servers:
            As passed to the trainer.

    Raises:
        ConfigError, ToolSchemaError, ToolNameError, MCPServerError: for tools and servers that cannot be used.
    """

    def __init__(
        self,
        run: Run,
        tools: list[Callable | Tool] | None,
        environment_factory: Any,
        mcp_servers: Iterable[object] | None,
    ) -> None:
        self._run, args = run, run.args
        self.mcp: MCPTools | None = None
        self.sessions: Sequence[MCPSession] = ()  # those lent to the rollouts in progress
        self.lost: Tensor | None = None  # rollouts of all processes whose environment failed or hangs, bool, (N,)
        tools = self._start_servers(mcp_servers, tools, environment_factory)
        self.toolset = ToolSet(tools)
        self.executor: ToolExecutor | None = None
        # More than a group, so that no single prompt can stop the run
        self._failures = EnvironmentFailures(max(8, (args.num_generations or 0) + 1))
        if run.recording or environment_factory is not None:
            # Not on TRL's event loop: a tool that blocks it or ends its thread would stop the reward functions, too
            warm = self.toolset.own if run.recording else []
            limits = args.max_concurrent_tools, args.tool_timeout, args.tool_retries
            self.executor = ToolExecutor(*limits, warm=warm, environment_timeout=args.environment_timeout)
            weakref.finalize(self, self.executor.shutdown)
            environment_factory = on_own_thread(environment_factory, self.executor, self._failures, run.recording)
        self.environment_factory = environment_factory
        self.for_trl: list[Callable] = [
            PromptTool(tool) if isinstance(tool, Tool) else tool for tool in tools or []
        ]
        if run.recording:
            self.for_trl = list(self.toolset.prompt_tools())
        self.has_tools = bool(tools) or environment_factory is not None

    # Construction

    def _start_servers(
        self, mcp_servers: Iterable[object] | None, tools: list[Callable | Tool] | None, environment_factory: object
    ) -> list[Callable | Tool] | None:
        """Start the MCP servers; return the run's tools, including theirs."""
        servers = read_servers(mcp_servers)
        if not servers:
            return tools
        self._refuse_own_servers(servers)
        taken = {tool.name for tool in ToolSet(tools).own} | _method_names(environment_factory)
        self.mcp = MCPTools(servers, taken)
        weakref.finalize(self, self.mcp.close)
        return [*(tools or []), *self.mcp.tools]

    def _refuse_own_servers(self, servers: Iterable[MCPServer]) -> None:
        for server in servers:
            if server.per_rollout and not self._run.recording:
                raise ConfigError(
                    f"You passed the MCP server {server.name!r} with `per_rollout=True` and rollouts of TRL's own "
                    f"(`rollout_func`, `record_sample_logprobs=False` or a multimodal model), whose tools do not know "
                    f"the rollout they are called by.",
                    remedy="Share the server, or leave the rollouts to this trainer.",
                )

    @property
    def servers(self) -> dict[str, MCPServer]:
        """The MCP servers of the run, by name."""
        return self.mcp.servers if self.mcp is not None else {}

    def read_environments(self) -> None:
        """Add the methods of environments to the tools, and prepare for tools that are known only after a reset."""
        run = self._run
        had_tools = bool(run.tools)
        first = {name: pool[0] for name, pool in run.environment_pool.items()}
        run.tools_of_environments = self.toolset.add_environments(first)
        run.tools = [PromptTool(tool) for tool in self.toolset.known]
        if had_tools or not self.toolset.decided_at_reset:
            return
        run.tools = [PromptTool(_TOOL_OF_RESET)]
        with without_comments(run.processing_class):
            if getattr(run.tokenizer, "response_template", None) is None:
                add_response_schema(run.processing_class)
            if not is_chat_template_prefix_preserving(run.processing_class):
                run.chat_template = get_training_chat_template(run.processing_class)

    def show_in_prompts(self, renderer_of: Callable[[Iterable[Tool]], PromptRenderer]) -> None:
        """Check that the template shows each tool, and reword a schema that it cannot show as it is."""
        self._refuse_own_servers(self.servers.values())
        run, found = self._run, dict[str, Tool]()
        renderer = renderer_of(())

        def shown(tool: Tool) -> Tool:
            key = json.dumps(tool.schema)
            if key not in found:
                found[key] = shown_tool(renderer, tool)
            parameters = found[key].parameters
            return tool if parameters == tool.parameters else replace(tool, parameters=parameters)

        self.toolset.shown = shown
        rewritten = {tool.name: PromptTool(plain) for tool in self.toolset.known if (plain := shown(tool)) != tool}
        run.tools = [rewritten.get(tool.__name__, tool) for tool in run.tools]
        if run.environment_factories is not None:
            for name, tools in run.tools_of_environments.items():
                run.tools_of_environments[name] = [rewritten.get(tool.__name__, tool) for tool in tools]

    def check_descriptions(self, chat: ToolChat) -> None:
        """
        Check that what servers say of their tools holds no control token: a prompt is not tool output, and renders it
        as it is.

        Raises:
            ToolSchemaError: naming the tool and the tokens.
        """
        for tool in self.mcp.tools if self.mcp is not None else ():
            pieces = chat.pieces(json.dumps(tool.schema, ensure_ascii=False))
            found = {chat.tokenizer.convert_ids_to_tokens(piece) for piece in pieces if isinstance(piece, int)}
            if found:
                raise ToolSchemaError(
                    f"An MCP server describes its tool {tool.name!r} with control tokens of the model "
                    f"({', '.join(sorted(found))}), which would forge every prompt that shows it.",
                    remedy="Leave the tool out (`tools: [...]` of the server names those you want), or do not use the "
                    "server.",
                )

    def score_without_failed(self) -> None:
        """Let reward functions score only rollouts whose environment has not failed."""
        if self._run.environment_factories is not None:
            self._run.reward_funcs = [
                f if isinstance(f, nn.Module) else scoring_without_failed(f, self._failures)
                for f in self._run.reward_funcs
            ]

    # A rollout batch

    def tools_of(self, environment: object, read: Callable[..., T]) -> T:
        """Read the tools of a rollout; where its environment failed, only those passed to the trainer."""
        if environment is not None and not self._failures.includes(environment):
            with contextlib.suppress(EnvironmentTimeoutError):
                return read(environment)
        return read()

    def requests(self, prompt_ids: list[list[int]]) -> list[RolloutRequest]:
        """Return the rollouts to be made of some prompts, each with its tools, environment and MCP servers."""
        environments = self._run.environments or [None] * len(prompt_ids)
        requests = []
        for ids, environment in zip(prompt_ids, environments, strict=True):
            tools: dict[str, Tool] = {}
            owned = frozenset[str]()
            if self._run.tools:
                tools, owned = self.tools_of(environment, self.toolset.of_rollout)
            failed = self._failures.includes(environment)
            requests.append(RolloutRequest(ids, tools, None if failed else environment, owned, failed))
        return self._lend_servers(requests)

    def _lend_servers(self, requests: list[RolloutRequest]) -> list[RolloutRequest]:
        """Return the rollouts with MCP servers of their own."""
        if self.mcp is None:
            return requests
        self.mcp.prepare(len(requests))
        self.sessions = [self.mcp.session() for _ in requests]
        lent = []
        for request, session in zip(requests, self.sessions, strict=True):
            tools, own = self.mcp.of_rollout(request.tools, session)
            if own:  # the calls of these servers and of the environment keep one order
                owner = session if request.environment is None else request.environment
                request = replace(request, tools=tools, environment=owner, owned=request.owned | own)
            lent.append(request)
        return lent

    def log_restarts(self) -> None:
        """Log how often each MCP server was started anew. Every process must call this."""
        if self.mcp is not None:
            restarts = gather_object([self.mcp.restarts()])
            for name in self.mcp.servers:
                total = float(sum(part[name] for part in restarts))
                self._run.metrics[f"tools/mcp/{name.replace('/', '_')}/restarts"].append(total)

    def without_failed(self, scores: Tensor) -> Tensor:
        """Return rewards, shape (N, F), with none for a rollout whose environment failed, even if a model scores its
        text. Every process must call this."""
        environments = self._run.environments
        if not environments:
            return scores
        found = [[self._failures.includes(environment), self._is_lost(environment)] for environment in environments]
        gathered = self._run.accelerator.gather(torch.tensor(found, device=scores.device))
        failed, self.lost = gathered.unbind(dim=1)
        self._run.metrics["environments/failures"].append(float(failed.sum()))
        return scores.masked_fill(failed[:, None], torch.nan)

    def take_back(self) -> None:
        """End a rollout batch: drop environments that failed or whose thread hangs, so that they are not handed out
        again, and have the servers made ready for the next rollouts during the update."""
        if self._run.environments:
            pools = self._run.environment_pool
            for name, pool in pools.items():
                lost = [environment for environment in pool if self._is_lost(environment)]
                pools[name] = [e for e in pool if not any(e is other for other in lost)]
                if self.executor is not None:
                    for environment in lost:
                        self.executor.release(environment)
            self._failures.of_batch.clear()
        if self.mcp is not None:
            self.mcp.take_back(self.sessions)
            self.sessions = ()

    @contextlib.contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        """End servers and threads at once where the trainer cannot be made, rather than when it is collected."""
        try:
            yield
        except BaseException:
            if self.executor is not None:
                self.executor.shutdown()
            if self.mcp is not None:
                self.mcp.close()
            raise

    def _is_lost(self, environment: object) -> bool:
        hangs = self.executor is not None and self.executor.is_abandoned(environment)
        return hangs or self._failures.includes(environment)


def _method_names(environment_factory: object) -> set[str]:
    """Return the names that the tools of environments will have, as far as their classes tell."""
    factories = environment_factory.values() if isinstance(environment_factory, dict) else [environment_factory]
    classes = [factory for factory in factories if inspect.isclass(factory)]
    return {name for kind in classes for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}

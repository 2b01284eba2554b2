"""The tools of a run and of each of its rollouts, under one set of names.

A rollout has the tools passed to the trainer, the methods of its environment, and the tools that the environment
brings along. The same `Tool`s are shown in prompts, called, and compared with what prompts mention.
"""

import logging
from collections.abc import Callable, Hashable, Mapping

from ..errors import ToolSchemaError
from .arguments import check_schema
from .from_callable import environment_tools, index_tools, left_out_of_tools
from .prompt_tool import PromptTool
from .tool import Tool


logger = logging.getLogger(__name__)


class ToolSet:
    """
    The tools of a run.

    Args:
        tools (`list[Callable | Tool]`, *optional*):
            Tools that every rollout has.

    Raises:
        ToolNameError, ToolSchemaError: for duplicate names and tools without a usable schema.
    """

    def __init__(self, tools: list[Callable | Tool] | None) -> None:
        if tools is not None and not isinstance(tools, (list, tuple)):
            remedy = "Pass a list, `tools=[...]`, even for a single tool."
            raise ToolSchemaError(f"You passed `tools={tools!r}`, which is not a list.", remedy=remedy)
        self.own = list(index_tools(tools or []).values())
        self.of_environments: list[Tool] = []
        self.decided_at_reset = False
        # Returns a tool as the chat template can show it, once that is known
        self.shown: Callable[[Tool], Tool] = lambda tool: tool
        for tool in self.own:
            check_schema(tool)

    @property
    def known(self) -> list[Tool]:
        """Every tool known before an environment is reset."""
        return [*self.own, *self.of_environments]

    def prompt_tools(self, environment: object | None = None) -> list[PromptTool]:
        """Return what the prompt of a rollout is rendered with."""
        return [PromptTool(self.shown(tool)) for tool in self.of_rollout(environment)[0].values()]

    def of_rollout(self, environment: object | None = None) -> tuple[dict[str, Tool], frozenset[str]]:
        """Return the tools of a rollout by name, and the names of those that belong to its environment."""
        owned = [] if environment is None else environment_tools(environment)
        return index_tools([*self.own, *owned]), frozenset(tool.name for tool in owned)

    def add_environments(self, probes: Mapping[Hashable, object]) -> dict[Hashable, list[PromptTool]]:
        """
        Take in one instance of each environment.

        Args:
            probes (`Mapping[Hashable, object]`):
                An instance by the name of its environment.

        Returns:
            `dict[Hashable, list[PromptTool]]`: what prompts of each environment are rendered with before it is reset.
        """
        rendered = {}
        for name, environment in probes.items():
            tools, owned = self.of_rollout(environment)
            for tool in tools.values():
                check_schema(tool)
            self.of_environments += [tool for tool in tools.values() if tool.name in owned]
            self.decided_at_reset |= hasattr(environment, "tools")
            left_out = left_out_of_tools(environment)
            if left_out:
                logger.warning(
                    "The environment %s has public methods that are no tools, since TRL makes tools of plain methods "
                    "alone: %s. If the policy is to call one, make it a plain method, or list it in the environment's "
                    "attribute `tools`; if not, begin its name with an underscore.",
                    type(environment).__name__,
                    ", ".join(f"`{name}` ({what})" for name, what in left_out.items()),
                )
            rendered[name] = self.prompt_tools(environment)
        return rendered

"""The tools of a run and of each of its rollouts, under one set of names.

Owns which tools a rollout has: those passed to the trainer, the methods of its environment, and those its environment
brings along. Fed by the trainer; the same records make the prompt, are called, and are checked against prompts.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ToolSchemaError
from .arguments import check_schema
from .functions import environment_tools, index_tools, left_out_of_tools
from .prompt import PromptTool
from .types import Tool


logger = logging.getLogger(__name__)


class ToolSet:
    """
    Tools of a run.

    Args:
        tools (`list[Callable | Tool]`, *optional*):
            Tools every rollout has.

    Raises:
        ToolNameError, ToolSchemaError: for duplicate names and tools without a usable schema.
    """

    def __init__(self, tools: list[Callable | Tool] | None):
        if tools is not None and not isinstance(tools, (list, tuple)):
            raise ToolSchemaError(
                f"You passed `tools={tools!r}`, which is no list. Pass a list, `tools=[...]`, even for a single tool."
            )
        self.own = list(index_tools(tools or []).values())
        self.of_environments: list[Tool] = []
        self.decided_at_reset = False
        # Gives a tool as the chat template can show it, once that is known
        self.shown: Callable[[Tool], Tool] = lambda tool: tool
        for tool in self.own:
            check_schema(tool)

    @property
    def known(self) -> list[Tool]:
        """Every tool known before an environment is reset."""
        return [*self.own, *self.of_environments]

    def prompt_tools(self, environment: object | None = None) -> list[PromptTool]:
        """What the prompt of a rollout is rendered with."""
        brought = [] if environment is None else environment_tools(environment)
        return [PromptTool(self.shown(tool)) for tool in (*self.own, *brought)]

    def of_rollout(self, environment: object | None = None) -> tuple[dict[str, Tool], frozenset[str]]:
        """Tools of a rollout by name, and the names of those that belong to its environment."""
        if environment is None:
            return index_tools(self.own), frozenset()
        owned = environment_tools(environment)
        return index_tools([*self.own, *owned]), frozenset(tool.name for tool in owned)

    def add_environments(self, probes: Mapping[Any, object]) -> dict[Any, list[PromptTool]]:
        """
        Take in one instance of each environment.

        Args:
            probes (`Mapping[Any, object]`):
                An instance by the name of its environment.

        Returns:
            `dict[Any, list[PromptTool]]`: what prompts of each environment are rendered with before it is reset.
        """
        rendered = {}
        for name, environment in probes.items():
            tools, owned = self.of_rollout(environment)
            for tool in tools.values():
                check_schema(tool)
            self.of_environments += [tools[owned_name] for owned_name in tools if owned_name in owned]
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

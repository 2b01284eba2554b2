"""Tools as TRL wants to hold them: something it renders as a schema, names and could call.

Owns `PromptTool`. TRL keeps its tools in lists it passes to `apply_chat_template` and asks for `__name__`; a `Tool` of
any origin takes part in that as a schema that can be called. Fed by the trainer.
"""

import asyncio
from typing import Any

from .types import Tool


class PromptTool(dict):
    """The schema of a tool, with the name and the call of the function it describes."""

    def __init__(self, tool: Tool):
        super().__init__(tool.schema)
        self.tool = tool
        self.__name__ = tool.name

    def __call__(self, **arguments: Any) -> Any:
        if self.tool.is_async:
            return asyncio.run(self.tool.function(**arguments))
        return self.tool.function(**arguments)

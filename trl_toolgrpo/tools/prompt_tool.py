"""Tools as TRL holds them: in lists that it passes to `apply_chat_template` and whose entries have a `__name__`."""

import asyncio

from .tool import Tool


class PromptTool(dict):
    """The schema of a tool, with the name of the function it describes, which it calls when it is called."""

    def __init__(self, tool: Tool) -> None:
        super().__init__(tool.schema)
        self.tool = tool
        self.__name__ = tool.name

    def __call__(self, **arguments: object) -> object:
        if self.tool.is_async:
            return asyncio.run(self.tool.function(**arguments))
        return self.tool.function(**arguments)

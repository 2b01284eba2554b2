"""An MCP server written with the SDK, over stdio or, given a port, over streamable HTTP."""

import os
import sys
import time

import anyio
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.types import Annotations, CallToolResult, EmbeddedResource, ResourceLink, TextContent, TextResourceContents


server = MCPServer("sdk")
NOTES: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
def person(name: str) -> dict[str, str]:
    """Describes a person."""
    return {"name": name, "town": "Köln"}


@server.tool(name="say-hello")
def say_hello() -> str:
    """Greets."""
    return "hello"


@server.tool()
def fail(reason: str) -> str:
    """Fails."""
    raise ValueError(reason)


@server.tool()
def environment(name: str) -> str:
    """A variable of the server's environment."""
    return f"{name} is {os.environ.get(name)}"


@server.tool()
def picture() -> list:
    """A picture with its caption."""
    return ["A dot.", Image(data=b"\x89PNG" + bytes(11_996), format="png")]


@server.tool()
def pages() -> CallToolResult:
    """A resource, and a link to one."""
    text = TextResourceContents(uri="memo://one", text="Page one.", mime_type="text/plain")
    link = ResourceLink(type="resource_link", uri="memo://two", name="two", mime_type="text/plain")
    end = TextContent(type="text", text="The end.", annotations=Annotations(priority=1.0))
    return CallToolResult(content=[EmbeddedResource(type="resource", resource=text), link, end])


@server.tool()
async def wait(seconds: float) -> str:
    """Waits, and notes how that ended."""
    try:
        await anyio.sleep(seconds)
    except BaseException:
        NOTES.append("cancelled")
        raise
    NOTES.append("waited")
    return "waited"


@server.tool()
def notes() -> str:
    """How the waits have ended."""
    return " ".join(NOTES)


@server.tool()
async def forget(ctx: Context) -> str:
    """Takes a tool away."""
    server.remove_tool("add")
    await ctx.session.send_tool_list_changed()
    return "forgotten"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        print("started at", time.time(), "with", os.environ.get("API_KEY"), file=sys.stderr)
        server.run()

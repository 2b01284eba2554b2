"""A tool that runs the policy's Python code, contained by `sandbox.py`, and what the policy reads of a run."""

import logging
import signal

from ..tool import Tool, ToolResult
from .sandbox import NOT_STOPPED, PATIENCE, Limits, SandboxReport, find_sandbox


logger = logging.getLogger(__name__)

_PARAMETERS = {
    "type": "object",
    "properties": {"code": {"type": "string", "description": "Python code."}},
    "required": ["code"],
    "additionalProperties": False,
}
# Seconds on top of the sandbox's own time limits, for the case that those fail
_SLACK = 15.0


def python_tool(
    name: str = "python",
    sandbox: str = "bubblewrap",
    seconds: float = 5.0,
    memory_mb: float = 512,
    disk_mb: float = 64,
    processes: int = 32,
    output_bytes: int = 100_000,
    last_expression: bool = True,
    together_mb: float | None = None,
) -> Tool:
    """
    Return a tool that runs Python code written by the policy, with Python's standard library, in a fresh process.

    Under bubblewrap the code has no network, no environment variable of the run, no file but the system's programs and
    libraries, and a private folder that is gone afterwards. Nothing of that stops a fault of the kernel.

    With `sandbox="limits"` there are resource limits alone, which contain accidents and not attacks: they do not stop
    network connections, reading what any user may read, many small files, or System V shared memory, which stays; and
    if the run does not belong to root, nor reading the user's own files and signals to the user's processes.

    The sandbox is tried here, and what it does not stop is logged once.

    Args:
        name (`str`, *optional*, defaults to `"python"`):
            Name of the tool.
        sandbox (`str`, *optional*, defaults to `"bubblewrap"`):
            `"bubblewrap"`, which has to be installed, or `"limits"`.
        seconds (`float`, *optional*, defaults to `5.0`):
            Time limit of one run, and processor time of each of its processes.
        memory_mb (`float`, *optional*, defaults to `512`):
            Memory of one run in MiB, all its processes together.
        disk_mb (`float`, *optional*, defaults to `64`):
            Size of the private folder, and of one file, in MiB.
        processes (`int`, *optional*, defaults to `32`):
            Processes and threads at the same time.
        output_bytes (`int`, *optional*, defaults to `100_000`):
            Bytes of standard output and standard error that are kept, half from the beginning and half from the end.
            `max_tool_output_tokens` cuts what the policy reads of them in the same way.
        last_expression (`bool`, *optional*, defaults to `True`):
            Whether the value of a last line that is an expression is shown, as in an interactive session.
        together_mb (`float`, *optional*):
            Memory and private folders, in MiB, of all runs at the same time, of all Python tools of a process; further
            runs wait for their turn. By default half of the memory of the machine or container, divided by the
            processes of the run on it.

    Returns:
        [`Tool`]: The tool, with one argument, `code`.

    Raises:
        ConfigError: if a limit is not positive or leaves no room for Python itself, or if the sandbox is unknown, not
            installed or does not work on this system.
    """
    together = None if together_mb is None else int(together_mb * 2**20)
    limits = Limits(seconds, int(memory_mb * 2**20), int(disk_mb * 2**20), processes, output_bytes, together)
    box = find_sandbox(sandbox, limits, last_expression)
    logger.warning(
        "Code of the tool %r runs in the sandbox %r, which does not stop: %s.", name, sandbox, NOT_STOPPED[sandbox]
    )

    def run(code: str) -> ToolResult:
        return _result(box.run(code), limits)

    shown = " The value of a last line that is an expression is shown." if last_expression else ""
    description = (
        f"Runs Python code in a fresh process and returns what it prints.{shown} There is no network, nothing is kept "
        f"between calls, and a run ends after {seconds:g} seconds."
    )
    return Tool(name, description, _PARAMETERS, run, timeout=PATIENCE + seconds + _SLACK)


def _result(report: SandboxReport, limits: Limits) -> ToolResult:
    """Return what the policy reads: the output, a mark where its middle was dropped, and why the run is no success."""
    kind, reason = _failure(report, limits)
    dropped = f"[... {report.dropped} bytes of output were dropped ...]" if report.dropped else ""
    parts = (report.output.rstrip("\n"), dropped, report.tail.rstrip("\n"), reason)
    text = "\n".join(part for part in parts if part)
    return ToolResult(text, is_error=kind is not None, error_type=kind, transient=report.status == "busy")


def _failure(report: SandboxReport, limits: Limits) -> tuple[str | None, str]:
    if report.status == "timeout" or (report.status == "ended" and report.code == -signal.SIGXCPU):
        return "timeout", f"[stopped after {limits.seconds:g} seconds]"
    if report.status == "memory":
        return "error", f"[stopped: more than {limits.memory / 2**20:g} MiB of memory]"
    if report.status == "busy":
        return "error", "[not run: other code took all the memory there is for it]"
    if report.status == "lost":
        return "error", "[the sandbox ended before the code did]"
    if report.code < 0:
        known = -report.code in set(signal.Signals)  # real-time signals have numbers alone
        return "error", f"[ended by {signal.Signals(-report.code).name if known else f'signal {-report.code}'}]"
    return (None, "") if report.code == 0 else ("error", f"[exit code {report.code}]")

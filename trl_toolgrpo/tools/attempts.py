"""One call of a tool, tried again while its failure is transient.

Owns the boundary where whatever a tool raises becomes data; fed by `execute.py` with the job to run.
"""

import copy
import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

from ..errors import EnvironmentTimeoutError
from .lanes import Job
from .results import plain_content, plain_reward, raised, refused
from .types import ToolResult


_OWNER_BUSY = "The environment is still busy with an earlier call."
_TOOL_BUSY = "The tool is still busy with an earlier call."


def call_with_copy(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """
    Calls a tool with arguments of its own, so that it can change neither the record of the call nor the next attempt.

    Args:
        function (`Callable`):
            The tool's function.
        arguments (`dict`):
            Arguments by name.

    Returns:
        What the function returns; for a coroutine function, the coroutine.
    """
    return function(**copy.deepcopy(arguments))


def run_on_thread(job: Job, retries: int, resolve: Callable[[Awaitable[Any]], Any]) -> ToolResult:
    """
    Runs a call on the current thread.

    Args:
        job ([`Job`]):
            The call.
        retries (`int`):
            How often a transient failure is tried again.
        resolve (`Callable`):
            Waits for an awaitable that the tool returned.

    Returns:
        [`ToolResult`]: What the tool returned, or its failure.
    """
    while True:
        try:
            value = job.function()
            result = _as_result(resolve(value) if inspect.isawaitable(value) else value)
        except BaseException as error:
            result = raised(error)
        retries -= 1
        if _is_final(result, retries, job):
            return result


async def run_on_loop(job: Job, retries: int) -> ToolResult:
    """
    Runs a call as a coroutine.

    Args:
        job ([`Job`]):
            The call.
        retries (`int`):
            How often a transient failure is tried again.

    Returns:
        [`ToolResult`]: What the tool returned, or its failure; a `CancelledError` it raised is a failure too.
    """
    while True:
        try:
            value = job.function()
            result = _as_result(await value if inspect.isawaitable(value) else value)
        except BaseException as error:
            # SystemExit must not reach the task, which would end the event loop's thread.
            result = raised(error)
        retries -= 1
        if _is_final(result, retries, job):
            return result


def answer_unrun(jobs: Iterable[Job], reason: str | None = None) -> None:
    """
    Resolves jobs that will not run.

    Args:
        jobs (`Iterable[Job]`):
            The jobs.
        reason (`str`, *optional*):
            Why; by default what they wait for is lost to an earlier call.
    """
    for job in jobs:
        busy = _OWNER_BUSY if job.owner is not None and job.owner.abandoned else _TOOL_BUSY
        if job.tool is None:
            job.future.set_exception(EnvironmentTimeoutError(reason or busy, job.keep))
        else:
            job.future.set_result(refused("abandoned", reason or busy))


def _as_result(value: Any) -> ToolResult:
    if not isinstance(value, ToolResult):
        return ToolResult(plain_content(value))
    failed = bool(value.is_error)
    kind = (value.error_type or "error") if failed else None
    reward = plain_reward(value.reward, "The tool")
    return replace(value, content=plain_content(value.content), is_error=failed, error_type=kind, reward=reward)


def _is_final(result: ToolResult, retries_left: int, job: Job) -> bool:
    return not (result.is_error and result.transient) or retries_left < 0 or job.settled

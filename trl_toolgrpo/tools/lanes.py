"""Which call may start now: pure bookkeeping, without threads or clocks.

Owns `Lane`, `Job` and `Admission`; fed by `execute.py`, which holds its lock around every method here.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .loops import LoopRun
from .processes import ProcessCall
from .threads import Alarm, Worker
from .types import Tool


@dataclass(eq=False)
class Lane:
    """
    Something that takes one job at a time: an environment, or a tool that is not thread-safe.

    Args:
        worker (`Worker`, *optional*):
            The thread that owns an environment; `None` for a tool.
        busy (`bool`, *optional*, defaults to `False`):
            Whether a job runs on it.
        abandoned (`bool`, *optional*, defaults to `False`):
            Whether that job is past its time limit and still holds it.
    """

    worker: Worker | None = None
    busy: bool = False
    abandoned: bool = False


@dataclass(eq=False)
class Job:
    """
    One call of a tool, or with `tool=None` something the trainer runs on an environment's thread.

    Args:
        future (`Future`):
            What the caller waits for.
        function (`partial`):
            The call, with its arguments.
        tool (`Tool`, *optional*):
            The tool that is called; `None` takes no slot.
        owner (`Lane`, *optional*):
            The environment, whose jobs start in the order given.
        exclusive (`Lane`, *optional*):
            The tool, if it is not thread-safe.
        keep (`Any`, *optional*):
            The environment instance, kept alive as long as the job is.
        name (`str`, *optional*, defaults to `""`):
            What is asked of the environment, for messages.
        limit (`float`, *optional*):
            Seconds that has; `None` for no limit. The limit of a tool's call is the tool's or the executor's.
    """

    future: "Future[Any]"
    function: "partial[Any]"
    tool: Tool | None = None
    owner: Lane | None = None
    exclusive: Lane | None = None
    keep: Any = None
    name: str = ""
    limit: float | None = None
    started: float = 0.0
    settled: bool = False
    expired: bool = False
    finished: bool = False
    alarm: Alarm | None = None
    cancellable: LoopRun | ProcessCall | None = None
    worker: Worker | None = None

    @property
    def lanes(self) -> list[Lane]:
        """The lanes the job needs."""
        return [lane for lane in (self.owner, self.exclusive) if lane is not None]


@dataclass
class Admission:
    """
    Jobs that wait, and how many run.

    Args:
        limit (`int`):
            How many tool calls may run at the same time.
    """

    limit: int
    running: int = 0
    _waiting: dict[Job, None] = field(default_factory=dict)
    _without_slot: int = 0

    def add(self, job: Job) -> None:
        """
        Queues a job.

        Args:
            job (`Job`):
                The job.
        """
        self._waiting[job] = None
        self._without_slot += job.tool is None

    def start(self) -> list[Job]:
        """
        Takes the jobs that can start now, oldest first, and counts them as running.

        Returns:
            `list[Job]`: The jobs to start.
        """
        ready: list[Job] = []
        passed: set[Lane] = set()
        without_slot = self._without_slot
        for job in self._waiting:
            full = self.running >= self.limit
            if full and without_slot == 0:
                break
            without_slot -= job.tool is None
            if job.owner in passed or any(lane.busy for lane in job.lanes) or (full and job.tool is not None):
                # Later jobs of this environment must not overtake.
                passed.update(lane for lane in (job.owner,) if lane is not None)
                continue
            self.running += job.tool is not None
            for lane in job.lanes:
                lane.busy = True
            ready.append(job)
        self._remove(ready)
        return ready

    def free_slot(self, job: Job) -> None:
        """
        Gives back the slot of a job that finished or was given up.

        Args:
            job (`Job`):
                The job.
        """
        self.running -= job.tool is not None

    def drop(self, affected: Callable[[Job], bool]) -> list[Job]:
        """
        Removes jobs that can no longer start.

        Args:
            affected (`Callable`):
                Whether to remove a job.

        Returns:
            `list[Job]`: The jobs removed.
        """
        dropped = [job for job in self._waiting if affected(job)]
        self._remove(dropped)
        return dropped

    def _remove(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            del self._waiting[job]
            self._without_slot -= job.tool is None

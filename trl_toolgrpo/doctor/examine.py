"""The examination: every check in order, as far as the results of earlier ones allow."""

import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from logging.handlers import MemoryHandler
from pathlib import Path

from ..config.fields import estimator_name
from ..redaction import Redactor, argument_secrets
from ..run_folder.files import process_secrets
from .check_chat import check_chat, check_tools
from .check_data import check_data
from .load_script import construct, output_folder
from .machine import check_hardware, check_versions
from .result import FAULT, NOTE, OK, CheckResult
from .trial import check_memory, try_run


@dataclass
class Examination:
    """
    What was found.

    Args:
        results (`list[CheckResult]`):
            The results in the order of the checks.
        seconds (`float`):
            Time it took.
    """

    results: list[CheckResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> list[CheckResult]:
        """What stands in the way."""
        return [result for result in self.results if result.state == FAULT]

    @property
    def go(self) -> bool:
        """Whether training may begin."""
        return not self.faults


def examine(script: Path, arguments: Sequence[str]) -> Examination:
    """
    Examine the run that a command line of a script would start.

    Args:
        script (`Path`):
            The script, with a `make_trainer`.
        arguments (`Sequence[str]`):
            Its command line.
    """
    started = time.perf_counter()
    redactor = Redactor(process_secrets() + argument_secrets(arguments))
    results = [
        replace(result, message=redactor.text(result.message), remedy=redactor.text(result.remedy))
        for result in _results(script, arguments)
    ]
    return Examination(results, time.perf_counter() - started)


def _results(script: Path, arguments: Sequence[str]) -> Iterator[CheckResult]:
    yield check_versions()
    # The package warns of what it cannot refuse, for example a tool that the chat template cuts
    logger, handler = logging.getLogger(__name__.partition(".")[0]), MemoryHandler(10_000, logging.CRITICAL + 1)
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    trainer, wrong = construct(script, arguments)
    logger.removeHandler(handler)
    subjects = {record.getMessage(): getattr(record, "subject", "construction") for record in handler.buffer}
    yield from (CheckResult("construction", NOTE, text) for text, subject in subjects.items() if subject != "tools")
    if wrong is not None:
        yield check_hardware(Path.cwd())
        yield wrong
        return
    yield check_hardware(output_folder(arguments, trainer.args.output_dir))
    model = f"{type(trainer.model).__name__} on {trainer.accelerator.device}"
    batch = f"{trainer.args.generation_batch_size} rollouts a batch in groups of {trainer.num_generations}"
    yield CheckResult("configuration", OK, f"{model}, {batch}, advantages by `{estimator_name(trainer.args)}`.")
    data, cost = check_data(trainer)
    tools = trainer.rollouts.tools.toolset
    suspicious = [text for text, subject in subjects.items() if subject == "tools"]
    yield check_tools(tools.known, tools.decided_at_reset, cost, suspicious)
    chat = check_chat(trainer.rollouts.chat, tools.known) if trainer.recording else []
    yield from [*chat, *data]
    if any(result.state == FAULT for result in [*chat, *data]):
        return
    subject = "rollouts"
    try:
        for result in try_run(trainer):
            subject = "update"
            yield result
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        yield CheckResult(subject, FAULT, message, "The traceback above says where; training would end there too.")
    if subject == "update":
        yield check_memory(trainer)

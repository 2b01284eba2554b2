"""The examination: every question in order, as far as the answers before allow.

Owns the order and the verdict.
"""

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..policy_checks import check_policy_is_trained
from ..redaction import Redactor, argument_secrets
from ..run_files import process_secrets
from .chat_questions import check_chat, check_tools
from .data_questions import check_data
from .findings import FAULT, NOTE, OK, Finding
from .script import construct, load_maker, output_folder
from .surroundings import check_hardware, check_versions
from .trial import check_memory, try_rollouts, try_update


@dataclass
class Examination:
    """
    What was found.

    Args:
        findings (`list[Finding]`):
            The answers in the order of the questions.
        seconds (`float`):
            Time it took.
    """

    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> list[Finding]:
        """What stands in the way."""
        return [finding for finding in self.findings if finding.state == FAULT]

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
    findings = [
        replace(finding, words=redactor.text(finding.words), remedy=redactor.text(finding.remedy))
        for finding in _ask(lambda: load_maker(script), arguments)
    ]
    return Examination(findings, time.perf_counter() - started)


def _ask(load: Callable[[], Any], arguments: Sequence[str]) -> Iterator[Finding]:
    yield check_versions()
    with _warnings() as said:
        trainer, wrong = construct(lambda given: _trainable(load()(given)), arguments)
    yield from (Finding("construction", NOTE, words) for words, subject in said.items() if subject != "tools")
    if wrong is not None:
        yield check_hardware(Path.cwd())
        yield wrong
        return
    yield check_hardware(output_folder(arguments, trainer.args.output_dir))
    yield Finding("configuration", OK, _configuration(trainer))
    data, cost = check_data(trainer)
    tools = trainer._toolset
    suspicious = [words for words, subject in said.items() if subject == "tools"]
    yield check_tools(tools.known, tools.decided_at_reset, cost, suspicious)
    chat = trainer._engine.chat if trainer._recording else None
    answers = [*([] if chat is None else check_chat(chat, tools.known)), *data]
    yield from answers
    if any(answer.state == FAULT for answer in answers):
        return
    rollouts, batch = _guarded(lambda: try_rollouts(trainer), "rollouts")
    yield from rollouts
    if batch is not None:
        update, _ = _guarded(lambda: ([try_update(trainer, batch)], None), "update")
        yield from update
        yield check_memory(trainer)


def _trainable(trainer: Any) -> Any:
    """The trainer, whose policy has to be one that training would move."""
    check_policy_is_trained(trainer.model)
    return trainer


@contextmanager
def _warnings() -> Iterator[dict[str, str]]:
    """What the package warns of meanwhile, such as a tool that the chat template does not show whole, by subject."""
    said: dict[str, str] = {}

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.setdefault(record.getMessage(), getattr(record, "subject", "construction"))

    handler = Keeper(logging.WARNING)
    logger = logging.getLogger(__package__.partition(".")[0])
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _guarded(question: Callable[[], tuple[list[Finding], Any]], subject: str) -> tuple[list[Finding], Any]:
    """A question whose error is the answer."""
    try:
        return question()
    except Exception as error:
        traceback.print_exc()
        words = f"{type(error).__name__}: {error}"
        return [Finding(subject, FAULT, words, "The traceback above says where; training would end there too.")], None


def _configuration(trainer: Any) -> str:
    args = trainer.args
    return (
        f"{type(trainer.model).__name__} on {trainer.accelerator.device}, {args.generation_batch_size} rollouts a "
        f"batch in groups of {trainer.num_generations}, advantages by `{args.advantage_estimator}`."
    )

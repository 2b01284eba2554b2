"""The output folder of a run before it starts: whether it can be used, and what earlier runs have left there."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputFolderInUseError
from ..run_folder.lock import take_lock
from ..run_folder.storage_failures import same_error
from .folder import EARLIER, why_not_writable


if TYPE_CHECKING:
    from ..config.fields import ToolGRPOConfig


def check_output_dir(args: "ToolGRPOConfig") -> None:
    """
    Check that a run can write to its output folder, before models are loaded. Every process has to call this.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration of the run.

    Raises:
        OutputFolderInUseError: if another run writes to it.
        CheckpointSaveError: if it cannot be written to.
    """
    folder = Path(str(args.output_dir))
    in_use = problem = None
    if args.process_index == 0:
        try:
            with take_lock(folder) or nullcontext():
                problem = why_not_writable(folder)
        except OutputFolderInUseError as error:
            in_use = error
    same_error(in_use, OutputFolderInUseError)
    same_error(problem)


def earlier_runs(output_dir: str | Path) -> list[Path]:
    """
    Return the folders to which the files of earlier runs in an output folder were moved.

    Args:
        output_dir (`str` or `Path`):
            The output folder.

    Returns:
        `list[Path]`: the folders, from the oldest run to the newest.
    """
    found = Path(output_dir).glob(f"{EARLIER}*")
    return sorted(found, key=lambda folder: int(folder.name.removeprefix(EARLIER)))

"""The output folder of a run before it starts: whether it can be used, and what earlier runs have left there."""

from contextlib import nullcontext
from pathlib import Path

from ..config.fields import ToolGRPOConfig
from ..run_folder.lock import take_lock
from ..run_folder.storage_failures import raised_in_every_process
from .folder import EARLIER, check_writable


def check_output_dir(args: ToolGRPOConfig) -> None:
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
    with raised_in_every_process():
        if args.process_index == 0:
            with take_lock(folder) or nullcontext():
                check_writable(folder)


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

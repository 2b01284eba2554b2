"""The checkpoint that a recipe is resumed from, and the batch sizes that it requires."""

from collections.abc import Sequence

from accelerate.utils import broadcast_object_list

from trl_toolgrpo import ToolGRPOConfig, find_checkpoint, keep_batch_size


def checkpoint_to_resume(training: ToolGRPOConfig) -> str | None:
    """
    Return the checkpoint that `--resume_from_checkpoint` asks for.

    Args:
        training ([`ToolGRPOConfig`]):
            `resume_from_checkpoint` is a folder, or `true` for the newest whole checkpoint of `output_dir`.

    Returns:
        `str` or `None`: its folder; `None` to start from the beginning, also where there is no checkpoint yet.
    """
    asked_for = str(training.resume_from_checkpoint)
    if asked_for.lower() in ("none", "false"):
        return None
    if asked_for.lower() != "true":
        return asked_for
    found = None
    if training.process_index == 0:  # the others get what it found
        found = find_checkpoint(str(training.output_dir))
        begins = f"No checkpoint in {training.output_dir} yet: starting from the beginning."
        print(begins if found is None else f"Resuming from {found}.", flush=True)
    (found,) = broadcast_object_list([found])
    return None if found is None else str(found)


def flags_that_keep_batches(
    checkpoint: str | None, training: ToolGRPOConfig, arguments: Sequence[str] = ()
) -> list[str]:
    """
    Return the flags that keep the rollout batches of a checkpoint on another number of processes. There are none where
    the command line sets batch sizes.
    """
    changes = {} if checkpoint is None else keep_batch_size(checkpoint, training)
    given = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    if given & {*changes, "generation_batch_size"}:
        return []
    if changes.get("steps_per_generation") == changes.get("gradient_accumulation_steps"):
        changes.pop("steps_per_generation", None)  # as it is by default
    flags = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    if flags and training.process_index == 0:
        print(f"These flags keep the rollout batches of {checkpoint}: {' '.join(flags)}", flush=True)
    return flags

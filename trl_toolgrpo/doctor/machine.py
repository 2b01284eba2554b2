"""Checks of the machine and of the installed packages, which need no trainer."""

import os
import shutil
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from .result import FAULT, NOTE, OK, CheckResult


NAMED = ("torch", "transformers", "trl", "peft")
LEAST_DISK = 2e9
"""Bytes below which a checkpoint may not find room."""


def check_versions() -> CheckResult:
    """Check that every required package is installed in a version that fits."""
    try:
        required = metadata.requires("trl_toolgrpo") or []
    except metadata.PackageNotFoundError:
        required = []
    wrong = {}
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version, needed = _installed_version(requirement.name), f"{requirement.name}{requirement.specifier}"
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong[f"'{needed}'"] = f"{requirement.name} is {version or 'not installed'}, and {needed} is needed"
    if wrong:
        return CheckResult("versions", FAULT, f"{'; '.join(wrong.values())}.", f"Run `pip install {' '.join(wrong)}`.")
    versions = ", ".join(f"{name} {_installed_version(name)}" for name in NAMED)
    if not required:
        versions += "; trl_toolgrpo is not installed, so its requirements are unknown"
    return CheckResult("versions", OK if required else NOTE, f"{versions}.")


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_hardware(folder: Path) -> CheckResult:
    """
    Check that there is room for checkpoints, and name what there is to compute on.

    Args:
        folder (`Path`):
            Where checkpoints would go.
    """
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    parts = [f"{os.cpu_count()} CPU cores", f"{psutil.virtual_memory().total / 1e9:.0f} GB of memory"]
    parts += [f"{card.name} with {card.total_memory / 1e9:.0f} GB" for card in cards]
    home = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(home).free
    message = f"{', '.join(parts)}; {free / 1e9:.0f} GB free for {folder}."
    if not os.access(home, os.W_OK):
        return CheckResult("hardware", FAULT, f"{home} cannot be written to.", "Pass another `output_dir`.")
    if free < LEAST_DISK:
        return CheckResult("hardware", NOTE, message, "Make room: a checkpoint may not fit.")
    return CheckResult("hardware", OK, message)

"""The machine and what is installed on it, against what the run needs.

Owns the questions that need no trainer: versions, and hardware.
"""

import os
import re
import shutil
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from .findings import FAULT, NOTE, OK, Finding


SHOWN = ("torch", "transformers", "trl", "peft")
LEAST_DISK = 2e9
"""Bytes below which a checkpoint may not find room."""


def check_versions() -> Finding:
    """Whether every package this one requires is installed in a version it was made for."""
    try:
        required = metadata.requires("trl_toolgrpo") or []
    except metadata.PackageNotFoundError:
        required = []
    wrong = []
    for line in required:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, and {requirement.specifier} is needed")
    if wrong:
        names = " ".join(f"'{Requirement(line)}'" for line in required if re.split(r"\W", line)[0] in " ".join(wrong))
        return Finding("versions", FAULT, "; ".join(wrong) + ".", f"Run `pip install {names}`.")
    words = ", ".join(f"{name} {metadata.version(name)}" for name in SHOWN)
    if not required:
        return Finding("versions", NOTE, f"{words}; trl_toolgrpo is not installed, so its requirements are unknown.")
    return Finding("versions", OK, f"{words}.")


def check_hardware(folder: Path) -> Finding:
    """
    What there is to compute on, and room for checkpoints.

    Args:
        folder (`Path`):
            Where checkpoints would go.
    """
    parts = [f"{os.cpu_count()} CPU cores", f"{psutil.virtual_memory().total / 1e9:.0f} GB of memory"]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        parts.append(f"{card.name} with {card.total_memory / 1e9:.0f} GB")
    home = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(home).free
    words = f"{', '.join(parts)}; {free / 1e9:.0f} GB free for {folder}."
    if not os.access(home, os.W_OK):
        return Finding("hardware", FAULT, f"{home} cannot be written to.", "Pass another `output_dir`.")
    if free < LEAST_DISK:
        return Finding("hardware", NOTE, words, "Make room: a checkpoint may not fit.")
    return Finding("hardware", OK, words)

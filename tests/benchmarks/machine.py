"""Describe the machine of a measurement: processor or card, flags, memory, versions and the state of the source.

Also the clock after a device is done, and peak memory, which every benchmark measures in the same way.
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]

# Flags of a processor that decide the speed of matrix products
PROCESSOR_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)
CARD_FIELDS = ("name", "driver_version", "memory.total", "compute_cap", "power.limit", "clocks.max.sm")
PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return the processor, its cores and flags, and the card with its driver (`None` where there is none)."""
    processor, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                processor = value.strip()
            elif name.strip() in ("flags", "Features"):
                flags = set(value.split())
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": processor,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "flags": [flag for flag in PROCESSOR_FLAGS if flag in flags],
        "system": platform.platform(),
        "card": describe_card(),
    }


def describe_card() -> dict[str, str] | None:
    """Return what the driver's program reports about the first card; `None` without such a program or card."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CARD_FIELDS)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in output.splitlines()[0].split(",")] if output.strip() else []
    return dict(zip(CARD_FIELDS, values, strict=True)) if len(values) == len(CARD_FIELDS) else None


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of relevant packages; `None` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    # The one next to this file, which need not be installed
    line = (ROOT / "trl_toolgrpo" / "version.py").read_text(encoding="utf-8").splitlines()[-1]
    found["trl_toolgrpo"] = line.partition("=")[2].strip().strip('"')
    return found


def source_state() -> dict[str, str | None]:
    """Return the commit (with a `+` if files differ), and a digest of the package for copies without history."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "trl_toolgrpo").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):

        def git(*words: str) -> str:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

        if Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT.resolve():
            commit = git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    return {"commit": commit, "source": digest.hexdigest()[:16]}


def machine_line(dtype: str) -> str:
    """Return one line for the head of a table: card or processor, flags, dtype."""
    found = describe_machine()
    card, flags = found["card"], ", ".join(flag.upper() for flag in found["flags"]) or "no known flags"
    processor = f"{found['processor']}, {found['cores']} cores, {flags}"
    if card is None:
        return f"{processor}; {dtype}"
    return f"{card['name']} (compute capability {card['compute_cap']}, driver {card['driver_version']}); {dtype}"


def now() -> float:
    """Return seconds on a clock, read after the device has finished its work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def free_memory() -> None:
    """Free unreferenced memory, so that the next peak does not include it."""
    gc.collect()
    if _cuda() is not None:
        _cuda().empty_cache()


def leave_room() -> None:
    """Release what a card's allocator caches, where that leaves too little for another process."""
    if _cuda() is not None and _cuda().memory_reserved() > 0.3 * _cuda().mem_get_info()[1]:
        free_memory()


def reset_peak() -> None:
    """Reset the peak, of a device's allocator or else of the process's memory."""
    if _cuda() is not None:
        _cuda().reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # if it cannot be reset, the peak is that of the process so far
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mib() -> float:
    """Return the peak memory in MiB since `reset_peak`, or since the process began."""
    if _cuda() is not None:
        return _cuda().max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

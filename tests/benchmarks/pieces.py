"""Files that are too large to transfer at once, cut into pieces with checksums and joined again.

Next to the pieces of a file is `<name>.pieces.json` with the size of the file, its SHA-256 and that of each piece.
Pieces may arrive in any order and in several folders.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


INDEX = ".pieces.json"
BLOCK = 2**20


class PieceError(ValueError):
    """A piece that is missing or was changed."""


def digest(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def cut(path: Path, folder: Path, limit: int) -> list[Path]:
    """
    Cut a file into pieces.

    Args:
        path (`Path`):
            The file.
        folder (`Path`):
            Folder for the pieces and their index.
        limit (`int`):
            Largest number of bytes of a piece.

    Returns:
        `list[Path]`: the pieces, followed by their index.
    """
    if limit < 1:
        raise ValueError(f"You asked for pieces of {limit} bytes. A piece has at least one: raise the limit.")
    folder.mkdir(parents=True, exist_ok=True)
    pieces: list[Path] = []
    with path.open("rb") as source:
        while len(pieces) * limit < max(path.stat().st_size, 1):
            piece = folder / f"{path.name}.piece{len(pieces):03d}"
            left = limit
            with piece.open("wb") as target:
                while left and (block := source.read(min(BLOCK, left))):
                    target.write(block)
                    left -= len(block)
            pieces.append(piece)
    index = folder / f"{path.name}{INDEX}"
    told = [{"name": piece.name, "sha256": digest(piece)} for piece in pieces]
    whole = {"name": path.name, "size": path.stat().st_size, "sha256": digest(path), "pieces": told}
    index.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return [*pieces, index]


def join(folders: list[Path], target: Path) -> list[Path]:
    """
    Put whole files into a folder: those that are whole in the given folders, and those that are there in pieces.

    Args:
        folders (`list[Path]`):
            Folders of files and pieces, with their subfolders. Of two files with one name, the first is used.
        target (`Path`):
            Folder for whole files. Those that are whole in `folders` are linked, not copied, where that works.

    Returns:
        `list[Path]`: the files in `target`, by name.

    Raises:
        FileNotFoundError: for a folder that does not exist.
        PieceError: for a piece that is missing or was changed, by its name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder. Pass folders that hold the files, or pieces of them.")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            found.setdefault(path.name, path)
    indexes = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if _is_index(name)}
    pieces = {piece["name"] for whole in indexes.values() for piece in whole["pieces"]}
    target.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        if name not in pieces and name not in indexes:
            _link(path, target / name)
    for whole in indexes.values():
        _join_one(whole, found, target / whole["name"])
    return sorted(path for path in target.iterdir() if path.is_file())


def _is_index(name: str) -> bool:
    return name.endswith(INDEX)


def _link(path: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another file system
        shutil.copyfile(path, target)


def _join_one(whole: dict[str, Any], found: dict[str, Path], target: Path) -> None:
    """Write a file from its pieces, under another name first, so that a file with its name is whole."""
    missing = [piece["name"] for piece in whole["pieces"] if piece["name"] not in found]
    if missing:
        raise PieceError(
            f"{whole['name']} came in {len(whole['pieces'])} pieces, of which {', '.join(missing)} are missing. Bring "
            "them into one of the folders."
        )
    unfinished = target.with_name(f"{target.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("wb") as file:
        for piece in whole["pieces"]:
            path = found[piece["name"]]
            if digest(path) != piece["sha256"]:
                raise PieceError(f"{path} is not the piece that was cut: its checksum differs. Bring it again.")
            with path.open("rb") as source:
                shutil.copyfileobj(source, file, BLOCK)
    if unfinished.stat().st_size != whole["size"] or digest(unfinished) != whole["sha256"]:
        raise PieceError(f"The pieces of {whole['name']} are right, but not the file: bring its {INDEX} again.")
    unfinished.replace(target)

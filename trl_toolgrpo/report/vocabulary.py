"""Token ids as texts: a table of the tokens that occur, so that a report holds each text once.

Owns the numbering of tokens and how a token is written by itself, bytes that are half a character included.
"""

from pathlib import Path
from typing import Any

import numpy as np


class Vocabulary:
    """
    Numbers tokens in the order they are first seen, from 0.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tells their texts; without it they are shown as ids.
    """

    def __init__(self, tokenizer: Any = None):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._numbers = np.full(1024, -1, dtype=np.int64)

    def number(self, ids: np.ndarray) -> np.ndarray:
        """
        Numbers of tokens; new ones are added.

        Args:
            ids (`np.ndarray`):
                Token ids, shape (n,).

        Returns:
            `np.ndarray`: their numbers, int64, shape (n,).
        """
        ids = ids.astype(np.int64)
        if len(ids) and ids.max() >= len(self._numbers):
            grown = np.full(2 * int(ids.max()) + 2, -1, dtype=np.int64)
            grown[: len(self._numbers)] = self._numbers
            self._numbers = grown
        new = np.unique(ids[self._numbers[ids] < 0]) if len(ids) else ids
        self._numbers[new] = np.arange(len(self.ids), len(self.ids) + len(new))
        self.ids += new.tolist()
        return self._numbers[ids]

    def texts(self) -> list[str]:
        """Text of each token, by its number."""
        if self.tokenizer is None:
            return [f"[{id}]" for id in self.ids]
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        decode = _decoder(self.tokenizer)
        before = decode(anchor)
        return [self._text(id, decode([*anchor, id]).removeprefix(before)) for id in self.ids]

    def _text(self, id: int, text: str) -> str:
        if text and "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        token = self.tokenizer.convert_ids_to_tokens(id)  # half a character, or an id the tokenizer does not know
        return f"[{id}]" if token is None else f"\N{LEFT ANGLE BRACKET}{_hexadecimal(token)}\N{RIGHT ANGLE BRACKET}"


def load_tokenizer(folder: Path, problems: list[str]) -> Any:
    """
    The tokenizer a run has saved in its output folder or a checkpoint.

    Args:
        folder (`Path`):
            Output folder.
        problems (`list[str]`):
            Gets a line if there is none, or it cannot be loaded.

    Returns:
        `PreTrainedTokenizerBase`, *optional*: the tokenizer.
    """
    from transformers import AutoTokenizer

    homes = [folder, *sorted(folder.glob("checkpoint-*"), reverse=True)]
    home = next((path for path in homes if (path / "tokenizer_config.json").is_file()), None)
    if home is None:
        problems.append(
            "No tokenizer was saved in the folder, so tokens are shown as their ids. `trainer.save_model(output_dir)` "
            "saves it, and so does every checkpoint."
        )
        return None
    try:
        return AutoTokenizer.from_pretrained(str(home), local_files_only=True)
    except Exception as error:  # whatever a foreign tokenizer file does; the report is readable without it
        problems.append(f"The tokenizer in {home} cannot be loaded, so tokens are shown as their ids: {error}")
        return None


def _decoder(tokenizer: Any) -> Any:
    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode


def _hexadecimal(token: str) -> str:
    """The bytes of a token of a byte-level vocabulary, in hexadecimal; other tokens by their own name."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if token and all(character in bytes_of for character in token):
        return " ".join(f"{bytes_of[character]:02X}" for character in token)
    return token.strip("<>") or "?"

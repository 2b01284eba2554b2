"""The texts of token ids, including tokens that are only part of a character."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vocabulary:
    """
    Texts of the tokens that occur in a run.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Decodes them; without it they are shown as ids.

    Attributes:
        texts (`dict[int, str]`): text of each token, by its id.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[int, str] = {}

    def new_texts(self, ids: Iterable[int]) -> dict[int, str]:
        """
        Return the texts of those tokens that `texts` does not have yet, by their ids.

        Args:
            ids (`Iterable[int]`):
                Token ids.
        """
        return {id: self._text(id) for id in sorted(set(ids) - self.texts.keys())}

    def _text(self, id: int) -> str:
        if self.tokenizer is None:
            return f"[{id}]"
        # After another token, since some tokenizers drop the space at the beginning of a text
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        before, text = self.tokenizer.batch_decode([anchor, [*anchor, id]], **options)
        text = text.removeprefix(before)
        if text and "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        token = next(iter(self.tokenizer.convert_ids_to_tokens([id])))  # part of a character, or not known
        return f"[{id}]" if token is None else f"\N{LEFT ANGLE BRACKET}{_hexadecimal(token)}\N{RIGHT ANGLE BRACKET}"


def load_tokenizer(folder: Path, problems: list[str]) -> "PreTrainedTokenizerBase | None":
    """
    Load the tokenizer that a run has saved in its output folder or a checkpoint.

    Args:
        folder (`Path`):
            Output folder.
        problems (`list[str]`):
            Gets a line if there is none, or it cannot be loaded.
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
    except Exception as error:  # a tokenizer file may fail in any way; the report is readable without it
        problems.append(f"The tokenizer in {home} cannot be loaded, so tokens are shown as their ids: {error}")
        return None


def _hexadecimal(token: str) -> str:
    """Write the bytes of a token of a byte-level vocabulary in hexadecimal; other tokens by their own name."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if token and all(character in bytes_of for character in token):
        return " ".join(f"{bytes_of[character]:02X}" for character in token)
    return token.strip("<>") or "?"

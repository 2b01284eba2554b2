"""The control tokens of a tokenizer, and the encoding of texts that must not become one."""

import itertools
from collections.abc import Iterable, Iterator

import regex
from transformers import PreTrainedTokenizerBase


class ControlTokens:
    """
    The tokens that control a conversation: special tokens, added tokens and those that end a turn.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        stop_ids (`Iterable[int]`, *optional*):
            Tokens that end an assistant turn.

    Attributes:
        ids (`frozenset[int]`):
            Their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int] = ()):
        self._tokenizer = tokenizer
        special = {id for id in tokenizer.all_special_ids if id != tokenizer.unk_token_id}
        added = {**tokenizer.get_added_vocab(), **{tokenizer.convert_ids_to_tokens(id): id for id in special}}
        # Added tokens that are only whitespace (newline runs of Gemma) are text, not control
        self.ids = frozenset(id for text, id in added.items() if text.strip()) | frozenset(stop_ids)
        self._names = {text: id for text, id in added.items() if id in self.ids and text}
        names = sorted(self._names, key=len, reverse=True)
        self._pattern = regex.compile(f"({'|'.join(map(regex.escape, names)) or '(?!)'})")
        # Words that were added to a vocabulary are not pieced together from two texts
        signs = [name for name in names if not (name[0].isalnum() or name[-1].isalnum())]
        self._begins = {name[:end] for name in signs for end in range(1, len(name))}
        self._ends = {name[start:] for name in signs for start in range(1, len(name))}
        self._longest = max(map(len, signs), default=0)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return where control tokens are written in a text, overlapping ones included."""
        return [match.span() for match in self._pattern.finditer(text, overlapped=True)]

    def pieces(self, text: str) -> list[str | int]:
        """Return a text in order: control tokens as their ids, the text between them unchanged."""
        return [self._names.get(piece, piece) for piece in self._pattern.split(text) if piece]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, control tokens included."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def encode_inert(self, text: str) -> list[int]:
        """
        Encode a text so that none of it becomes a control token.

        Returns:
            `list[int]`: tokens that decode to the same text, except for characters that are control tokens by
            themselves, which have no other spelling and are left out.
        """
        return [id for _, ids in self._inert_parts(text) for id in ids]

    def _inert_parts(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """Yield a text in parts, as few as possible, none of which becomes a control token, with their tokens."""
        todo = [text]
        while todo:
            part = todo.pop()
            encoded = self.encode(part)
            if self.ids.isdisjoint(encoded):
                yield part, encoded
                continue
            matches = self._pattern.finditer(part)
            cuts = [0, *(match.start() + 1 for match in matches if match.end() - match.start() > 1), len(part)]
            if len(cuts) > 2:  # a control token cut in two is no control token
                todo += [part[start:stop] for start, stop in itertools.pairwise(cuts)][::-1]
                continue
            # What is left is the result of normalization
            single = ((character, self.encode(character)) for character in part)
            yield from (found for found in single if self.ids.isdisjoint(found[1]))

    def marked(self, text: str, mark: str) -> str:
        """
        Return a text with a mark wherever it has to be cut, also from what may precede and follow it, so that none of
        it becomes a control token when it is encoded from mark to mark.

        Args:
            text (`str`):
                Any text.
            mark (`str`):
                A string that occurs in no text.
        """
        inert = mark.join(part for part, _ in self._inert_parts(text))
        reach = range(1, min(self._longest, len(text) + 1))
        begins = any(text[:size] in self._ends for size in reach)
        ends = any(text[-size:] in self._begins for size in reach)
        return f"{mark if begins else ''}{inert}{mark if ends else ''}"

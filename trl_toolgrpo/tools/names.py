"""Names in prompts that look like a slip of a tool's name, and columns that list tools which do not exist.

A prompt that asks for `slack_send_message` while the tool is `send_slack_message` trains nothing, and nothing else
says so. But most identifiers in prompts are code, so that only what is hardly a coincidence counts as a slip.
"""

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache
from typing import Any

from ..errors import ToolNameError


@dataclass(frozen=True)
class Mention:
    """A name in a text that is likely meant as a tool and is none."""

    name: str
    tool: str
    """The tool it resembles."""
    reordered: bool
    """Whether it is made of the tool's words in another order."""
    text: str
    """Where it was first found."""
    excerpt: str
    """That text around the name."""


def find_mentions(
    texts: Iterable[str], tool_names: Collection[str], known_identifiers: Collection[str] = ()
) -> Iterator[Mention]:
    """
    Find names that resemble a tool's and are none, each once.

    A name is an identifier with an underscore or a camelCase hump, or any identifier in backticks or before an opening
    parenthesis; plain words are prose. These resemble a tool's name:

    - its words in another order (`slack_send_message` for `send_slack_message`) or spelling (`sendSlackMessage`;
      `look_up` for `lookup`), and its words with one of them misspelt (`get_wether`);
    - where the sentence speaks of a tool, or says to call or use it: more or fewer words (`lookup_key` for `lookup`),
      and others of their forms (`read_files` for `read_file`). Elsewhere such names are a matter of course in code.

    Attributes of objects, paths, constants, classes and definitions are passed over, unless the sentence does so.

    Args:
        texts (`Iterable[str]`):
            Texts of the prompts.
        tool_names (`Collection[str]`):
            Names of the tools the policy is given.
        known_identifiers (`Collection[str]`, *optional*, defaults to `()`):
            Other names that prompts may mention: parameters of the tools, dataset columns.
    """
    tools = _ToolNames(tool_names)
    known = {*tool_names, *known_identifiers}
    harmless: set[str] = set()  # pieces between white space, most of which come again and again
    for text in texts:
        pieces = set(text.split()) - harmless
        alike = {piece for piece in pieces if any(tools.resemble(match, known) for match in tools.names(piece))}
        harmless |= pieces - alike
        if len(harmless) > _REMEMBERED:
            harmless.clear()
        for piece in sorted(alike, key=text.find):
            for place in _places(piece, text):
                for match in tools.names(text, place, place + len(piece)):
                    name, alike_to = match.group().strip("_"), tools.resemble(match, known)
                    if alike_to is not None and _is_meant(text, match, *alike_to):
                        known.add(name)
                        tool, closeness = alike_to
                        excerpt = _excerpt(text, match.start(), name)
                        yield Mention(name, tool, closeness == _REORDERED, text, excerpt)


def check_tool_columns(names: Iterable[str], tool_names: Collection[str]) -> None:
    """
    Check names that a dataset row lists or calls as tools.

    Args:
        names (`Iterable[str]`):
            The names the dataset lists.
        tool_names (`Collection[str]`):
            Names of the tools the policy is given.

    Raises:
        ToolNameError: if one of the names is not a tool.
    """
    for name in names:
        if name in tool_names:
            continue
        closest = _ToolNames(tool_names).closest(name)
        hits = [closest[0]] if closest else get_close_matches(name, tool_names, n=1, cutoff=0.3)
        hint = f"did you mean `{hits[0]}`? " if hits else ""
        available = ", ".join(f"`{tool}`" for tool in tool_names) or "none"
        raise ToolNameError(
            f"The dataset lists the tool `{name}`, which does not exist; {hint}The tools are: {available}. Correct "
            f"the dataset or add the tool."
        )


_AKIN, _SPELLED, _REORDERED = range(3)
"""How a name resembles a tool's: as many names in code do, by its spelling, by its words in another order."""

_REMEMBERED = 500_000
_EXCERPT = 40
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")
_LIKE_A_NAME = re.compile(r"[^\W_][_.-]\w|[a-z0-9][A-Z]")
# Too common in names of tools to say that two of them are the same; shorter words are trivial anyway.
_TRIVIAL = frozenset({"all", "and", "for", "from", "get", "new", "not", "run", "set", "the", "use", "with"})
_NEAR = re.compile(r"(?<![\w.\"'/(\[{])tools?(?!\w|[\"'\])}(=/\[]|\.\w|\s=)", re.IGNORECASE)
_ASKED_FOR = re.compile(r"\b(?:call|use|invoke)\s(?:the\s)?(?:function\s)?`?$", re.IGNORECASE)
# A method, a path, a variable, a flag or a definition of code
_PART_BEFORE = re.compile(r"(?:[\w)\]]\.|->|::|[/\\@$#]|--|\b(?:def|class|func|function|fn|import|const|let|var) )$")
_PART_AFTER = re.compile(r"\.[A-Za-z]|::|->|[/\\]|\s?=(?!=)")


class _ToolNames:
    """The tools' names, indexed by words and letters, so that many identifiers are compared quickly."""

    def __init__(self, names: Collection[str]) -> None:
        # "." and "-" join words only where a tool's name has them; elsewhere "send_it.Then" is two identifiers.
        joints = "".join(re.escape(joint) for joint in ".-" if any(joint in name for name in names))
        joined = rf"(?:[{joints}]\w+)*" if joints else ""
        self.pattern = re.compile(rf"(?<=`)[^\W\d]\w*(?:-\w+)+(?=`)|(?<!\w)[^\W\d]\w*{joined}")
        self.words = {name: _words(name) for name in names if _words(name)}
        self.by_words = {tuple(sorted(words)): name for name, words in self.words.items()}
        self.by_letters = {"".join(words): name for name, words in self.words.items()}
        self.by_word: dict[str, list[tuple[str, frozenset[str]]]] = {}
        for name, words in self.words.items():
            for word in (telling := _telling(words)):
                self.by_word.setdefault(word, []).append((name, telling))
        self.by_gap: dict[tuple[Any, ...], list[tuple[str, str]]] = {}  # by all words but one, and its first letter
        for name, words in self.words.items():
            for gap, word in (*_gaps(words), *_gaps(["".join(words)])):
                self.by_gap.setdefault(gap, []).append((word, name))

        self.closest = lru_cache(_REMEMBERED)(self._closest)

    def names(self, text: str, start: int = 0, end: int = sys.maxsize) -> Iterator[re.Match[str]]:
        """Identifiers in a piece of text without white space; none in a URL."""
        piece = text[start:end]
        has_none = "://" in piece or (piece.islower() and piece.isalpha())
        return iter(()) if has_none else self.pattern.finditer(text, start, end)

    def resemble(self, match: re.Match[str], known: Collection[str]) -> tuple[str, int] | None:
        """The tool that an identifier resembles, and how; nothing for known things and for `server.tool`."""
        name = match.group().strip("_")
        if not name or name in known or match.group() in known:
            return None
        cuts = [joint.start() for joint in re.finditer("[.-]", name)]
        return None if any(name[:c] in known or name[c + 1 :] in known for c in cuts) else self.closest(name)

    def _closest(self, name: str) -> tuple[str, int] | None:
        """The tool that a name resembles most, and how."""
        words = _words(name)
        letters = "".join(words)
        tool = self.by_words.get(tuple(sorted(words)))
        if tool is not None and self.words[tool] != words:
            return tool, _REORDERED
        tool = tool or self.by_letters.get(letters)
        if tool is not None:  # a single word with another capital is a name such as "GitHub"
            return tool, _AKIN if _is_capitalized(name, tool) else _SPELLED
        akin = self._sharing(words)
        for gap, word in _gaps(words):
            for meant, tool in self.by_gap.get(gap, ()):
                if word in meant or meant in word:  # `tests` for `test` is another word
                    akin = akin or tool
                elif min(len(word), len(meant)) >= 5 and abs(len(word) - len(meant)) <= 2 and _alike(word, meant):
                    return tool, _SPELLED
        return None if akin is None else (akin, _AKIN)

    def _sharing(self, words: list[str]) -> str | None:
        """A tool whose telling words are among those of a name, or the other way round."""
        mine = _telling(words)
        for name, its_words in (entry for word in mine for entry in self.by_word.get(word, ())):
            if mine <= its_words or its_words <= mine:
                return name
        return None


def _telling(words: list[str]) -> frozenset[str]:
    return frozenset(word for word in words if len(word) > 2 and word not in _TRIVIAL and not word.isdigit())


def _gaps(words: list[str]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Each word of a name, and what is left of the name and the word without it but for its first letter."""
    for place, word in enumerate(words):
        yield (*words[:place], (word[0],), *words[place + 1 :]), word


def _alike(word: str, meant: str) -> bool:
    """Whether two words are the same but for an edit or two, as `wether` and `weather` are."""
    return SequenceMatcher(None, word, meant, autojunk=False).ratio() >= 0.85


def _is_capitalized(name: str, tool: str) -> bool:
    return name.casefold() == tool.casefold() and len(_words(tool)) == 1


def _is_meant(text: str, match: re.Match[str], tool: str, closeness: int) -> bool:
    """Whether a name that resembles a tool's is likely meant as a tool where it stands."""
    name, (start, end) = match.group(), match.span()
    quoted = text[start - 1 : start] == "`" and text[end : end + 1] in ("`", "(")
    called = text[end : end + 1] == "(" and closeness > _AKIN
    if not (quoted or called or _LIKE_A_NAME.search(name)) or (_is_capitalized(name, tool) and not quoted):
        return False
    before, after = text[max(0, start - 60) : start], text[end : end + 20]
    sentence = re.split(r"[.;!?]\s|\n", before)[-1] + re.split(r"[.;!?]\s|\n", after)[0]
    if _NEAR.search(sentence) or _ASKED_FOR.search(before):
        return True
    is_class = closeness == _SPELLED and name[0].isupper() and not quoted
    is_part = _PART_BEFORE.search(before) or (_PART_AFTER.match(after) and not quoted)
    return closeness > _AKIN and not (name.isupper() or is_class or is_part)


def _places(piece: str, text: str) -> Iterator[int]:
    """Where a text holds a piece between white space."""
    place = text.find(piece)
    while place >= 0:
        end = place + len(piece)
        if not text[place - 1 : place].strip() and not text[end : end + 1].strip():
            yield place
        place = text.find(piece, end)


def _words(identifier: str) -> list[str]:
    return [word.casefold() for word in _WORDS.findall(identifier)]


def _excerpt(text: str, start: int, identifier: str) -> str:
    begin, end = max(0, start - _EXCERPT), start + len(identifier) + _EXCERPT
    head, tail = "..." if begin > 0 else "", "..." if end < len(text) else ""
    return head + " ".join(text[begin:end].split()) + tail

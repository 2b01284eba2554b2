"""Prompts and datasets that name tools which do not exist.

Owns what counts as a mention of a tool and when a name is a slip; fed by prompt texts and dataset columns. A prompt
that asks for `slack_send_message` while the tool is `send_slack_message` trains nothing, and nothing else says so.
"""

import builtins
import keyword
import re
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches

from ..errors import ToolNameError


_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")
_URL = re.compile(r"\w+://\S+")
_HUMP = re.compile(r"[a-z0-9][A-Z]")
# Code in a prompt may call these whatever the tools are; they are never more than a warning.
_PYTHON = frozenset(dir(builtins)) | frozenset(keyword.kwlist)
# Too common in names of tools to say that two of them are the same; shorter words are trivial anyway.
_TRIVIAL = frozenset({"all", "and", "for", "from", "get", "new", "not", "run", "set", "the", "use", "with"})

_MAX_DISTANCE = 2
_SHORT = 5
_EXCERPT = 40


def check_tool_mentions(
    texts: Iterable[str], tool_names: Collection[str], known_identifiers: Collection[str] = ()
) -> list[str]:
    """
    Looks for mentions of tools that do not exist.

    A mention is an identifier with an underscore or a camelCase hump, or any identifier in backticks or directly
    followed by an opening parenthesis; plain words are prose.

    Args:
        texts (`Iterable[str]`):
            Texts of the prompts.
        tool_names (`Collection[str]`):
            Names of the tools the policy is given.
        known_identifiers (`Collection[str]`, *optional*, defaults to `()`):
            Other names that prompts may mention: parameters of the tools, dataset columns.

    Returns:
        `list[str]`: A warning for each identifier that shares words with a tool, or is close to a very short name.

    Raises:
        ToolNameError: if an identifier has the same words as a tool in another order or spelling, or is at most two
            edits away from one (one edit for names shorter than 5 characters).
    """
    tools = _ToolNames(tool_names)
    known = set(tool_names) | set(known_identifiers)
    seen: set[tuple[str, bool]] = set()
    warnings: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        for identifier, marked, start in _mentions(text, known, tools.pattern):
            if (identifier, marked) in seen:
                continue
            seen.add((identifier, marked))
            slip, close = tools.match(identifier, marked)
            sentence = (
                f"A prompt names the tool `{identifier}`, which does not exist; did you mean `{slip or close}`? "
                f"The prompt says: {_excerpt(text, start, identifier)!r}."
            )
            if slip is not None:
                raise ToolNameError(
                    f"{sentence} Correct the prompt; if this is no tool, give it a name less like one."
                )
            if close is not None:
                warnings.setdefault(identifier, sentence)
    return list(warnings.values())


def check_tool_columns(names: Iterable[str], tool_names: Collection[str]) -> None:
    """
    Checks names that a dataset row lists explicitly as tools.

    Args:
        names (`Iterable[str]`):
            The names the dataset lists.
        tool_names (`Collection[str]`):
            Names of the tools the policy is given.

    Raises:
        ToolNameError: if one of the names is not a tool.
    """
    tools = _ToolNames(tool_names)
    for name in dict.fromkeys(names):
        if name in tool_names:
            continue
        closest = tools.closest(name)
        hint = f"did you mean `{closest}`? " if closest else ""
        available = ", ".join(f"`{tool}`" for tool in tool_names) or "none"
        raise ToolNameError(
            f"The dataset lists the tool `{name}`, which does not exist; {hint}The tools are: {available}. Correct "
            f"the dataset or add the tool."
        )


def edit_distance(first: str, second: str, limit: int) -> int:
    """
    Levenshtein distance, given up as soon as it must exceed a limit.

    Args:
        first (`str`):
            One string.
        second (`str`):
            The other string.
        limit (`int`):
            Largest distance of interest.

    Returns:
        `int`: The distance, or `limit + 1` if it is larger than `limit`.
    """
    if abs(len(first) - len(second)) > limit:
        return limit + 1
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        previous, row = row, [i]
        for j, right in enumerate(second, start=1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (left != right)))
        if min(row) > limit:
            return limit + 1
    return min(row[-1], limit + 1)


class _ToolNames:
    """The tools' names, indexed by words and letters, so that thousands of identifiers are compared quickly."""

    def __init__(self, names: Collection[str]) -> None:
        # "." and "-" join words only where a tool's name has them; elsewhere "send_it.Then" is two identifiers.
        joints = "".join(re.escape(joint) for joint in ".-" if any(joint in name for name in names))
        joined = rf"(?:[{joints}]\w+)*" if joints else ""
        # The lookahead leaves the prose to the regex engine: only candidates reach Python.
        candidate = rf"(?=[\w{joints}]*?(?:[^\W_]_\w|[a-z0-9][A-Z])|[\w{joints}]+\()"
        self.pattern = re.compile(
            rf"`(?P<quoted>[^\W\d]\w*(?:[.\-]\w+)*)(?=[`(])|\b{candidate}(?P<bare>[^\W\d]\w*{joined})"
        )
        self.by_words = {tuple(sorted(words)): name for name in names if len(words := _words(name)) > 0}
        self.letters = [(name, name.casefold(), frozenset(name.casefold())) for name in names]
        self.words = [(name, frozenset(_words(name))) for name in names]
        self.vocabulary = frozenset().union(*(words for _, words in self.words))

    def match(self, identifier: str, marked: bool) -> tuple[str | None, str | None]:
        """The tool this surely is a slip of, and the tool it may be a slip of."""
        words = _words(identifier)
        same_words = self.by_words.get(tuple(sorted(words)))
        distance, nearest = self._nearest(identifier)
        short = min(len(identifier), len(nearest or "")) < _SHORT
        slip = same_words or (nearest if distance <= (1 if short else _MAX_DISTANCE) else None)
        if slip is None:
            return None, nearest or self._sharing(words)
        if not marked and "_" not in identifier and len(_words(slip)) == 1:
            # "GitHub" in prose is a proper noun, even beside a tool `github`.
            return None, slip if slip.casefold() != identifier.casefold() else None
        return (None, slip) if identifier in _PYTHON else (slip, None)

    def closest(self, name: str) -> str | None:
        """The tool whose name is most like this one, if any is."""
        words = _words(name)
        likely = self.by_words.get(tuple(sorted(words))) or self._nearest(name)[1] or self._sharing(words)
        return likely or next(iter(get_close_matches(name, [tool for tool, _ in self.words], n=1, cutoff=0.3)), None)

    def _nearest(self, identifier: str) -> tuple[int, str | None]:
        text = identifier.casefold()
        letters = frozenset(text)
        best: tuple[int, str | None] = (_MAX_DISTANCE + 1, None)
        for name, folded, its_letters in self.letters:
            # As many edits as a name has letters say nothing; and each letter that only one side has costs an edit.
            limit = min(_MAX_DISTANCE, len(text) - 1, len(folded) - 1)
            if len(letters - its_letters) <= limit:
                distance = edit_distance(text, folded, limit)
                if distance <= limit and distance < best[0]:
                    best = distance, name
        return best

    def _sharing(self, words: list[str]) -> str | None:
        mine = frozenset(words)
        if mine.isdisjoint(self.vocabulary):
            return None
        for name, its_words in self.words:
            shared = mine & its_words
            if 2 * len(shared) >= max(len(mine), len(its_words)) and any(
                len(word) > 2 and word not in _TRIVIAL for word in shared
            ):
                return name
        return None


def _mentions(text: str, known: set[str], pattern: re.Pattern[str]) -> Iterator[tuple[str, bool, int]]:
    """Identifiers that may be meant as tools, each with whether it is marked as code, and where it starts."""
    if "://" in text:
        text = _URL.sub(lambda url: " " * len(url.group()), text)
    for match in pattern.finditer(text):
        quoted = match["quoted"]
        raw = quoted or match["bare"]
        identifier = raw if raw in known else raw.strip("_")
        if not identifier or identifier in known or not known.isdisjoint(_parts(identifier)):
            continue
        # "file(s)" is a plural, not a call.
        called = text.startswith("(", match.end()) and not text.startswith(("(s)", "(es)"), match.end())
        marked = bool(quoted) or called
        if marked or "_" in identifier or _HUMP.search(identifier):
            yield identifier, marked, match.start()


def _parts(identifier: str) -> list[str]:
    """What a dotted or hyphenated identifier may stand for: `slack.send_message` calls `send_message`."""
    if "." not in identifier and "-" not in identifier:
        return []
    cuts = [match.start() for match in re.finditer(r"[.\-]", identifier)]
    return [part for cut in cuts for part in (identifier[:cut], identifier[cut + 1 :])]


def _words(identifier: str) -> list[str]:
    return [word.casefold() for word in _WORDS.findall(identifier)]


def _excerpt(text: str, start: int, identifier: str) -> str:
    begin, end = max(0, start - _EXCERPT), start + len(identifier) + _EXCERPT
    head, tail = "..." if begin > 0 else "", "..." if end < len(text) else ""
    return head + " ".join(text[begin:end].split()) + tail

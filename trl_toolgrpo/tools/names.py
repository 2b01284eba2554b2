"""Names in prompts that look like a slip of a tool's name, and columns that list tools which do not exist.

A prompt that asks for `slack_send_message` while the tool is `send_slack_message` trains nothing, and nothing else
says so. But most identifiers in prompts are code, so that only what is hardly a coincidence counts as a slip.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches

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

    Three resemble it: its words in another order (`slack_send_message` for `send_slack_message`), its letters with
    other joints (`sendSlackMessage`, `look_up`), and its words with one of them misspelt (`get_wether`). Prose,
    attributes, paths, constants, classes, assignments and definitions are passed over. Names with some of its words
    are a matter of course in code and count only next to the word: "the tool `lookup_key`" for `lookup`.

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
    harmless: set[str] = set()
    for text in texts:
        pieces = set(text.split()) - harmless  # most come again and again
        names = set(_NAME.findall(" ".join(pieces))) - known
        alike = {name: found for name in names if (found := tools.closest(name)) is not None}
        harmless |= {piece for piece in pieces if not any(name in piece for name in alike)}
        if len(harmless) > _REMEMBERED:
            harmless.clear()
        for name in sorted(alike, key=text.find):
            tool, reordered = alike[name]
            start = next(_places(name, tool, reordered, text), None)
            if start is not None:
                known.add(name)
                yield Mention(name, tool, reordered, text, _excerpt(text, start, name))
        for name, start in _called_tools(text) if "tool" in text else ():
            akin = None if name in known else tools.sharing(name)
            if akin is not None:
                known.add(name)
                yield Mention(name, akin, False, text, _excerpt(text, start, name))


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


_REMEMBERED = 500_000
_EXCERPT = 40
_NAME = re.compile(r"[^\W\d_](?:\w*[^\W_])?(?:[.-]\w*[^\W_])*")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")
_LIKE_A_NAME = re.compile(r"\w[_.-]\w|[a-z0-9][A-Z]")
# An attribute, a path, a variable, a flag, a part of a URL or a definition of code
_PART_BEFORE = re.compile(
    r"(?:[\w)\]]\.|->|::|[/\\@$#?&]|--|\b(?:def|class|func|fn|import|const|let|var) "
    r"|(?:^|[\n=({;,]|export|async|default) *function )$"
)
_TOOL = re.compile(r"\btools?\b")
_NAME_BEFORE = re.compile(r"(?<![\w.`])(`?)([^\W\d]\w*)\1 $")
_NAME_AFTER = re.compile(r" (`?)([^\W\d]\w*)\1(?![\w(]|\.\w)")
# Too common in names of tools to say that two of them are the same
_TRIVIAL = frozenset({"all", "and", "for", "from", "get", "new", "not", "run", "set", "the", "use", "with"})
_PART_AFTER = re.compile(r"\.[A-Za-z]|::|->|[/\\]|\s?=(?!=)")


class _ToolNames:
    """The tools' names, indexed by words and letters, so that many identifiers are compared quickly."""

    def __init__(self, names: Collection[str]) -> None:
        words = self.words = {name: found for name in names if (found := _words(name))}
        self.by_letters = {"".join(found): name for name, found in words.items()}
        self.by_words = {tuple(sorted(found)): name for name, found in words.items()}
        self.by_gap: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        for name, found in words.items():
            for gap, word in (*_gaps(found), *_gaps(["".join(found)])):
                self.by_gap.setdefault(gap, []).append((word, name))

    def closest(self, name: str) -> tuple[str, bool] | None:
        """The tool that a name resembles most, and whether its words are in another order."""
        words = _words(name)
        tool = self.by_letters.get("".join(words))
        if tool is not None:  # a single word with other capitals is a name such as "GitHub"
            is_word = name.casefold() == tool.casefold() and len(self.words[tool]) == 1
            return None if is_word or _is_attribute(name, tool) else (tool, False)
        tool = self.by_words.get(tuple(sorted(words)))
        if tool is not None:
            return None if _is_attribute(name, tool) else (tool, True)
        for gap, word in _gaps(words):
            for meant, tool in self.by_gap.get(gap, ()):
                if _is_misspelt(word, meant) and not _is_attribute(name, tool):
                    return tool, False
        return None

    def sharing(self, name: str) -> str | None:
        """A tool whose telling words are among those of a name, or the other way round."""
        mine = _telling(_words(name))
        for tool, words in self.words.items() if mine else ():
            its_words = _telling(words)
            if its_words and (mine <= its_words or its_words <= mine):
                return tool
        return None


def _telling(words: list[str]) -> frozenset[str]:
    return frozenset(word for word in words if len(word) > 2 and word not in _TRIVIAL)


def _called_tools(text: str) -> Iterator[tuple[str, int]]:
    """Names right before or after the word "tool", with where they begin."""
    for word in _TOOL.finditer(text):
        begin = max(0, word.start() - 80)
        before = _NAME_BEFORE.search(text[begin : word.start()])
        after = _NAME_AFTER.match(text, word.end())
        for match, offset in ((before, begin), (after, 0)):
            if match is not None and (match[1] or _LIKE_A_NAME.search(match[2])):
                yield match[2], offset + match.start(2)


def _words(identifier: str) -> list[str]:
    return [word.casefold() for word in _WORDS.findall(identifier)]


def _gaps(words: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each word of a name, and what is left of the name without it but for its first letter."""
    for place, word in enumerate(words):
        yield (*words[:place], word[0], *words[place + 1 :]), word


def _is_misspelt(word: str, meant: str) -> bool:
    """Whether two words are the same but for an edit or two, as `wether` and `weather` are; `tests` is another."""
    if min(len(word), len(meant)) < 5 or word in meant or meant in word:
        return False
    return abs(len(word) - len(meant)) <= 2 and SequenceMatcher(None, word, meant, autojunk=False).ratio() >= 0.85


def _is_attribute(name: str, tool: str) -> bool:
    return "." in name and "." not in tool


def _places(name: str, tool: str, reordered: bool, text: str) -> Iterator[int]:
    """Where a text has a name that is likely meant as a tool."""
    sure = reordered and len(_words(name)) > 2
    hyphenated = "-" in name and "-" not in tool
    is_class = name[0].isupper() and not tool[0].isupper()
    for match in re.finditer(rf"(?<!\w)_*({re.escape(name)})_*(?!\w)", text):
        start, end = match.span(1)
        before, after = text[max(0, start - 20) : start], text[end : end + 3]
        quoted = before[-1:] == "`" and after[:1] in ("`", "(")
        is_name = quoted or (after[:1] == "(" and not hyphenated) or _LIKE_A_NAME.search(name)
        in_code = _PART_BEFORE.search(before) or (_PART_AFTER.match(after) and not quoted)
        is_other = name.isupper() or ((hyphenated or is_class) and not quoted and not sure)
        if is_name and not in_code and not is_other:
            yield start


def _excerpt(text: str, start: int, identifier: str) -> str:
    begin, end = max(0, start - _EXCERPT), start + len(identifier) + _EXCERPT
    head, tail = "..." if begin > 0 else "", "..." if end < len(text) else ""
    return head + " ".join(text[begin:end].split()) + tail

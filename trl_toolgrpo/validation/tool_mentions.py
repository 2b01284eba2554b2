"""Names in prompts that look like a slip of a tool's name, and calls and columns that name no tool.

A prompt that asks for `slack_send_message` while the tool is `send_slack_message` trains nothing, and nothing else
says so. Most identifiers in prompts are code, however, so only what is hardly a coincidence counts as a slip.
"""

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches

from datasets import Dataset, IterableDataset

from ..chat.prompt_renderer import message_texts
from ..errors import ToolNameError
from ..tools.tool import Tool
from ..types import JSONValue, Row


logger = logging.getLogger(__name__)

MENTIONS_SHOWN, MENTIONS_LISTED = 5, 10
"""Names in prompts that resemble a tool's: how many get a warning of their own, and how many more are listed."""

_INSTRUCTING = ("system", "developer")
_EXCERPT = 40
_NAME = re.compile(r"[^\W\d_](?:\w*[^\W_])?(?:[.-]\w*[^\W_])*")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")
_LIKE_A_NAME = re.compile(r"\w[_.-]\w|[a-z0-9][A-Z]")
# Not an attribute, a path, a variable, a flag, a part of a URL or a definition of code
_NO_CODE_BEFORE = (
    r"(?<![\w)\]]\.)(?<!->)(?<!::)(?<![/\\@$#?&])(?<!--)(?<!\bdef )(?<!\bclass )(?<!\bfunc )(?<!\bfn )(?<!\bimport )"
    r"(?<!\bconst )(?<!\blet )(?<!\bvar )(?<!(?<![a-z] )function )(?<!export function )(?<!async function )"
    r"(?<!default function )"
)
_NO_CODE_AFTER = r"(?!\.[A-Za-z]|::|->|[/\\]|\s?=(?!=))"
_NEXT_TO_TOOL = (
    re.compile(r"(?<![\w.`])(?P<quote>`?)(?P<name>[^\W\d]\w*)(?P=quote)(?= tools?\b)"),
    re.compile(r"\btools? (?P<quote>`?)(?P<name>[^\W\d]\w*)(?P=quote)(?![\w(]|\.\w)"),
)
# Too common in names of tools to say that two of them are the same
_TRIVIAL = frozenset({"all", "and", "for", "from", "get", "new", "not", "run", "set", "the", "use", "with"})


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

    @property
    def excerpt(self) -> str:
        """The text around the name."""
        start = self.text.find(self.name)
        begin, end = max(0, start - _EXCERPT), start + len(self.name) + _EXCERPT
        return "..." * (begin > 0) + " ".join(self.text[begin:end].split()) + "..." * (end < len(self.text))


def check_tool_names(
    name: str, dataset: Dataset | IterableDataset, rows: Sequence[Row], tools: Sequence[Tool], mode: str
) -> dict[str, str]:
    """
    Check that prompts name only tools that exist.

    Args:
        name (`str`):
            Name of the data set, for messages.
        dataset (`Dataset` or `IterableDataset`):
            The data set.
        rows (`Sequence[dict]`):
            The rows of it that are checked.
        tools (`Sequence[Tool]`):
            The tools.
        mode (`str`):
            `tool_mention_check` of [`ToolGRPOConfig`].

    Returns:
        `dict[str, str]`: A sentence about each name that is merely suspicious.

    Raises:
        ToolNameError: for a message that calls a tool which does not exist, a `tools` column that lists one, and a
            text that seems to name one, as far as `mode` says.
    """
    if not tools or not rows:
        return {}
    names = [tool.name for tool in tools]
    for row in rows:
        calls = [call for message in _messages(row) for call in message.get("tool_calls") or ()]
        check_tool_columns([*_listed_names(row.get("tools")), *_listed_names(calls)], names)
    if mode == "off":
        return {}
    # Columns, and whatever the schemas of the tools hold: parameters, allowed values
    known = set(dataset.column_names or ())
    for tool in tools:
        known.update(re.findall(r'"((?:[^"\\]|\\.)+)"', json.dumps(tool.parameters, ensure_ascii=False, default=str)))
    texts = _instructions(rows)
    suspicious = {}
    for mention in find_mentions(texts, names, known):
        place, role = texts[mention.text]
        sentence = (
            f"`{name}`, row {place}: a {role} message names the tool `{mention.name}`, which does not exist; did you "
            f"mean `{mention.tool}`? It says: {mention.excerpt!r}."
        )
        if mode == "error" or (mode == "auto" and mention.reordered and role in _INSTRUCTING):
            remedy = "Correct the prompt, or set `tool_mention_check='warn'` if this is meant to name no tool."
            raise ToolNameError(sentence, remedy=remedy)
        suspicious[mention.name] = sentence
    return suspicious


def warn_of_mentions(suspicious: dict[str, str]) -> None:
    """
    Log what [`check_tool_names`] found suspicious: a sentence for each of the first names, and one for all others.

    Args:
        suspicious (`dict[str, str]`):
            A sentence about each name.
    """
    sentences, others = list(suspicious.values())[:MENTIONS_SHOWN], list(suspicious)[MENTIONS_SHOWN:]
    if others:
        listed = [f"`{other}`" for other in others[:MENTIONS_LISTED]] + ["..."] * (len(others) > MENTIONS_LISTED)
        sentences.append(f"Prompts name {len(others)} more identifiers that resemble tools: {', '.join(listed)}.")
    for sentence in sentences:
        logger.warning(
            "%s If no tool is meant, nothing is wrong; `tool_mention_check='off'` looks for none.",
            sentence,
            extra={"subject": "tools"},  # for the doctor's table
        )


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
        closest = _closest_tool(name, _tool_words(tool_names))
        hits = [closest[0]] if closest else get_close_matches(name, tool_names, n=1, cutoff=0.3)
        hint = f"did you mean `{hits[0]}`? " if hits else ""
        available = ", ".join(f"`{tool}`" for tool in tool_names) or "none"
        raise ToolNameError(
            f"The dataset lists the tool `{name}`, which does not exist; {hint}The tools are: {available}.",
            remedy="Correct the dataset or add the tool.",
        )


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
    tools = _tool_words(tool_names)
    known = {*tool_names, *known_identifiers}
    closest: dict[str, tuple[str, bool] | None] = {}  # for each name, as most come again and again
    for text in texts:
        names = set(_NAME.findall(text)) - known
        closest |= {name: _closest_tool(name, tools) for name in names - closest.keys()}
        called_tools = {
            match["name"]
            for pattern in (_NEXT_TO_TOOL if "tool" in text else ())
            for match in pattern.finditer(text)
            if match["quote"] or _LIKE_A_NAME.search(match["name"])
        }
        for name in sorted((name for name in names if closest[name] or name in called_tools), key=text.find):
            meant = closest[name]
            if meant and not _is_called(name, *meant, text):
                meant = None
            if meant is None and name in called_tools and (tool := _tool_sharing_words(name, tools)):
                meant = tool, False
            if meant:
                known.add(name)
                yield Mention(name, *meant, text)


def _tool_words(names: Iterable[str]) -> dict[str, list[str]]:
    return {name: words for name in names if (words := _words_of(name))}


def _words_of(identifier: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(identifier)]


def _closest_tool(name: str, tools: dict[str, list[str]]) -> tuple[str, bool] | None:
    """Return the tool that a name resembles most, and whether its words are in another order."""
    words = _words_of(name)
    letters, ordered = "".join(words), sorted(words)
    alike = [tool for tool, its in tools.items() if "".join(its) == letters]
    if any(name.casefold() == tool.casefold() and len(tools[tool]) == 1 for tool in alike):
        return None  # a single word with other capitals is a name such as "GitHub"
    reordered = [tool for tool, its in tools.items() if sorted(its) == ordered and tool not in alike]
    misspelt = [tool for tool, its in tools.items() if words and words[0][0] == its[0][0] and _is_misspelt(words, its)]
    # A name with a dot is an attribute, where the tool's has none
    meant = [tool for tool in (*alike, *reordered, *misspelt) if "." not in name or "." in tool]
    return (meant[0], meant[0] in reordered) if meant else None


def _is_misspelt(words: list[str], meant: list[str]) -> bool:
    """Return whether two names differ by an edit or two in one word (`wether`); `tests` and `test` are two words."""
    meant = ["".join(meant)] if len(words) == 1 else meant
    other = [pair for pair in zip(words, meant, strict=False) if pair[0] != pair[1]]
    if len(words) != len(meant) or len(other) != 1:
        return False
    word, right = other[0]
    if word[0] != right[0] or min(len(word), len(right)) < 5 or word in right or right in word:
        return False
    return SequenceMatcher(None, word, right, autojunk=False).ratio() >= 0.85


def _tool_sharing_words(name: str, tools: dict[str, list[str]]) -> str | None:
    """Return a tool whose telling words are among those of a name, or the other way round."""
    mine, *others = ({w for w in words if len(w) > 2} - _TRIVIAL for words in (_words_of(name), *tools.values()))
    shared = {tool: mine & its in (mine, its) and mine & its for tool, its in zip(tools, others, strict=True)}
    return next(filter(shared.get, tools), None)


def _is_called(name: str, tool: str, reordered: bool, text: str) -> bool:
    """Return whether a text has a name where it likely means a tool: quoted, called, or not as a part of code."""
    forms = [rf"`_*{re.escape(name)}_*[`(]"]
    is_other = ("-" in name and "-" not in tool) or (name[0].isupper() and not tool[0].isupper())
    # Of three words and more, another order is no coincidence
    if not is_other or (reordered and len(_words_of(name)) > 2):
        bracket = "" if _LIKE_A_NAME.search(name) else r"(?=\()"
        forms.append(rf"{_NO_CODE_BEFORE}(?<!\w)_*{re.escape(name)}_*(?!\w){bracket}{_NO_CODE_AFTER}")
    return not name.isupper() and re.search("|".join(forms), text) is not None


def _messages(row: Row) -> list[Row]:
    prompt = row.get("prompt")
    return prompt if isinstance(prompt, list) else []


def _instructions(rows: Iterable[Row]) -> dict[str, tuple[int, str]]:
    """Return the texts that may tell the policy what to do, those of the system first, each with its row and role."""
    said = [
        (text, (number, message.get("role", "")))
        for number, row in enumerate(rows)
        for message in _messages(row)
        if message.get("role") not in ("tool", "function")  # what a tool has said is data
        for text in message_texts(message)
    ]
    found: dict[str, tuple[int, str]] = {}
    for text, source in sorted(said, key=lambda entry: entry[1][1] not in _INSTRUCTING):
        found.setdefault(text, source)
    return found


def _listed_names(tools: JSONValue) -> list[str]:
    """Return the names in a row's `tools` column, which has names, schemas, or either as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = [tools]
    listed = tools if isinstance(tools, list) else []
    named = [(tool.get("function") or tool).get("name") if isinstance(tool, dict) else tool for tool in listed]
    return [name for name in named if isinstance(name, str)]

"""How arguments are written in a call: where they end, what they are as JSON, and which types they have.

A call ends where its arguments end, not at the first closing marker, which a text among them may hold. transformers'
parser ends it at that marker.
"""

import ast
import contextlib
import json
from collections.abc import Iterator

import regex
from transformers.utils.chat_parsing.content_parsers import parse_content
from transformers.utils.chat_parsing.response_templates import ResponseTemplateField

from ..tools.schema_forms import alternatives, constants, type_names
from ..trl_hooks import cast_text
from ..types import JSONObject, JSONSchema, JSONValue


_SPACE = regex.compile(r"\s*")
_NOTHING = regex.compile("")
_JSON = json.JSONDecoder()
_NAME_PATTERN = r"[\w.\-]+"
_QUOTED = r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\""""
_PYTHON_TEXT = regex.compile(_QUOTED, regex.DOTALL)
# An argument whose text is not escaped between single quotes: it ends at the quote after which the list goes on
_RAW_ARGUMENT = regex.compile(
    rf"""=\s*(?:'(?P<text>.*?)'(?=\s*(?:,\s*{_NAME_PATTERN}=|\)\s*(?:,\s*{_NAME_PATTERN}\(|\]\s*(?:<\|tool_call_end\|>|\Z))))"""
    rf"""|(?P<nested>(?P<inner>[\[{{](?:[^\[\]{{}}'"]|{_QUOTED}|(?&inner))*+[\]}}]))|"(?:[^"\\]|\\.)*+")""",
    regex.DOTALL,
)
_NO_CALL = regex.compile(r"\s*\[\s*\]\s*")
_LIST_START = regex.compile(rf"\[\s*{_NAME_PATTERN}\(")
_BARE_KEY = regex.compile(r'"(?:\\.|[^"\\])*"|(?<=[{,])(\s*)([^\s"{}\[\],:](?:[^"{}\[\],:]*[^\s"{}\[\],:])?)(\s*):')
_PYTHON_NONE = regex.compile(r'"(?:\\.|[^"\\])*"|(?<=[:\[,])(\s*)None(?=\s*[,\]}])')


def notation_types_values(field: ResponseTemplateField) -> bool:
    """Return whether a call's arguments are written so that a text cannot be mistaken for a number, as in JSON."""
    if field.content != "xml-inline":
        return field.content in ("json", "python-call-list")
    return (field.content_args.get("value_parser") or {}).get("name", "text") == "json"


def end_of_call(field: ResponseTemplateField, text: str, start: int, first: regex.Match[str]) -> regex.Match[str]:
    """
    Return the closing marker of a call: the one after its arguments.

    Args:
        field (`ResponseTemplateField`):
            The response template's field for calls.
        text (`str`):
            The turn.
        start (`int`):
            Index in `text` just after the opening of the call.
        first (`regex.Match`):
            The first closing marker after `start`, which ends a call whose arguments cannot be read.
    """
    end = _end_of_arguments(field, text, start)
    if end is None:
        return first
    close = field.close_re.match(text, end) or field.close_re.match(text, _after_space(text, end))
    if close is None and field.content == "json" and not _writes_texts_raw(field):
        opening = field.open_re.match(text, start)
        if opening is not None and opening.end() == start:  # no marker before the arguments, none needed after them
            return _NOTHING.match(text, end)
        return field.close_re.search(text, end) or first
    if close is None or not _is_readable(field, text[start : close.start()]):
        return first
    return _end_of_the_rest(field, text, close) or close


def as_plain_notation(field: ResponseTemplateField, body: str) -> str:
    """
    Return the arguments of a call in a form that transformers' parser for the field reads without loss.

    Args:
        field (`ResponseTemplateField`):
            The response template's field for calls.
        body (`str`):
            The text between the markers of the call.

    Raises:
        ValueError: if there is text between the arguments, an argument is written twice, or there is no call.
    """
    if field.content == "json" and field.content_args.get("string_delims"):
        return _as_json(body, field.content_args["string_delims"])
    if field.content == "python-call-list" and _NO_CALL.fullmatch(body):
        raise ValueError("the list of calls is empty")
    if field.content == "python-call-list" and _writes_texts_raw(field):
        return _RAW_ARGUMENT.sub(_as_call_list_value, body)
    if field.content == "xml-inline":
        tag = regex.compile(field.content_args["tag_pattern"], regex.DOTALL)
        arguments = list(_arguments(tag, body, 0))
        rest = body[arguments[-1].end() if arguments else 0 :].strip()
        if rest:
            raise ValueError(f"arguments are not written as the chat template writes them: {rest[:80]!r}")
        if not field.content_args.get("merge_duplicates"):
            _unique([(argument["key"], None) for argument in arguments])
    return body


def _writes_texts_raw(field: ResponseTemplateField) -> bool:
    """Return whether texts are not escaped, so that a text among the arguments may look like the markup after it."""
    args = field.content_args
    return field.content == "xml-inline" or bool(args.get("string_delims")) or args.get("strings") == "raw"


def _end_of_arguments(field: ResponseTemplateField, text: str, start: int) -> int | None:
    """Return where the arguments of a call end; `None` if they are not written in the notation."""
    if field.content == "json" and not field.content_args.get("string_delims"):
        try:
            return _JSON.raw_decode(text, _after_space(text, start))[1]
        except (ValueError, RecursionError):
            return None
    if field.content == "xml-inline":
        argument = regex.compile(field.content_args["tag_pattern"], regex.DOTALL)
        last = max((found.end() for found in _arguments(argument, text, start)), default=start)
        return None if _opens_another(field, text, start, last, argument) else last
    quoted = _quoted(field)
    if quoted is None or field.close_re is None:
        return None
    end = _first_outside(quoted, field.close_re, text, start)
    raw_list = field.content == "python-call-list" and _writes_texts_raw(field)
    return None if raw_list and end and _opens_another(field, text, start, end, _LIST_START) else end


def _arguments(tag: regex.Pattern[str], text: str, start: int) -> Iterator[regex.Match[str]]:
    """Yield a match for each argument in the run of arguments that begins at `start`."""
    while (found := tag.match(text, _after_space(text, start))) and found.end() > start:
        yield found
        start = found.end()


def _opens_another(
    field: ResponseTemplateField, text: str, start: int, end: int, beginning: regex.Pattern[str]
) -> bool:
    """Return whether another call begins in a part of `text`: an argument that is never closed must not reach into
    it."""
    for opening in field.open_re.finditer(text, start, end) if field.open_re is not None else ():
        named = "name" not in field.open_re.groupindex or bool(opening["name"])
        if named and beginning.match(text, _after_space(text, opening.end())):
            return True
    return False


def _is_readable(field: ResponseTemplateField, body: str) -> bool:
    """Return whether arguments can be read."""
    try:
        parse_content(as_plain_notation(field, body), field.content, field.content_args)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return True


def _end_of_the_rest(field: ResponseTemplateField, text: str, close: regex.Match[str]) -> regex.Match[str] | None:
    """
    Return the closing marker that ends what is left of a call after `close`, or `None` if nothing is left.

    An argument that is not escaped may hold the markup of the end of a call. The rest of the argument then has an end
    without an opening, which shows that the call was misread.
    """
    marker = regex.search(r"<[^<>]+>", close.group())
    if marker is None or not _writes_texts_raw(field):
        return None
    following = field.open_re.search(text, close.end()) if field.open_re is not None else None
    last = text.rfind(marker.group(), close.end(), following.start() if following else len(text))
    return None if last < 0 else field.close_re.search(text, last)


def typed(arguments: JSONObject, parameters: JSONSchema) -> JSONObject:
    """
    Return arguments that were written as text with the types of the tool's schema.

    Args:
        arguments (`dict`):
            Arguments by name.
        parameters (`dict`):
            JSON schema of the tool's arguments.
    """
    properties = parameters.get("properties")
    if not isinstance(properties, dict):
        return arguments
    return {
        name: _typed_text(value, properties[name], parameters)
        if isinstance(value, str) and name in properties
        else value
        for name, value in arguments.items()
    }


def _typed_text(text: str, schema: JSONSchema, root: JSONSchema) -> JSONValue:
    """
    Return the value a text stands for.

    If the schema also takes a text, the text is cast only if the value would be written exactly like this: `00123` and
    `1e3` then stay texts, `123` and `null` do not.
    """
    if any(text == constant for part in alternatives(schema, root) for constant in constants(part)):
        return text
    names = type_names(schema, root)
    values = [value for kind in names if kind != "string" and (value := _cast(text, kind)) is not text]
    exact = [value for value in values if text in (json.dumps(value, ensure_ascii=False), str(value))]
    if exact:
        return exact[0]
    if "string" in names:
        values = [value for value in values if isinstance(value, dict | list)]
    return values[0] if values else text


def _cast(text: str, kind: str) -> JSONValue:
    """Return the value of one type that a text stands for; the text itself if there is none."""
    try:
        return cast_text(text, kind)
    except (RecursionError, OverflowError):
        return text


def _quoted(field: ResponseTemplateField) -> regex.Pattern[str] | None:
    """Return the pattern of texts in which a closing marker does not count, for notations other than JSON and XML."""
    if field.content == "json" and (delimiters := field.content_args.get("string_delims")):
        pairs = [rf"{regex.escape(opening)}.*?{regex.escape(closing)}" for opening, closing in delimiters]
        return regex.compile("|".join(pairs), regex.DOTALL)
    if field.content == "python-call-list":
        return _RAW_ARGUMENT if _writes_texts_raw(field) else _PYTHON_TEXT
    return None


def _first_outside(quoted: regex.Pattern[str], close: regex.Pattern[str], text: str, start: int) -> int | None:
    """Return where `close` is first found outside of what `quoted` matches."""
    marker = close.search(text, start)
    while marker is not None:
        inside = quoted.search(text, start)
        if inside is None or inside.start() >= marker.start():
            return marker.start()
        start = inside.end()
        if marker.start() < start:
            marker = close.search(text, start)
    return None


def _after_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()


def _as_json(body: str, delimiters: list[list[str]]) -> str:
    """Return the JSON of a notation with keys that may have no quotes, marked texts, and Python's `None`."""
    marks = "|".join(rf"{regex.escape(opening)}(.*?){regex.escape(closing)}" for opening, closing in delimiters)
    marked = regex.compile(marks, regex.DOTALL)
    written = marked.sub(lambda found: json.dumps(next(text for text in found.groups() if text is not None)), body)
    written = _BARE_KEY.sub(
        lambda found: found[0] if found[2] is None else f"{found[1]}{json.dumps(found[2])}{found[3]}:", written
    )
    written = _PYTHON_NONE.sub(lambda found: found[0] if found[1] is None else f"{found[1]}null", written)
    json.loads(written, object_pairs_hook=_unique)
    return written


def _unique(pairs: list[tuple[str, JSONValue]]) -> JSONObject:
    """Return an object, unless one of its keys is written twice."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the argument {twice[0]!r} is written more than once")
    return dict(pairs)


def _as_call_list_value(argument: regex.Match[str]) -> str:
    """Return an argument of a Python-style call with its text in JSON's quotes, and lists and mappings as JSON."""
    if argument["text"] is not None:
        return f"={json.dumps(argument['text'], ensure_ascii=False)}"
    if argument["nested"] is None:
        return argument[0]
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return f"={json.dumps(read(argument['nested']), ensure_ascii=False)}"
    return argument[0]

"""Token-exact chat: tokens in, tokens out, the history is never tokenized again.

Between the tokens of two assistant turns come the template's end of the turn, tool results, and the opening of the
next turn. Tool output is encoded so that none of it can become a control token. This works for every chat template
that can render a tool conversation, by rendering a small dummy conversation and cutting it at the end of the
assistant's turn.
"""

import functools
import secrets
from collections.abc import Sequence
from typing import Any

import regex
from transformers import PreTrainedTokenizerBase

from ..errors import ChatTemplateError
from ..tools.tool import ToolCall
from ..types import JSONObject, JSONSchema, Message
from .control_tokens import ControlTokens
from .parsing import ParsedTurn, parse_turn
from .response_templates import RAW_TEXT, corrected_template, rendered_call


TRUNCATION_MARKER = "\n[... truncated: the output was longer than {limit} tokens ...]\n"


class ToolChat:
    """
    Chat handling of one tokenizer and template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a tool-capable chat template and a response template.
        stop_ids (`Sequence[int]`):
            Tokens that end an assistant turn.
        chat_template (`str`, *optional*):
            Template used instead of the tokenizer's own (TRL's training templates).
        template_kwargs (`dict`, *optional*):
            Extra arguments of the template.

    Raises:
        ChatTemplateError: if the template cannot render a tool conversation, or no response template says how calls
            are written.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        chat_template: str | None = None,
        template_kwargs: JSONObject | None = None,
    ):
        self.tokenizer: Any = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.chat_template = chat_template
        self.template_kwargs = template_kwargs or {}
        if getattr(tokenizer, "response_template", None) is None:
            raise ChatTemplateError(
                "The tokenizer has tools to parse but no `response_template` that says how its chat template writes "
                "calls.",
                remedy="Use a chat template that renders calls as one in trl/chat_templates does, or set "
                "`tokenizer.response_template` (see transformers' docs on response parsing).",
            )
        self._mark = f"x{secrets.token_hex(8)}"
        self._control = ControlTokens(tokenizer, self.stop_ids)
        self.control_ids = self._control.ids
        self._trims = not self._keeps_whitespace()

    # Reading a turn

    def parse(self, ids: Sequence[int], prefix: str, tools: Sequence[JSONSchema], number: int) -> ParsedTurn:
        """
        Parse the tokens of one assistant turn.

        Args:
            ids (`Sequence[int]`):
                Tokens of the turn.
            prefix (`str`):
                Text before the turn, at least from the assistant's header on.
            tools (`Sequence[dict]`):
                Schemas of the rollout's tools.
            number (`int`):
                Index of the turn in its rollout.
        """
        text = self.tokenizer.decode(ids)
        endings = (*self.stop_texts, self.tokenizer.eos_token or "")
        turn = parse_turn(text, self.response_template, prefix, tools, endings, number)
        calls = [] if turn is None else turn.calls
        if not calls and ids and ids[-1] in self._call_stop_ids:
            stop = self.tokenizer.decode([ids[-1]])
            error = f"the turn ends with {stop}, as a turn with a call does, and holds no call that can be read"
            calls = [ToolCall(f"call_{number}_0", "", error=error)]
        if turn is None or (calls and all(call.error is not None for call in calls)):
            # As in TRL, a turn without a readable call is text, so that reward functions see what was written
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            return ParsedTurn({"role": "assistant", "content": text}, calls)
        return turn

    @functools.cached_property
    def response_template(self) -> JSONObject:
        """How the chat template writes calls: the tokenizer's response template, or ours where that one is wrong."""
        template = self.tokenizer.response_template
        try:
            rendered = self.render_call("tool", {"argument": RAW_TEXT})
        except Exception:  # of a template that renders no call, which is refused where one is needed
            return template
        return corrected_template(template, rendered)

    @functools.cached_property
    def _call_stop_ids(self) -> frozenset[int]:
        """Tokens that only end turns with a call, such as `<|call|>`."""
        try:
            called = self._render([{"role": "tool", "name": "tool", "content": "dummy"}])
            said = f"{self._mark}s"
            user = {"role": "user", "content": "dummy"}
            plain = self.render([user, {"role": "assistant", "content": said}, user])
            after_call = self.first_stop(called[called.rindex(f"{self._mark}v") :])
            after_text = self.first_stop(plain[plain.rindex(said) :])
        except Exception:  # of a template that renders no such conversation
            return frozenset()
        stop, other = (found and found.group() for found in (after_call, after_text))
        return frozenset(id for id in self.stop_ids if stop != other and self.tokenizer.decode([id]) == stop)

    # Writing what follows it

    def truncate(self, text: str, limit: int) -> tuple[str, bool]:
        """
        Cut `text` to `limit` tokens, half from its beginning and half from its end, where an error says what failed,
        with a visible marker between them; return the text and whether it was cut.
        """
        most = 64 * limit + 64  # far more than any `limit` tokens hold, so that 50 MB are never tokenized
        encode = self._control.encode_inert
        if len(text) <= most and len(encode(text)) <= limit:
            return text, False
        after = limit // 2
        head = self.tokenizer.decode(encode(text[:most])[: limit - after])
        tail = self.tokenizer.decode(encode(text[-most:])[-after:]) if after else ""
        half_a_character = "\N{REPLACEMENT CHARACTER}"
        marker = TRUNCATION_MARKER.format(limit=limit)
        return head.rstrip(half_a_character) + marker + tail.lstrip(half_a_character), True

    def tool_suffix(self, last_id: int, messages: Sequence[Message]) -> tuple[list[int], str]:
        """
        Return the tokens between the end of an assistant turn and the start of the next.

        Args:
            last_id (`int`):
                Last token of the turn. If it is not the template's own end of turn, that is put first.
            messages (`Sequence[dict]`):
                Tool messages, in call order.

        Returns:
            `tuple[list[int], str]`: the tokens; the text after the last tool result, which opens the next turn.
        """
        wrapped = []
        for message in messages:
            content = str(message["content"]).strip() if self._trims else str(message["content"])
            wrapped.append({**message, "content": f"{self._mark}a{content}{self._mark}z"})
        rendered = self._render(wrapped)
        start = rendered.rindex(f"{self._mark}v") + len(f"{self._mark}v")
        pieces = rendered[start:].split(f"{self._mark}a")
        # pieces[0] is what follows the call; each later piece is a content, its end mark, and template text
        head, context = self._after_turn(pieces[0], last_id)
        segments: list[tuple[str, bool]] = [(head, False)]
        for piece in pieces[1:]:
            content, _, template = piece.partition(f"{self._mark}z")
            segments += [(content, True), (template, False)]
        return self._encode_segments(segments, context), segments[-1][0]

    def _after_turn(self, zone: str, last_id: int) -> tuple[str, str]:
        """Return the part of `zone` (text from the call's last argument to the first result) still to be written, and
        the control token just before it, which decides how its first characters are tokenized."""
        stop = self.tokenizer.decode([last_id])
        if last_id in self.stop_ids and stop in zone:
            return zone[zone.index(stop) + len(stop) :], stop
        first = self.first_stop(zone)
        if first is not None:
            return zone[first.start() :], ""
        closing = self._call_close.search(zone)
        return (zone[closing.end() :], "") if closing else (zone, "")

    @functools.cached_property
    def stop_texts(self) -> list[str]:
        """Text of the tokens that end a turn."""
        return [self.tokenizer.decode([id]) for id in sorted(self.stop_ids)]

    def first_stop(self, text: str) -> regex.Match[str] | None:
        """Return where the first token that ends a turn is written in a text; `None` if there is none."""
        return self._stop.search(text)

    @functools.cached_property
    def _stop(self) -> regex.Pattern[str]:
        """Pattern of the tokens that end a turn."""
        return regex.compile("|".join(map(regex.escape, self.stop_texts)) or r"(?!)")

    @functools.cached_property
    def _call_close(self) -> regex.Pattern[str]:
        """Pattern of the end of a call."""
        calls = self.response_template.get("fields", {}).get("tool_calls", {})
        pattern = calls.get("close_pattern") or regex.escape(calls.get("close", "")) or r"(?!)"
        return regex.compile(pattern.removesuffix(r"\s*"), regex.DOTALL)

    # Encoding

    def encode(self, text: str) -> list[int]:
        """Return the tokens of template text, control tokens included."""
        return self._control.encode(text)

    def pieces(self, text: str) -> list[str | int]:
        """Return template text in order: control tokens as their ids, the text between them unchanged."""
        return self._control.pieces(text)

    def _encode_segments(self, segments: Sequence[tuple[str, bool]], context: str) -> list[int]:
        """Encode template text and contents as one text if no content becomes a control token, else piece by
        piece."""
        whole, known = context + "".join(text for text, _ in segments), len(self.encode(context))
        ids = self.encode(whole)[known:]
        expected = [id for text, content in segments if not content for id in self.encode(text)]
        same = [i for i in ids if i in self.control_ids] == [i for i in expected if i in self.control_ids]
        if same and not self._touches_content(whole, len(context), segments):
            return ids
        ids = self.encode(context + segments[0][0])[known:]
        for text, content in segments[1:]:
            ids += self._control.encode_inert(text) if content else self.encode(text)
        return ids

    def _touches_content(self, whole: str, place: int, segments: Sequence[tuple[str, bool]]) -> bool:
        """Return whether the text of a control token overlaps a content."""
        spans = self._control.spans(whole)
        for text, content in segments:
            stop = place + len(text)
            if content and any(first < stop and place < last for first, last in spans):
                return True
            place = stop
        return False

    # Rendering

    def _render(self, results: Sequence[Message]) -> str:
        """Return the text of a dummy conversation with these results, after one call (Llama 3.1 refuses parallel
        ones)."""
        # Each result has its own id: Gemma 4 names it after the call of that id, and after itself if there is none
        results = [
            {**result, "name": self._header_name(result.get("name")), "tool_call_id": f"call_0_{index}"}
            for index, result in enumerate(results)
        ]
        return self.render_call(results[0]["name"], {"argument": f"{self._mark}v"}, results)

    def render_call(self, name: str, arguments: JSONObject, results: Sequence[Message] = ()) -> str:
        """Return the text of a dummy conversation with one call; see [`rendered_call`]."""
        return rendered_call(self.render, name, arguments, results)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation under the template and its arguments."""
        return self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self.chat_template,
            **self.template_kwargs,
        )

    def _keeps_whitespace(self) -> bool:
        """Return whether the template keeps white space around a tool result; this also proves that it renders one."""
        inner = f"{self._mark}i"
        try:
            rendered = self._render([{"role": "tool", "name": "tool", "content": f"  {inner}  "}])
            place = rendered.index(inner)
            rendered.rindex(f"{self._mark}v")
        except Exception as error:
            raise ChatTemplateError(
                f"The chat template cannot render a tool conversation (user, assistant with a call, tool result): "
                f"{type(error).__name__}: {error}.",
                remedy="Use a tool-capable template, such as one of trl/chat_templates.",
            ) from error
        return rendered[:place].endswith("  ")

    def _header_name(self, name: object) -> str:
        """
        Return the name a result is rendered with. Some templates put it between control tokens, and the policy may
        have written anything for it; what cannot be the name of a tool is not repeated there.
        """
        fits = isinstance(name, str) and regex.fullmatch(r"[\w.\-]+", name)
        return str(name) if fits and self.control_ids.isdisjoint(self.encode(str(name))) else "tool"


def tool_message(call: ToolCall, content: str) -> Message:
    """Return the message that answers a call."""
    return {"role": "tool", "name": call.name, "content": content, "tool_call_id": call.id}

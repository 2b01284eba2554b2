"""Token-exact chat: tokens in, tokens out, the history is never tokenized again.

Owns what stands between the tokens of two assistant turns: the template's closing of a turn, tool results, and the
opening of the next turn. Tool output is encoded so that none of it can become a control token. Works for every chat
template that can render a tool conversation, by rendering a small dummy conversation and cutting it at the end of the
assistant's turn.
"""

import functools
import json
import secrets
from collections.abc import Sequence
from typing import Any

import regex

from ..errors import ChatTemplateError
from ..tools.types import ToolCall
from .control_tokens import ControlTokens
from .parsing import ParsedTurn, parse_turn
from .response_templates import RAW_TEXT, mended


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
        ChatTemplateError: if the template cannot render a tool conversation so that earlier messages stay as they are,
            or no response template tells how calls are written.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Sequence[int],
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.chat_template = chat_template
        self.template_kwargs = template_kwargs or {}
        if getattr(tokenizer, "response_template", None) is None:
            raise ChatTemplateError(
                "The tokenizer has tools to parse but no `response_template` that says how its chat template writes "
                "calls. Use a chat template that renders calls as one in trl/chat_templates does, or set "
                "`tokenizer.response_template` (see transformers' docs on response parsing)."
            )
        self._mark = f"x{secrets.token_hex(8)}"
        self._control = ControlTokens(tokenizer, self.stop_ids)
        self.control_ids = self._control.ids
        self._trims = not self._keeps_whitespace()

    # Reading a turn

    def parse(self, ids: Sequence[int], prefix: str, tools: Sequence[dict], number: int) -> ParsedTurn:
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
            error = f"the turn ends with {stop}, as one that calls a tool, and holds no call that can be read"
            calls = [ToolCall(f"call_{number}_0", "", error=error)]
        if turn is None or (calls and all(call.error is not None for call in calls)):
            # As in TRL, a turn of which no call can be read is text, so that reward functions see what was written
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            return ParsedTurn({"role": "assistant", "content": text}, calls)
        return turn

    @functools.cached_property
    def response_template(self) -> dict[str, Any]:
        """How the chat template writes calls: the tokenizer's response template, or ours where that one is wrong."""
        template = self.tokenizer.response_template
        try:
            rendered = self.render_call("tool", {"argument": RAW_TEXT})
        except Exception:  # of a template that renders no call; it is refused where one is needed
            return template
        return mended(template, rendered)

    @functools.cached_property
    def _call_stop_ids(self) -> frozenset[int]:
        """Tokens that end a turn with a call and no other, such as `<|call|>`."""
        try:
            called = self._render([{"role": "tool", "name": "tool", "content": "dummy"}])
            said = f"{self._mark}s"
            user = {"role": "user", "content": "dummy"}
            plain = self.render([user, {"role": "assistant", "content": said}, user])
            stops = [self._first_stop(called, f"{self._mark}v"), self._first_stop(plain, said)]
        except Exception:  # of a template that renders no such conversation
            return frozenset()
        return frozenset(stop for stop in stops[:1] if stop is not None and stop != stops[1])

    def _first_stop(self, rendered: str, before: str) -> int | None:
        """The first token after `before` that ends a turn."""
        zone = rendered[rendered.rindex(before) + len(before) :]
        places = {
            zone.index(text): id
            for id, text in zip(sorted(self.stop_ids), self.stop_texts, strict=True)
            if text in zone
        }
        return places[min(places)] if places else None

    # Writing what follows it

    def truncate(self, text: str, limit: int) -> tuple[str, bool]:
        """
        Cut `text` to `limit` tokens, of which its beginning and its end, where an error says what failed, have half
        each, with a visible marker between them; returns the text and whether it was cut.
        """
        most = 64 * limit + 64  # far more than any `limit` tokens hold, so that 50 MB are never tokenized
        if len(text) <= most and len(self._encode_inert(text)) <= limit:
            return text, False
        after = limit // 2
        head = self.tokenizer.decode(self._encode_inert(text[:most])[: limit - after])
        tail = self.tokenizer.decode(self._encode_inert(text[-most:])[-after:]) if after else ""
        half_a_character = "\N{REPLACEMENT CHARACTER}"
        marker = TRUNCATION_MARKER.format(limit=limit)
        return head.rstrip(half_a_character) + marker + tail.lstrip(half_a_character), True

    def tool_suffix(self, last_id: int, messages: Sequence[dict[str, Any]]) -> tuple[list[int], str]:
        """
        Tokens between the end of an assistant turn and the start of the next.

        Args:
            last_id (`int`):
                Last token of the turn. If it is not the template's own end of turn, that is put first.
            messages (`Sequence[dict]`):
                Tool messages, in call order.

        Returns:
            `tuple[list[int], str]`: the tokens; the text after the last tool result, which opens the next turn.
        """
        contents = [str(message["content"]) for message in messages]
        wrapped = []
        for message, content in zip(messages, contents, strict=True):
            inner = content.strip() if self._trims else content
            wrapped.append({**message, "content": f"{self._mark}a{inner}{self._mark}z"})
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
        """The part of `zone` (text from the call's last argument to the first result) still to be written, and the
        control token just before it, which decides how its first characters are tokenized."""
        stop = self.tokenizer.decode([last_id])
        if last_id in self.stop_ids and stop in zone:
            return zone[zone.index(stop) + len(stop) :], stop
        ends = [zone.index(text) for text in self.stop_texts if text in zone]
        if ends:
            return zone[min(ends) :], ""
        closing = self._call_close.search(zone)
        return (zone[closing.end() :], "") if closing else (zone, "")

    @functools.cached_property
    def stop_texts(self) -> list[str]:
        """Text of the tokens that end a turn."""
        return [self.tokenizer.decode([id]) for id in sorted(self.stop_ids)]

    @functools.cached_property
    def _call_close(self) -> Any:
        calls = self.response_template.get("fields", {}).get("tool_calls", {})
        pattern = calls.get("close_pattern") or regex.escape(calls.get("close", "")) or r"(?!)"
        return regex.compile(pattern.removesuffix(r"\s*"), regex.DOTALL)

    # Encoding

    def encode(self, text: str) -> list[int]:
        """Tokens of template text, control tokens included."""
        return self._encode(text)

    def pieces(self, text: str) -> list[str | int]:
        """Template text in order: control tokens as their ids, the text between them as it is."""
        return self._control.pieces(text)

    def _encode(self, text: str) -> list[int]:
        return self._control.encode(text)

    def _encode_segments(self, segments: Sequence[tuple[str, bool]], context: str) -> list[int]:
        """Encode template text and contents as one text if no control token comes of a content, else piece by
        piece."""
        whole = context + "".join(text for text, _ in segments)
        ids = self._encode(whole)[len(self._encode(context)) :]
        expected = [id for text, content in segments if not content for id in self._encode(text)]
        same = [i for i in ids if i in self.control_ids] == [i for i in expected if i in self.control_ids]
        if same and not self._touches_content(whole, len(context), segments):
            return ids
        ids = self._encode(context + segments[0][0])[len(self._encode(context)) :]
        for text, content in segments[1:]:
            ids += self._encode_inert(text) if content else self._encode(text)
        return ids

    def _touches_content(self, whole: str, place: int, segments: Sequence[tuple[str, bool]]) -> bool:
        """Whether the text of a control token lies in a content or begins or ends in one."""
        spans = self._control.spans(whole)
        for text, content in segments:
            stop = place + len(text)
            if content and any(first < stop and place < last for first, last in spans):
                return True
            place = stop
        return False

    def _encode_inert(self, text: str) -> list[int]:
        """Encode text so that no control token comes of it; it decodes to the same text."""
        return self._control.encode_inert(text)

    # Rendering

    def _render(self, results: Sequence[dict[str, Any]]) -> str:
        """The text of a dummy conversation with these results, after one call (Llama 3.1 refuses parallel ones)."""
        # Ids of their own, as Gemma 4 names a result after the call of its id, and after itself if there is none
        results = [
            {**result, "name": self._header_name(result.get("name")), "tool_call_id": f"call_0_{index}"}
            for index, result in enumerate(results)
        ]
        return self.render_call(results[0]["name"], {"argument": f"{self._mark}v"}, results)

    def render_call(self, name: str, arguments: dict[str, Any], results: Sequence[dict[str, Any]] = ()) -> str:
        """Text of a dummy conversation with one call; it ends on the call, or behind its results as the next turn
        begins."""
        function: dict[str, Any] = {"name": name, "arguments": arguments}
        call = {"type": "function", "id": "call_0_0", "function": function}
        assistant: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
        messages = [{"role": "user", "content": "dummy"}, assistant, *results]
        try:
            return self.render(messages, add_generation_prompt=bool(results))
        except TypeError:  # templates that concatenate the arguments as text (DeepSeek-V3)
            function["arguments"] = json.dumps(arguments)
            return self.render(messages, add_generation_prompt=bool(results))

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Text of a conversation under the template and its arguments."""
        return self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self.chat_template,
            **self.template_kwargs,
        )

    def _keeps_whitespace(self) -> bool:
        """Whether the template leaves white space around a tool result as it is; also proves that it renders one."""
        inner = f"{self._mark}i"
        try:
            rendered = self._render([{"role": "tool", "name": "tool", "content": f"  {inner}  "}])
            place = rendered.index(inner)
            rendered.rindex(f"{self._mark}v")
        except Exception as error:
            raise ChatTemplateError(
                f"The chat template cannot render a tool conversation (user, assistant with a call, tool result): "
                f"{type(error).__name__}: {error}. Use a tool-capable template, such as one of trl/chat_templates."
            ) from error
        return rendered[:place].endswith("  ")

    def _header_name(self, name: Any) -> str:
        """
        The name a result is rendered with. Some templates put it between control tokens, and the policy may have
        written anything for it; what cannot be the name of a tool is not repeated there.
        """
        fits = isinstance(name, str) and regex.fullmatch(r"[\w.\-]+", name)
        return name if fits and self.control_ids.isdisjoint(self._encode(name)) else "tool"


def tool_message(call: ToolCall, content: str) -> dict[str, Any]:
    """The message that answers a call."""
    return {"role": "tool", "name": call.name, "content": content, "tool_call_id": call.id}

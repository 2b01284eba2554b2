"""Constrained turns: which tokens the grammar of a call's body allows next, by llguidance (extra `schema`).

Every token sampled under a constraint counts as forced: it was not sampled from the distribution the trainer scores.
"""

import json
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..chat.call_grammar import CallGrammar
from ..chat.tool_chat import ToolChat
from ..errors import SamplerError, ToolSchemaError
from ..tools.tool import Tool


if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


logger = logging.getLogger(__name__)


class GrammarConstraint:
    """
    A position in a compiled grammar; see [`TokenConstraint`] for the protocol.

    Args:
        matcher (`llguidance.LLMatcher`):
            A matcher of its own, at the start of the grammar.
    """

    def __init__(self, matcher: "LLMatcher"):
        self._matcher = matcher

    def allowed(self, size: int) -> Tensor:
        """Return a mask of the tokens that may come next, see [`TokenConstraint.allowed`]."""
        known = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()[:size]
        self._check()
        if not bool(known.any()):
            raise SamplerError("A constrained turn cannot go on: its grammar allows no token of the vocabulary.")
        return torch.nn.functional.pad(known, (0, size - len(known)))

    def accept(self, token_id: int) -> None:
        """Advance by one token, see [`TokenConstraint.accept`]."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SamplerError(f"A constrained turn cannot go on: {self._matcher.get_error()}")


class CallConstraints:
    """
    Constraints for the bodies of calls, compiled once for each tool.

    Args:
        chat (`ToolChat`):
            Chat handling of the tokenizer and template.

    Attributes:
        unsatisfiable (`int`):
            Number of bodies left free since no grammar could be made of the tool's schema.

    Raises:
        ImportError: if llguidance is not installed.
        ChatTemplateError: if the template does not show how it writes arguments.
    """

    def __init__(self, chat: ToolChat):
        try:
            import llguidance
        except ImportError as error:
            raise ImportError(
                "You passed `force_level='schema'`, which constrains a call to its tool's schema with llguidance, "
                "which is not installed. Run `pip install 'trl_toolgrpo[schema]'`, or use `force_level='name'`."
            ) from error
        self._llguidance = llguidance
        self._grammar = CallGrammar(chat)
        self._tokenizer = self._read_tokenizer(chat)
        self._matchers: dict[str, LLMatcher | None] = {}
        self.unsatisfiable = 0

    def begin(self, tool: Tool) -> GrammarConstraint | None:
        """Return a constraint for the body of a call of `tool`; `None`, counted, if its schema cannot be satisfied."""
        key = json.dumps([tool.name, tool.parameters], default=str)
        if key not in self._matchers:
            self._matchers[key] = self._compile(tool)
        matcher = self._matchers[key]
        if matcher is None:
            self.unsatisfiable += 1
            return None
        return GrammarConstraint(matcher.deep_copy())

    def _compile(self, tool: Tool) -> "LLMatcher | None":
        """Return a matcher at the start of the grammar of a call's body; `None`, with a warning, if there is none."""
        try:
            matcher = self._llguidance.LLMatcher(self._tokenizer, self._grammar.of(tool), log_level=0)
            reason = matcher.get_error()
        except ToolSchemaError as error:
            reason = str(error)
        if not reason:
            return matcher
        logger.warning(
            "The body of a forced call of `%s` cannot be constrained to its schema, so only the name is forced: %s",
            tool.name,
            reason.strip().splitlines()[0],
        )
        return None

    def _read_tokenizer(self, chat: ToolChat) -> "LLTokenizer":
        """Return the tokenizer as llguidance reads it, with no control token reachable by free text."""
        description = json.loads(chat.tokenizer.backend_tokenizer.to_str())
        description.update(truncation=None, padding=None)
        for token in description["added_tokens"]:
            token["special"] = token["id"] in chat.control_ids
        eos = sorted(chat.stop_ids)
        return self._llguidance.LLTokenizer(json.dumps(description), eos_token=eos)

"""Forced tool calls: when a turn begins with one, and with which tokens.

Forced tokens were not sampled from the policy, so each is marked in `Trajectory.forced_mask` and weighs nothing in a
policy-gradient update.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import regex

from ..chat.tool_chat import ToolChat
from ..errors import ChatTemplateError, ToolNameError
from ..sampling.constraint import CallConstraints
from ..sampling.noise import RolloutNoise
from ..sampling.protocol import TokenConstraint
from ..tools.tool import Tool
from .trajectory import Trajectory


ForcePolicy = Callable[[Trajectory, list[Tool]], str]

_FORCED_NAME = "forced_name_7c1e"
_MARKUP = regex.compile(r"\s*(?:<\|[^|>]+\|>|<[^\s<>]+>|<\|[^|>\s]+>)")


class CallPrefixes:
    """
    How a chat template opens a tool call.

    Args:
        chat (`ToolChat`):
            Chat handling of the tokenizer and template.

    Raises:
        ChatTemplateError: if the template does not show it.
    """

    def __init__(self, chat: ToolChat):
        self._chat = chat
        start = chat.render([{"role": "user", "content": "dummy"}], add_generation_prompt=True)
        rendered = chat.render_call(_FORCED_NAME, {})
        thought_end, opening = self._closing_of_thought(start, rendered), self._opening(rendered)
        markup = _MARKUP.match(opening)
        self._marker = thought_end + (markup.group() if markup else opening.rstrip('" \n'))
        self._until_name = thought_end + opening

    def tokens(self, name: str | None = None) -> list[int]:
        """Return the tokens of the call-opening marker, or of everything through the tool's `name`."""
        return self._chat.encode(self._marker if name is None else self._until_name + name)

    def _opening(self, rendered: str) -> str:
        """Return the text from the start of the call to its name."""
        calls = self._chat.response_template.get("fields", {}).get("tool_calls", {})
        pattern = calls.get("open_pattern") or regex.escape(calls.get("open") or "")
        end = rendered.rfind(_FORCED_NAME)
        starts = [match.start() for match in regex.finditer(pattern, rendered, regex.DOTALL) if match.start() < end]
        if not pattern or end < 0 or not starts:
            raise ChatTemplateError(
                "You passed `force_rate` above 0, but the chat template and its response template do not show how a "
                "tool call opens.",
                remedy="Use a chat template TRL ships, or leave `force_rate` at 0.",
            )
        return rendered[starts[-1] : end]

    @staticmethod
    def _closing_of_thought(start: str, rendered: str) -> str:
        """Return what closes a thought that the generation prompt itself has opened."""
        if "<think>" not in start or "</think>" in start[start.rindex("<think>") :]:
            return ""
        closing = rendered[rendered.rindex("</think>") :] if "</think>" in rendered else "</think>\n\n"
        return regex.match(r"</think>\s*", closing).group()


@dataclass
class ForcedStart:
    """
    The forced beginning of a turn.

    Args:
        token_ids (`list[int]`):
            Literal tokens; none if the turn is not forced.
        constraint ([`TokenConstraint`], *optional*):
            What the rest of the turn is constrained to.
    """

    token_ids: list[int]
    constraint: TokenConstraint | None = None


@dataclass(eq=False)
class Forcing:
    """
    Decides turn by turn what is forced.

    Args:
        prefixes (`CallPrefixes`):
            Openings of the template.
        rate (`float`):
            Probability that a turn is forced.
        level (`str`):
            `"call"` for the opening marker alone, `"name"` for everything through the tool's name, `"schema"` for a
            whole turn of one call whose arguments match the tool's schema.
        seed (`int`):
            Seed of the draws.
        policy (`Callable`, *optional*):
            `policy(trajectory, tools)` names the tool to force; uniform by default.
        constraints ([`CallConstraints`], *optional*):
            Needed at level `"schema"`.
        noise ([`RolloutNoise`], *optional*):
            Makes each draw depend only on its rollout and turn, instead of on the draws before it.
    """

    prefixes: CallPrefixes
    rate: float
    level: str
    seed: int
    policy: ForcePolicy | None = None
    constraints: CallConstraints | None = None
    noise: RolloutNoise | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def begin_turn(self, trajectory: Trajectory, tools: Mapping[str, Tool], row: int = 0) -> ForcedStart:
        """
        Return the forced beginning of a turn, empty if it is not forced.

        Args:
            trajectory (`Trajectory`):
                The rollout so far.
            tools (`Mapping[str, Tool]`):
                Its tools.
            row (`int`, *optional*, defaults to `0`):
                Its place in the batch.

        Raises:
            ToolNameError: if the policy names a tool the rollout does not have.
        """
        draws = self._random if self.noise is None else self.noise.other("turn", row, len(trajectory.turns))
        if not tools or draws.random() >= self.rate:
            return ForcedStart([])
        if self.level == "call":
            return ForcedStart(self.prefixes.tokens())
        name = draws.choice(sorted(tools))
        if self.policy is not None:
            name = self.policy(trajectory, list(tools.values()))
            if name not in tools:
                raise ToolNameError(
                    f"Your `force_policy` named the tool {name!r}, which this rollout does not have.",
                    remedy=f"Return one of {', '.join(sorted(tools))}.",
                )
        constraint = self.constraints.begin(tools[name]) if self.constraints is not None else None
        return ForcedStart(self.prefixes.tokens(name), constraint)

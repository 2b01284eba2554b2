"""What a model card says of a run: its use, task, tools, rewards, curves, configuration, command and versions.

Owns the texts, as pure functions of plain values; `run_card.py` gathers those and puts the texts into the card that
TRL writes.
"""

import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import yaml

from .redaction import masked_arguments
from .tools.types import Tool


PROCEDURE = "## Training procedure"
VERSIONS = "### Framework versions\n"
"""Headings of TRL's card; what stands behind the first of them is kept."""
RANK = "MACHINE_RANK"
FIRST = "FIRST_MACHINE"
"""What a reader of a command for several machines replaces."""

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 30
_SHOWN = (
    *("kl", "loss", "reward", "reward_std", "entropy", "success", "valid_calls"),
    *("completions/mean_length", "forced/fraction", "ratio/mean", "ratio/std", "ref/kl", "rollout/turns_mean"),
    *("tools/call_frequency", "tools/failure_frequency", "value/explained_variance", "value/loss"),
)


def compose(card: str, title: str, sections: Sequence[str], versions: Mapping[str, str]) -> str:
    """
    The text of a card from TRL's.

    Args:
        card (`str`):
            Text of TRL's card. Its quick start, which asks a question without tools, is left out; the badges, the
            versions and the citations are kept.
        title (`str`):
            First lines.
        sections (`Sequence[str]`):
            What comes before the training procedure.
        versions (`Mapping[str, str]`):
            Packages that TRL does not name, with their versions.
    """
    kept = card[card.index(PROCEDURE) :] if PROCEDURE in card else ""
    added = "".join(f"- {name}: {version}\n" for name, version in versions.items())
    kept = kept.replace(VERSIONS, f"{VERSIONS}\n{added.rstrip()}", 1)
    return "\n\n".join(part.strip() for part in [title, *sections, kept] if part.strip()) + "\n"


def usage(repo: str, base: str | None, adapter: bool, value_head: bool) -> str:
    """
    How the model is loaded.

    Args:
        repo (`str`):
            Id on the Hub.
        base (`str`, *optional*):
            Id of the base model; `None` for one that is not on the Hub.
        adapter (`bool`):
            Whether the files are those of an adapter.
        value_head (`bool`):
            Whether a value head is beside it.
    """
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'base = AutoModelForCausalLM.from_pretrained("{base or "<folder of the base model>"}")')
        lines.append(f'model = PeftModel.from_pretrained(base, "{repo}")')
    else:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{repo}")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo}")')
    lines.append("text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)")
    text = _code("\n".join(lines), "python")
    if value_head:
        head = "from trl_toolgrpo import ValueHead"
        text += "\n\nThe value head of the training run is in `value_head.safetensors`:\n\n"
        text += _code(f'{head}\n\nvalue_head = ValueHead.from_pretrained("{repo}")', "python")
    return f"## Use\n\n{text}"


def task(dataset: str | None, rows: int | None, columns: Sequence[str], environments: Mapping[str, str]) -> str:
    """
    What it was trained on.

    Args:
        dataset (`str`, *optional*):
            Its name.
        rows (`int`, *optional*):
            Number of its rows; `None` for a stream.
        columns (`Sequence[str]`):
            Its columns.
        environments (`Mapping[str, str]`):
            Class of each environment with its description.
    """
    size = f"{rows} prompts" if rows is not None else "a stream of prompts"
    named = f" of `{dataset}`" if dataset else ""
    lines = [f"Trained on {size}{named} (columns {', '.join(f'`{name}`' for name in columns)})."]
    lines += [f"Environment `{name}`: {text}" for name, text in environments.items()]
    return "## Task\n\n" + "\n\n".join(lines)


def tools(known: Sequence[Tool], decided_at_reset: bool = False) -> str:
    """
    A table of the tools.

    Args:
        known (`Sequence[Tool]`):
            Tools of the run.
        decided_at_reset (`bool`, *optional*, defaults to `False`):
            Whether environments bring tools of their own to each rollout.
    """
    parts = []
    if known:
        rows = [(f"`{tool.name}`", _arguments(tool.parameters), first_paragraph(tool.description)) for tool in known]
        parts.append(_table(("tool", "arguments", "what it does"), rows))
    if decided_at_reset:
        parts.append("Each rollout had tools of its own, which its environment brought.")
    return "## Tools\n\n" + ("\n\n".join(parts) or "None.")


def rewards(functions: Sequence[tuple[str, float, str | None]]) -> str:
    """
    A table of the reward functions.

    Args:
        functions (`Sequence[tuple[str, float, str | None]]`):
            Name, weight and docstring of each.
    """
    rows = [(f"`{name}`", f"{weight:g}", first_paragraph(text)) for name, weight, text in functions]
    return "## Rewards\n\n" + (_table(("function", "weight", "what it rewards"), rows) if rows else "None.")


def curves(log: Sequence[Mapping[str, Any]]) -> str:
    """
    The curves of a run, each as a line of bars.

    Args:
        log (`Sequence[Mapping[str, Any]]`):
            The trainer's log history.
    """
    found: dict[str, list[float]] = {}
    for entry in log:
        for name, value in entry.items():
            held_out = name.startswith("eval_") and any(name.endswith(f"_{shown}") for shown in _SHOWN)
            if (name in _SHOWN or held_out or name.startswith("rewards/")) and _is_number(value):
                found.setdefault(name, []).append(float(value))
    if not found:
        return "## Curves\n\nNothing was logged."
    steps = [entry["step"] for entry in log if "step" in entry]
    rows = [
        (f"`{name}`", *(f"{value:.4g}" for value in (y[0], y[-1], min(y), max(y))), bars(y))
        for name, y in sorted(found.items())
    ]
    head = ("figure", "first", "last", "least", "most", "curve")
    return f"## Curves\n\nOptimizer steps {min(steps)} to {max(steps)}.\n\n{_table(head, rows)}"


def bars(values: Sequence[float], width: int = _WIDTH) -> str:
    """
    A curve as a line of bars, each the mean of its share of the values.

    Args:
        values (`Sequence[float]`):
            Finite values, at least one.
        width (`int`, *optional*, defaults to `30`):
            Most bars.
    """
    count = min(width, len(values))
    cuts = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, spread = min(means), max(means) - min(means)
    heights = [0 if spread == 0 else round((mean - low) / spread * (len(_BARS) - 1)) for mean in means]
    return "".join(_BARS[height] for height in heights)


def configuration(fields: Mapping[str, Any]) -> str:
    """The fields of the configuration that were set, as YAML."""
    plain = yaml.safe_dump(dict(fields), sort_keys=True, allow_unicode=True) if fields else "{}\n"
    return f"## Configuration\n\nWhat differs from the defaults:\n\n{_code(plain.rstrip(), 'yaml')}"


def command(launcher: Sequence[str], arguments: Sequence[str], machines: int = 1) -> str:
    """
    The command that reproduces the run.

    Args:
        launcher (`Sequence[str]`):
            What starts the script.
        arguments (`Sequence[str]`):
            Script and its arguments, shown without their secrets: see [`masked_arguments`].
        machines (`int`, *optional*, defaults to `1`):
            On how many it is to be given.
    """
    text = "## Command\n\n"
    if machines > 1:
        text += f"On each of {machines} machines, with its number from 0 for `{RANK}` and the address of the first "
        text += f"for `{FIRST}`:\n\n"
    return text + _code(shlex.join([*launcher, *masked_arguments(arguments)]), "bash")


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _arguments(schema: Mapping[str, Any]) -> str:
    required = set(schema.get("required") or ())
    parts = []
    for name, inner in (schema.get("properties") or {}).items():
        kind = inner.get("type") if isinstance(inner, dict) else None
        optional = "" if name in required else ", optional"
        parts.append(f"`{name}`" + (f" ({kind}{optional})" if isinstance(kind, str) else ""))
    return ", ".join(parts) or "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str, language: str) -> str:
    fence = "```" if "```" not in text else "````"
    return f"{fence}{language}\n{text}\n{fence}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) < 1e300

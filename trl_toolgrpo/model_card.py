"""What a model card says of a run: its use, task, tools, rewards, curves, configuration, command and versions.

Owns the texts, as pure functions of plain values; `run_card.py` gathers those and puts the texts into the card that
TRL writes.
"""

import json
import keyword
import pprint
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import yaml

from .curve_noise import is_flat
from .redaction import masked_arguments
from .tools.types import Tool


PROCEDURE = "## Training procedure"
VERSIONS = "### Framework versions\n"
"""Headings of TRL's card; what stands behind the first of them is kept."""
METHOD = re.compile(r"^This model was trained with .*$", re.MULTILINE)
"""TRL's sentence on the method."""
RANK = "MACHINE_RANK"
FIRST = "FIRST_MACHINE"
"""What a reader of a command for several machines replaces."""

_LOSSES = {
    "grpo": ("a clipped ratio, averaged over each rollout", "2402.03300", "DeepSeekMath"),
    "bnpo": ("a clipped ratio, averaged over the tokens of a batch", "1707.06347", "PPO"),
    "dr_grpo": ("a clipped ratio, summed over tokens by a constant", "2503.20783", "Dr. GRPO"),
    "dapo": ("a clipped ratio, averaged over all tokens of an update", "2503.14476", "DAPO"),
    "cispo": ("clipped importance weights", "2506.13585", "MiniMax-M1"),
    "luspo": ("losses of sequences, scaled by their length", "2602.05261", "LUSPO"),
    "vespo": ("soft weights of whole sequences", "2602.10693", "VESPO"),
    "sapo": ("a soft gate in place of a clipped ratio", "2511.20347", "SAPO"),
}
"""Losses with what they do and the paper that introduced them."""
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 30
_SHOWN = (
    *("kl", "loss", "reward", "reward_std", "entropy", "success", "valid_calls"),
    *("completions/mean_length", "forced/fraction", "ratio/mean", "ratio/std", "ref/kl", "rollout/turns_mean"),
    *("tools/call_frequency", "tools/failure_frequency", "value/explained_variance", "value/loss"),
)


def compose(card: str, title: str, sections: Sequence[str], versions: Mapping[str, str], method: str = "") -> str:
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
        method (`str`, *optional*):
            What takes the place of TRL's sentence on the method, which knows of one paper alone.
    """
    kept = card[card.index(PROCEDURE) :] if PROCEDURE in card else ""
    added = "".join(f"- {name}: {version}\n" for name, version in versions.items())
    kept = kept.replace(VERSIONS, f"{VERSIONS}\n{added.rstrip()}", 1)
    if method:
        kept = METHOD.sub(lambda match: method, kept, count=1)
    return "\n\n".join(part.strip() for part in [title, *sections, kept] if part.strip()) + "\n"


def usage(
    model: str,
    base: str | None,
    tools: Sequence[Mapping[str, Any]],
    template: Mapping[str, Any] | None,
    *,
    adapter: bool = False,
    value_head: bool = False,
    multimodal: bool = False,
    max_new_tokens: int = 256,
    base_options: Mapping[str, Any] | None = None,
    saved: bool = True,
) -> str:
    """
    How the model is loaded and asked, with prompts rendered as in training; the code runs as it stands.

    Args:
        model (`str`):
            Id on the Hub, or a folder.
        base (`str`, *optional*):
            Id of the base model; `None` for one that is not on the Hub, which an adapter's own configuration names.
        tools (`Sequence[Mapping]`):
            Schemas of the tools, as the chat template gets them.
        template (`Mapping[str, Any]`, *optional*):
            Arguments that the chat template gets in addition; `None` where prompts are plain texts.
        adapter (`bool`, *optional*, defaults to `False`):
            Whether the files are those of an adapter.
        value_head (`bool`, *optional*, defaults to `False`):
            Whether they include a value head.
        multimodal (`bool`, *optional*, defaults to `False`):
            Whether the model takes images too.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens that the example generates.
        base_options (`Mapping[str, Any]`, *optional*):
            Arguments that the base model is loaded with.
        saved (`bool`, *optional*, defaults to `True`):
            Whether the model is there already.
    """
    kind, reader, name = "AutoModelForCausalLM", "AutoTokenizer", "tokenizer"
    if multimodal:
        kind, reader, name = "AutoModelForImageTextToText", "AutoProcessor", "processor"
    place, options = json.dumps(model, ensure_ascii=False), dict(base_options or {})
    trusts = {key: value for key, value in options.items() if key == "trust_remote_code"}
    lines = [f"from transformers import {kind}, {reader}", ""]
    if adapter:
        lines.insert(0, f"from peft import {'PeftModel' if base else 'PeftConfig, PeftModel'}")
        source = json.dumps(base) if base else f"PeftConfig.from_pretrained({place}).base_model_name_or_path"
        lines.append(f"base = {kind}.from_pretrained({source}{_keywords(options)})")
        lines.append(f"model = PeftModel.from_pretrained(base, {place})")
    else:
        lines.append(f"model = {kind}.from_pretrained({place}{_keywords(trusts)})")
    lines.append(f"{name} = {reader}.from_pretrained({place}{_keywords(trusts)})")
    lines.append("")
    question = "Hello! What can you do for me?"
    if template is None:
        lines.append(f'inputs = {name}(text="{question}", return_tensors="pt").to(model.device)')
    else:
        if tools:
            lines += [f"tools = {pprint.pformat([dict(tool) for tool in tools], width=110, sort_dicts=False)}", ""]
        content: Any = [{"type": "text", "text": question}] if multimodal else question
        lines.append(f"messages = [{json.dumps({'role': 'user', 'content': content})}]")
        lines.append(f"inputs = {name}.apply_chat_template(")
        shown = ", tools=tools" if tools else ""
        lines.append(f"    messages{shown}, add_generation_prompt=True{_keywords(template)},")
        lines.append('    tokenize=True, return_dict=True, return_tensors="pt",')
        lines.append(").to(model.device)")
    # By name for a text model, which refuses the token types that some tokenizers add
    given = "**inputs" if multimodal else 'inputs["input_ids"], attention_mask=inputs["attention_mask"]'
    lines.append(f"output = model.generate({given}, max_new_tokens={max_new_tokens})")
    lines.append(f'print({name}.decode(output[0, inputs["input_ids"].shape[1] :]))')
    text = _code("\n".join(lines), "python")
    if template is not None:
        text += (
            "\n\nPut messages of your own in place of the question: the system message of the training prompts, if "
            "they had one, and what tools return as messages of the role `tool`."
        )
    if value_head:
        head = "from trl_toolgrpo import ValueHead"
        text += "\n\nThe value head of the training run is in `value_head.safetensors`:\n\n"
        text += _code(f"{head}\n\nvalue_head = ValueHead.from_pretrained({place})", "python")
    first = "" if saved else "The model was not saved yet; `trainer.save_model()` writes it to this folder.\n\n"
    return f"## Use\n\n{first}{text}"


def method(estimator: str, loss: str, level: str = "token", adapter: bool = False) -> str:
    """
    The parts of the training method, each with the paper that introduced it.

    Args:
        estimator (`str`):
            `advantage_estimator` of the configuration.
        loss (`str`):
            `loss_type`.
        level (`str`, *optional*, defaults to `"token"`):
            `importance_sampling_level`.
        adapter (`bool`, *optional*, defaults to `False`):
            Whether an adapter is trained.
    """
    parts = []
    if estimator != "gae":
        parts.append(("advantages relative to a group of rollouts (GRPO)", "2402.03300", "DeepSeekMath"))
    if estimator != "group":
        parts.append(("generalized advantage estimation with a value head", "1506.02438", "GAE"))
    if loss not in _LOSSES:
        parts.append((f"the loss `{loss}`", "", ""))
    else:
        parts.append(_LOSSES[loss])
    if level.startswith("sequence"):
        parts.append(("ratios of whole sequences", "2507.18071", "GSPO"))
    lines = [f"{what} ([{title}](https://huggingface.co/papers/{id}))" if id else what for what, id, title in parts]
    lines.append("rollouts that call tools, with the log-prob of each token recorded as it was sampled (trl_toolgrpo)")
    trained = "An adapter was" if adapter else "All weights were"
    return f"{trained} trained with the parts of several methods:\n\n" + "\n".join(f"- {line}" for line in lines)


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
        (f"`{name}`", *(f"{value:.4g}" for value in (y[0], y[-1], min(y), max(y))), bars(y, metric=name))
        for name, y in sorted(found.items())
    ]
    head = ("figure", "first", "last", "least", "most", "curve")
    return f"## Curves\n\nOptimizer steps {min(steps)} to {max(steps)}.\n\n{_table(head, rows)}"


def bars(values: Sequence[float], width: int = _WIDTH, metric: str = "") -> str:
    """
    A curve as a line of bars, each the mean of its share of the values; level where only rounding moves it.

    Args:
        values (`Sequence[float]`):
            Finite values, at least one.
        width (`int`, *optional*, defaults to `30`):
            Most bars.
        metric (`str`, *optional*):
            Name of the figure, which says what its rounding is.
    """
    count = min(width, len(values))
    cuts = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, spread = min(means), max(means) - min(means)
    flat = is_flat(min(values), max(values), metric)
    heights = [0 if flat or spread == 0 else round((mean - low) / spread * (len(_BARS) - 1)) for mean in means]
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


def _keywords(options: Mapping[str, Any]) -> str:
    """Arguments after others in a call, as Python writes them."""
    odd = {name: value for name, value in options.items() if not name.isidentifier() or keyword.iskeyword(name)}
    plain = [f", {name}={value!r}" for name, value in options.items() if name not in odd]
    return "".join(plain) + (f", **{odd!r}" if odd else "")


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

"""The model card of a run: how the model is used, and how it was trained, without secrets.

`RunCard` gathers what the trainer knows and renders `model_card.jinja` with it. The metadata, the badges of trackers,
the versions and the citations are those of TRL's own card.
"""

import json
import keyword
import os
import pprint
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import get_int_from_env
from huggingface_hub import ModelCard
from trl.trainer.utils import get_config_model_id

from ..algorithms.base import AdvantageEstimator
from ..checkpoints.folder import checkpoints, fault_of
from ..config.fields import changed_fields
from ..monitoring.curve_noise import is_flat
from ..monitoring.records import Records
from ..redaction import masked, masked_arguments
from ..rollout.rollouts import Rollouts
from ..run_folder.files import CARD, holds_other_page
from ..trl_hooks import Run
from ..types import JSONObject
from ..version import __version__


PROCEDURE = "## Training procedure"
VERSIONS = "### Framework versions"
"""Headings of TRL's card; what follows the first of them is kept."""
METHOD = re.compile(r"^This model was trained with .*$", re.MULTILINE)
"""TRL's sentence on the method, which names one paper alone. A list of the methods takes its place."""

_TEMPLATE = Path(__file__).with_name("model_card.jinja")
_PACKAGES = {"PEFT": "peft", "Accelerate": "accelerate", "huggingface_hub": "huggingface_hub"}
# Losses with what they do and the paper that introduced them
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
_CURVES = re.compile(
    r"rewards/.*|(eval_.*_|eval_)?(kl|loss|reward|reward_std|entropy|success|valid_calls|completions/mean_length"
    r"|forced/fraction|ratio/mean|ratio/std|ref/kl|rollout/turns_mean|tools/call_frequency|tools/failure_frequency"
    r"|value/explained_variance|value/loss)"
)
_BARS = "▁▂▃▄▅▆▇█"
# Fields of the configuration that describe this machine or account, and not the run
_PRIVATE = re.compile(r"(output_dir|logging_dir|run_name|push_to_hub|hub_.*|.*token|trackio_.*|project|disable_tqdm)$")
# Options of `accelerate launch` that are not named as the variables that it passes them on in
_LAUNCH_OPTIONS = {
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
}


class RunCard:
    """
    The model card of a run, and when it is written.

    Args:
        run ([`Run`]):
            The run.
        rollouts ([`Rollouts`]), records ([`Records`]), estimator ([`AdvantageEstimator`]):
            What the card tells of.
    """

    def __init__(self, run: Run, rollouts: Rollouts, records: Records, estimator: AdvantageEstimator) -> None:
        self._run, self._rollouts, self._records, self._estimator = run, rollouts, records, estimator
        self._home: str | None = None  # the output folder, while another one stands in for it
        self._publishing = False  # what is written goes to the Hub
        self.is_due = False  # a training has ended, and none is in progress

    def write(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the model card: how the model is loaded, its task, tools, rewards and curves, the configuration, and the
        command that reproduces it. Secrets are replaced. A `README.md` that is no model card is left alone.

        Args:
            model_name, dataset_name, tags:
                As in TRL.
        """
        run, failures = self._run, self._records.failures
        if not run.is_main_process:
            return
        with failures.tolerated("The model card could not be written"):
            folder = Path(str(run.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            if holds_other_page(folder):
                sentence = f"No model card was written: {folder / CARD} is there, and is none"
                return failures.warn_once(sentence, sentence)
            name = model_name or self.repo_name.split("/")[-1]
            tags = [tags] if isinstance(tags, str) else tags or []
            run.trl_model_card(name, dataset_name, [*tags, *(getattr(run.model, "model_tags", None) or ())])
            card = ModelCard.load(folder / CARD)
            if self._has_adapter:
                card.data.library_name = "peft"
            badges, versions = METHOD.split(card.text[card.text.index(PROCEDURE) :], maxsplit=1)
            facts = self._facts() | {
                "name": name,
                "dataset_name": dataset_name,
                "badges": badges,
                "versions_and_citations": versions.replace(VERSIONS, ""),
            }
            card = ModelCard.from_template(card.data, template_path=str(_TEMPLATE), **facts)
            card.text = self._records.redacted(card.text) + "\n"
            card.save(folder / CARD)

    def on_train_begin(self) -> None:
        """Write no card until training has ended."""
        self.is_due = False

    def on_train_end(self) -> None:
        """Write the card."""
        self.is_due = True
        self.update()

    def update(self) -> None:
        """Write the card of the output folder anew after training, unless another run has begun there."""
        if self.is_due and self._records.log.owns_folder():
            self._run.create_model_card()

    @contextmanager
    def output_in(self, folder: Path, publishing: bool = False) -> Iterator[None]:
        """While open, TRL and transformers write to another folder than `output_dir`."""
        args = self._run.args
        usual = args.output_dir
        self._home, self._publishing, args.output_dir = str(usual), publishing, str(folder)
        try:
            yield
        finally:
            self._home, self._publishing, args.output_dir = None, False, usual

    @property
    def name_of_run(self) -> str:
        """Name of the output folder."""
        return Path(str(self._home or self._run.args.output_dir)).absolute().name

    @property
    def repo_name(self) -> str:
        """Name of the repository that the run is pushed to, or would be."""
        return str(self._run.hub_model_id or self._run.args.hub_model_id or self.name_of_run)

    @property
    def _has_adapter(self) -> bool:
        return hasattr(self._run.bare_model, "peft_config")

    def _facts(self) -> JSONObject:
        """Return what the template is rendered with."""
        run, args = self._run, self._run.args
        base, dataset, toolset = get_config_model_id(run.model.config), run.train_dataset, self._rollouts.tools.toolset

        # How the model is loaded: from the Hub for a card that is pushed, else from where it was saved last
        pushed = args.push_to_hub or self._publishing
        saved = None if pushed else self._saved_in()
        given = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        options = {name: given[name] for name in ("revision", "trust_remote_code") if given.get(name)}
        options |= {"trust_remote_code": True} if args.trust_remote_code else {}
        template = masked(json.loads(json.dumps(run.chat_template_kwargs, default=str)))
        schemas = [dict(toolset.shown(tool).schema) for tool in toolset.known]

        # What it was trained on, and how
        pools = run.environment_pool if run.environment_factories is not None else {}
        functions = zip(run.reward_func_names, run.reward_weights.tolist(), run.reward_funcs, strict=True)
        settings = {name: value for name, value in changed_fields(args).items() if not _PRIVATE.match(name)}
        settings_yaml = yaml.safe_dump(settings, sort_keys=True, allow_unicode=True)
        return {
            "adapter": self._has_adapter,
            "base": None if not base or Path(base).is_dir() else base,
            "saved": pushed or saved is not None,
            "place": json.dumps(self.repo_name if pushed else str(saved or args.output_dir), ensure_ascii=False),
            "model_class": "AutoModelForImageTextToText" if run.is_multimodal else "AutoModelForCausalLM",
            "reader": "processor" if run.is_multimodal else "tokenizer",
            "multimodal": run.is_multimodal,
            "base_options": _keyword_arguments(options),
            "trust": ", trust_remote_code=True" if options.get("trust_remote_code") else "",
            "template": _keyword_arguments(template) if self._renders_chat else None,
            "schemas": pprint.pformat(schemas, width=110, sort_dicts=False),
            "max_new_tokens": min(args.max_completion_length or 256, 256),
            "value_head": self._estimator.needs_values,
            "rows": len(dataset) if hasattr(dataset, "__len__") else None,
            "columns": getattr(dataset, "column_names", None) or (),
            "environments": {type(pool[0]) for pool in pools.values() if pool},
            "tools": toolset.known,
            "decided_at_reset": toolset.decided_at_reset,
            "rewards": [(name, weight, getattr(function, "__doc__", None)) for name, weight, function in functions],
            "curves": curves(run.state.log_history),
            "steps": sorted(entry["step"] for entry in run.state.log_history if "step" in entry),
            "configuration": settings_yaml.rstrip(),
            "machines": machines(args.world_size),
            "command": shlex.join([*launcher(args.world_size, self._sharding), *masked_arguments(sys.argv)]),
            "methods": self._methods(),
            "versions": {"trl_toolgrpo": __version__, **{name: version(key) for name, key in _PACKAGES.items()}},
        }

    def _saved_in(self) -> Path | None:
        """Return where the model is: in the output folder, in the newest checkpoint there, or nowhere yet."""
        folder = Path(str(self._run.args.output_dir))
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return folder
        return next((path for path in checkpoints(folder) if fault_of(path) is None), None)

    @property
    def _renders_chat(self) -> bool:
        """Whether prompts are messages that a chat template renders, rather than plain texts."""
        if getattr(self._run.processing_class, "chat_template", None) is None:
            return False
        dataset: Any = self._run.train_dataset
        readable = hasattr(dataset, "__getitem__") and "prompt" in (getattr(dataset, "column_names", None) or ())
        return not (readable and isinstance(dataset[0]["prompt"], str))

    @property
    def _sharding(self) -> str:
        """What the launcher shards with: nothing, where the run's own arguments shard the model."""
        if self._run.is_fsdp_enabled and not self._run.args.fsdp:
            return "fsdp"
        return "deepspeed" if self._run.is_deepspeed_enabled and not self._run.args.deepspeed else ""

    def _methods(self) -> list[tuple[str, str, str]]:
        """Return the parts of the training method, each with the id and title of the paper that introduced it."""
        args, estimator = self._run.args, self._estimator
        loss = args.loss_type
        parts: list[tuple[str, str, str]] = list(estimator.methods or [(f"advantages of `{estimator.name}`", "", "")])
        parts.append(_LOSSES.get(loss, (f"the loss `{loss}`", "", "")))
        if getattr(args, "importance_sampling_level", "token").startswith("sequence"):
            parts.append(("ratios of whole sequences", "2507.18071", "GSPO"))
        return parts


def curves(log: Sequence[JSONObject]) -> list[list[str]]:
    """
    Return the rows of the table of curves: name, first, last, least and largest value, and the curve as bars.

    Args:
        log (`Sequence[dict]`):
            The trainer's log history.
    """
    found: dict[str, list[float]] = {}
    for entry in log:
        for name, value in entry.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
            if is_number and _CURVES.fullmatch(name):
                found.setdefault(name, []).append(value)
    return [
        [f"`{name}`", *(f"{value:.4g}" for value in (y[0], y[-1], min(y), max(y))), bars(y, metric=name)]
        for name, y in sorted(found.items())
    ]


def bars(values: Sequence[float], width: int = 30, metric: str = "") -> str:
    """
    Return a curve as a line of bars, each the mean of its share of the values; level where only rounding moves it.

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
    if spread == 0 or is_flat(min(values), max(values), metric):
        return _BARS[0] * count
    return "".join(_BARS[round((mean - low) / spread * (len(_BARS) - 1))] for mean in means)


def machines(processes: int) -> int:
    """
    Return on how many machines a run is; launchers tell each process how many are on its own.

    Args:
        processes (`int`):
            All processes of the run.
    """
    here = get_int_from_env(["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"], processes)
    return -(-processes // max(here, 1))


def launcher(processes: int, sharding: str = "") -> list[str]:
    """
    Return what starts the script of a run, on each of its machines.

    Args:
        processes (`int`):
            All processes of the run.
        sharding (`str`, *optional*):
            `"fsdp"` or `"deepspeed"`, if accelerate's launcher is to shard the model as it did for this process.
    """
    count = machines(processes)
    if not sharding:
        nodes = ["--nnodes", str(count), "--node_rank", "MACHINE_RANK", "--master_addr", "FIRST_MACHINE"]
        each = ["--nproc_per_node", str(processes // count)]
        return ["python"] if processes == 1 else ["torchrun", *(nodes if count > 1 else []), *each]
    words = ["accelerate", "launch", "--num_processes", str(processes)]
    if count > 1:
        words += ["--num_machines", str(count), "--machine_rank", "MACHINE_RANK", "--main_process_ip", "FIRST_MACHINE"]
    words.append(f"--use_{sharding}")
    if count > 1 and sharding == "deepspeed":
        words += ["--deepspeed_multinode_launcher", "standard"]
    # The launcher's options are in the environment of the processes that it starts
    from accelerate.commands.launch import launch_command_parser  # slow to import

    prefix, parser = {"fsdp": "FSDP_", "deepspeed": "ACCELERATE_DEEPSPEED_"}[sharding], launch_command_parser()
    for variable, value in sorted(os.environ.items()):
        name = _LAUNCH_OPTIONS.get(variable, variable.removeprefix("ACCELERATE_DEEPSPEED_").lower())
        if variable.startswith(prefix) and value not in ("None", str(parser.get_default(name))):
            words += [f"--{name}", value]
    return words


def _keyword_arguments(options: Mapping[str, object]) -> str:
    """Return arguments after others in a call, as Python writes them."""
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in options):
        return "".join(f", {name}={value!r}" for name, value in options.items())
    return f", **{options!r}"

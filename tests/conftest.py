"""What all tests share: tokenizers for every chat template, tiny models, a sampler that follows a script."""

import copy
import itertools
import json
import os
import re
import resource
import tempfile
import time
from collections import defaultdict, deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
_TRACKIO = tempfile.TemporaryDirectory()
os.environ["TRACKIO_DIR"] = _TRACKIO.name  # read when trackio is imported, which TRL does

import pytest
import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerControl, TrainerState
from trl.trainer.utils import add_fused_lm_head

from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer
from trl_toolgrpo.sampling import model_sampler
from trl_toolgrpo.sampling.protocol import SampledTokens
from trl_toolgrpo.trl_hooks import Run


torch.set_num_threads(1)

MAKE_SAMPLER = "trl_toolgrpo.rollout.engine.make_sampler"
"""The function that a test replaces to use a sampler of its own."""

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# Control tokens as the model families write them
_CONTROL = re.compile(
    r"<\|[^|>\s]+\|>|<[a-z_]+\|>|<\|[a-z_]+>|</?(?:think|tool_call|tool_response|arg_key|arg_value|tools)>"
    r"|<\uff5c[^>\uff5c]+\uff5c>|<\|\"\|>|\[gMASK\]|<sop>"
)
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<turn|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eot|>")
_FAMILY_STOPS = {
    "glm4moe": ["<|observation|>", "<|user|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
}


def chat_tokenizer(template: str = "qwen3") -> PreTrainedTokenizerFast:
    """
    Build a byte-level tokenizer with one of TRL's chat templates, byte for byte, and that template's control tokens.

    `tokenizer.stop_texts` lists the tokens that end a turn in the family.
    """
    text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(["the name of the employee is in the answer of the tool; the sum is"], trainer)
    found = sorted(
        {*_CONTROL.findall(text), "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"}
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(found, special_tokens=False)
    family = next((stops for name, stops in _FAMILY_STOPS.items() if template.startswith(name)), None)
    stops = family or [next(token for token in _END_OF_TURN if token in text)]
    tokenizer.eos_token = stops[0]
    tokenizer.stop_texts = stops
    tokenizer.chat_template = text
    return tokenizer


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes) -> Qwen3ForCausalLM:
    """Build a two-layer Qwen3 with random weights for the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**options, **changes}))
    model.config._name_or_path = "tiny-qwen3"
    return model


def prompts(count: int = 4, text: str = "hello") -> Dataset:
    """Return a data set of conversational prompts."""
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"{text} {i}"}]} for i in range(count)])


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns while this is open."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *found, 0)
        return output


def config(path, **changes) -> ToolGRPOConfig:
    """Return a configuration for a few quick steps in float32 on the CPU."""
    options = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 16,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return ToolGRPOConfig(**{**options, **changes})


def plain_scores(model, ids, mask, width, temperature=1.0):
    """Return log-probs and entropies of completion tokens from the model's own logits, as a plain pass gives them."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].double() / temperature
    scores = torch.log_softmax(logits, dim=-1)[:, -width:]
    logps = scores.gather(-1, ids[:, -width:, None])[..., 0]
    return logps, -(scores.exp() * scores).sum(dim=-1)


def part_run(model, args, **attributes):
    """
    Return a run for parts that are made without a trainer: over real objects, with what a new trainer would have.

    Its callbacks are in `callbacks` of the trainer's place, which the run keeps as `_trainer`. TRL's own scoring pass
    is [`plain_scores`].
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    add_fused_lm_head(base, temperature=args.temperature, outputs=("log_probs", "entropy"))
    callbacks = []
    trainer = SimpleNamespace(
        args=args, model=model, model_wrapped=model, ref_model=None, accelerator=Accelerator(cpu=True),
        state=TrainerState(), control=TrainerControl(), optimizer=None, lr_scheduler=None, recording=True,
        temperature=args.temperature, beta=args.beta, num_generations=args.num_generations, use_vllm=False,
        is_fsdp_enabled=False, is_deepspeed_enabled=False, aux_loss_enabled=False, top_entropy_quantile=1.0,
        mask_truncated_completions=args.mask_truncated_completions, current_gradient_accumulation_steps=1,
        callbacks=callbacks, add_callback=callbacks.append, pop_callback=lambda kind: None,
        _step=0, _buffered_inputs=None, _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _logs={"advantages": deque(maxlen=args.generation_batch_size)},
    )  # fmt: skip
    vars(trainer).update(attributes)

    def trls_pass(model, ids, mask, width, batch_size=None, compute_entropy=False, compute_aux_loss=False):
        logps, entropies = plain_scores(model, ids, mask, width, args.temperature)
        return logps.float(), entropies.float() if compute_entropy else None, None

    model.train()
    return Run(trainer, SimpleNamespace(_get_per_token_logps_and_entropies=trls_pass))


@contextmanager
def full_disk(trainer, room):
    """Limit the size of files while a checkpoint is written, as a full disk does; `room` maps steps to bytes."""
    save = trainer.checkpoints._write
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(*args):
        if trainer.state.global_step in room:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room[trainer.state.global_step], limits[1]))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    trainer.checkpoints._write = on_a_full_disk
    yield
    del trainer.checkpoints._write


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First.
        b: Second.
    """
    return a + b


class ScriptedSampler:
    """
    A sampler that writes a given text for each turn of each row, with log-prob -0.5 for every token.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Encodes the texts.
        script (`list[list[str]]`):
            Texts of the turns of each row. A text that does not end with a stop token ends at the token budget.
        stop_ids (`Iterable[int]`):
            Tokens that end a turn.
    """

    def __init__(self, tokenizer, script, stop_ids):
        self.tokenizer, self.script, self.stop_ids = tokenizer, script, set(stop_ids)

    @contextmanager
    def open(self, prompts, max_length):
        self.histories = [list(prompt) for prompt in prompts]
        self.turns = [iter(turns) for turns in itertools.islice(itertools.cycle(self.script), len(prompts))]
        self.queue = []
        yield self

    @property
    def busy(self):
        return bool(self.queue)

    def extend(self, row, token_ids, max_new_tokens, constraint=None):
        self.histories[row] += token_ids
        self.queue.append((row, max_new_tokens))

    def step(self):
        done, self.queue = self.queue, []
        results = []
        for row, budget in done:
            ids = self.tokenizer(next(self.turns[row]), add_special_tokens=False)["input_ids"][:budget]
            self.histories[row] += ids
            results.append(SampledTokens(row, ids, [-0.5] * len(ids), ids[-1] in self.stop_ids))
        return results

    def finish(self, row):
        pass


def pytest_terminal_summary(terminalreporter):
    """Print the figures that tests measured."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "figures":
                terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {value}")


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class _Row(list):
    """Token ids that remember which rollout they belong to, through the concatenations of TRL's loop."""

    def __init__(self, ids, row):
        super().__init__(ids)
        self.row = row

    def __add__(self, other):
        return _Row([*self, *other], self.row)


def script_trl(trainer, tokenizer, script):
    """
    Make TRL's own trainer write `script`, a text for each turn of each row, as [`ScriptedSampler`] does for ours.

    Each turn is cut to `max_completion_length`, as TRL's generation cuts it.

    Returns:
        `list[list[list[int]]]`: the prompts that TRL continued, one entry for each generation call.
    """
    turns, calls = [], []

    def generate(prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if not isinstance(prompt_ids[0], _Row):
            turns[:] = [iter(script[row % len(script)]) for row in range(len(prompt_ids))]
            prompt_ids[:] = [_Row(ids, row) for row, ids in enumerate(prompt_ids)]
        calls.append([list(ids) for ids in prompt_ids])
        texts = [next(turns[ids.row]) for ids in prompt_ids]
        limit = trainer.max_completion_length
        return [tokenizer(text, add_special_tokens=False)["input_ids"][:limit] for text in texts], None

    trainer._generate_single_turn = generate
    return calls


def script_ours(monkeypatch, tokenizer, script):
    """Make a recording trainer write `script`, and return a list that will hold the sampler made last."""
    made = []

    def make(policy, supported, stop_ids, **options):
        made[:] = [ScriptedSampler(tokenizer, script, stop_ids)]
        return made[0]

    monkeypatch.setattr(MAKE_SAMPLER, make)
    return made


@pytest.fixture(autouse=True, scope="session")
def return_freed_memory():
    """Keep `keep_freed_memory` of recipes from the test process, in which it would hold for all tests that follow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_toolgrpo.trainer.keep_freed_memory", lambda: False)
        yield


def wait_until(condition, seconds=20.0):
    """Wait for a condition, and fail if it does not become true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


def tool_call(name, **arguments):
    """Return a call as Qwen3 writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@dataclass
class Scripted:
    """A trainer's batch: its tensors, and for each row what a reward function got."""

    trainer: Any
    batch: dict[str, torch.Tensor]
    seen: list[dict[str, Any]]

    @property
    def completions(self):
        return [row["completion"] for row in self.seen]

    @property
    def trajectories(self):
        return [row["trajectory"] for row in self.seen]

    def metric(self, name):
        return self.trainer._metrics["train" if self.trainer.model.training else "eval"][name][-1]

    def text(self, row):
        """Everything after the prompt, decoded."""
        return self.trainer._tokenizer.decode(self.seen[row]["ids"])

    def tool_ids(self, row):
        """Tokens of a rollout that the policy did not write."""
        mask = self.batch["tool_mask"][row].tolist()
        return [id for id, mine in zip(self.seen[row]["ids"], mask, strict=False) if not mine]


def telling_reward(seen):
    """Return a reward function that gives rollouts different rewards, and keeps its arguments for each in `seen`."""

    def length_reward(prompts, completions, completion_ids, **kwargs):
        trajectories = kwargs.get("trajectories") or [None] * len(prompts)
        for prompt, completion, ids, trajectory in zip(
            prompts, completions, completion_ids, trajectories, strict=True
        ):
            row = {"prompt": prompt, "completion": copy.deepcopy(completion), "ids": list(ids)}
            seen.append({**row, "trajectory": trajectory})
        return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]

    return length_reward


def run_script(
    kind,
    monkeypatch,
    path,
    script,
    *,
    rows=None,
    tools=None,
    environment_factory=None,
    tokenizer=None,
    template="qwen3",
    eos=None,
    rewards=(),
    training=True,
    model_options=None,
    make_sampler=None,
    **changes,
):
    """Sample and score one batch as `script` says, with our trainer or with TRL's."""
    rows = rows or [{"prompt": [{"role": "user", "content": "hello"}]}] * 4
    tokenizer = tokenizer or chat_tokenizer(template)
    model = tiny_model(tokenizer, **(model_options or {}))
    if eos is not None:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(eos))
    seen = []
    trainer = kind(
        model,
        [telling_reward(seen), *rewards],
        config(path, **{"max_completion_length": 600, "logprob_check": "off", **changes}),
        Dataset.from_list(rows),
        processing_class=tokenizer,
        tools=tools,
        environment_factory=environment_factory,
    )
    if make_sampler is not None:
        monkeypatch.setattr(MAKE_SAMPLER, make_sampler)
    elif issubclass(kind, ToolGRPOTrainer):
        script_ours(monkeypatch, tokenizer, script)
    else:
        script_trl(trainer, tokenizer, script)
    trainer.model.train(training)
    return Scripted(trainer, trainer._generate_and_score_completions(copy.deepcopy(rows)), seen)


def scripted_model_sampler(monkeypatch, tokenizer, script):
    """Make the default sampler draw the tokens of `script`, with the model's own log-probs for them."""

    def make(policy, supported, pads, **options):
        assert supported
        texts = ["".join(turns) for turns in script]
        streams = [iter(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

        def draw(logits, temperature, rows):
            tokens = torch.tensor([next(streams[row]) for row in rows.tolist()])
            logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
            return tokens, logprobs.gather(-1, tokens[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(dim=-1)

        monkeypatch.setattr(model_sampler, "sample_tokens", draw)
        return model_sampler.ModelSampler(policy, **{**options, "noise": torch.tensor})

    monkeypatch.setattr(MAKE_SAMPLER, make)

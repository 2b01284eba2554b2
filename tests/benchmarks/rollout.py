"""Rollouts of this package compared with TRL's: the same model, prompts, tools and text, each in its own process.

    python tests/benchmarks/rollout.py --vs trl
    python tests/benchmarks/rollout.py --vs trl --cases 600 --dtype bfloat16 --repeats 1

Prints the processor or card and the dtype, and for each case tokens per second of both and of a plain lockstep loop.
In that loop the prompts are prefilled once, and each token of all rows takes one forward pass, without tool calls.
All cases but SmolLM2's have a known text, so that both sides write the same tokens.
Sides take turns; figures are medians. `--growth` adds the time by number of turns, and `--picture` writes both as an
SVG. Both sides sample with transformers, or with vLLM (`--vllm`; not in the ragged case, whose text is dictated).
"""

import argparse
import hashlib
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import markov
from cases import CASES, DTYPE_HELP, DTYPES, Case, add_case_flags, autocast, device, given_case, in_dtype
from machine import ROOT, machine_line, now
from markov import (
    Worker,
    build_model,
    build_tokenizer,
    chain_text,
    conversations,
    ping,
    serve,
    trainer_options,
)
from picture import draw


GROWTH = (1, 2, 4, 8)


def script_of(rows: int, turns: int, tokenizer: Any) -> list[list[list[int]]]:
    """Return the turns of each row for the ragged case; their number and length are the same in every run."""
    draw_one = random.Random(0)
    words = [tokenizer.convert_tokens_to_ids(f" w{i}") for i in range(100)]
    call = tokenizer.convert_tokens_to_ids(chain_text()[-4:])
    script = []
    for _ in range(rows):
        lengths = [draw_one.randint(8, 200) for _ in range(draw_one.randint(1, turns))]
        texts = [[words[(7 * i) % 100] for i in range(length - 4)] + call for length in lengths]
        texts[-1] = texts[-1][:-4] + [words[0]] * 3 + call[-1:]  # the last turn calls nothing
        script.append(texts)
    return script


def follow(trainer: Any, backend: str, script: list[list[list[int]]], pad_id: int) -> None:
    """Make both sides write `script`: they sample at the full cost, and the samples are replaced."""
    import torch

    place: dict[str, Any] = {}
    if backend == "trl":
        generate, multinomial = trainer._generate_single_turn, torch.multinomial

        def single_turn(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            if len(prompt_ids) == len(script) and place.get("turn", 0) in (0, place.get("turns")):
                place.update(turn=0, turns=max(map(len, script)))
            rows = [turns for turns in script if len(turns) > place["turn"]]
            place["texts"], place["step"] = [turns[place["turn"]] for turns in rows], 0
            torch.multinomial = scripted
            try:
                return generate(prompt_ids, *args, **kwargs)
            finally:
                torch.multinomial = multinomial
                place["turn"] += 1

        def scripted(probabilities: Any, *args: Any, **kwargs: Any) -> Any:
            drawn, step = multinomial(probabilities, *args, **kwargs), place["step"]
            place["step"] += 1
            for row, text in enumerate(place["texts"]):
                drawn[row] = text[step] if step < len(text) else pad_id
            return drawn

        trainer._generate_single_turn = single_turn
        return
    from trl_toolgrpo.rollout import engine
    from trl_toolgrpo.sampling import model_sampler

    make, sample = engine.make_sampler, model_sampler.sample_tokens

    def make_sampler(*args: Any, **options: Any) -> Any:
        place["texts"] = [iter([token for turn in turns for token in turn]) for turns in script]

        def noise(rows: list[int]) -> Any:
            place["rows"] = rows
            return torch.rand(len(rows))

        return make(*args, **{**options, "noise": noise})

    def sample_tokens(*args: Any) -> Any:
        if "rows" not in place:  # the trial of the sampler, before any rollout
            return sample(*args)
        _, *figures = sample(*args)
        return torch.tensor([next(place["texts"][row]) for row in place["rows"]]), *figures

    engine.make_sampler, model_sampler.sample_tokens = make_sampler, sample_tokens


def build_policy(case: Case, dtype: str) -> tuple[Any, Any, list, list | None]:
    """Build the policy of a case, its tokenizer, the distinct prompts, and the tools."""
    if not case.real:
        tokenizer = build_tokenizer(case.turn_tokens)
        model = build_model(tokenizer, case.shape, case.turn_tokens, dtype)
        return model, tokenizer, conversations(tokenizer, case.prompts, case.prompt_tokens), [ping]
    import trl_toolgrpo

    trl_toolgrpo.__path__.append(str(ROOT))  # finds the recipes of a checkout that is not installed
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_toolgrpo.recipes.models.smollm2 import convert_smollm2

    with tempfile.TemporaryDirectory() as folder:
        path = convert_smollm2(folder)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = in_dtype(AutoModelForCausalLM.from_pretrained(path).to(device()), dtype)
    return model, tokenizer, stories(tokenizer, case.prompts, case.prompt_tokens), None


def stories(tokenizer: Any, prompts: int, tokens: int) -> list[list[dict[str, str]]]:
    """Return different prompts of English sentences, `tokens` tokens each with the template."""
    people, things = ("The captain", "A friend", "My neighbor", "The teacher"), ("an old map", "a letter", "two keys")
    found = []
    for prompt in range(prompts):
        draw_one, text = random.Random(prompt), "Continue this story at length."
        while len(_chat_ids(tokenizer, f"{text} and")) < tokens:
            sentence = f" {draw_one.choice(people)} found {draw_one.choice(things)} near the river."
            longer = f"{text}{sentence}"
            text = longer if len(_chat_ids(tokenizer, longer)) <= tokens else f"{text} and"
        found.append([{"role": "user", "content": text}])
    return found


def _chat_ids(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def build_trainer(backend: str, case: Case, dtype: str, vllm: bool = False) -> tuple[Any, list]:
    """Build a trainer of TRL's or of this package's, and the prompts of one rollout batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    markov.TOOL_SECONDS = case.tool_ms / 1000
    model, tokenizer, distinct, tools = build_policy(case, dtype)
    rows = [prompt for prompt in distinct for _ in range(case.samples)]
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": len(rows),
        "num_generations": case.samples,
        "max_completion_length": case.completion_limit,
        "max_tool_calling_iterations": case.turns - (0 if case.ragged else 1),
        "report_to": "none",
        "gradient_checkpointing": False,
        **trainer_options(model, tokenizer, dtype, vllm),
    }
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in distinct])
    if backend == "trl":
        kind, config = GRPOTrainer, GRPOConfig(**options)
    else:
        from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer

        kind, config = ToolGRPOTrainer, ToolGRPOConfig(**options)
    trainer: Any = kind(model, _reward, config, dataset, processing_class=tokenizer, tools=tools)
    if case.ragged:
        if vllm:
            raise SystemExit("The ragged case dictates its text to transformers: leave out --vllm, or this case.")
        follow(trainer, backend, script_of(len(rows), case.turns, tokenizer), tokenizer.pad_token_id)
    return trainer, rows


def _reward(completions: list, **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def rollouts(backend: str, trainer: Any, rows: list, real: bool = False) -> Callable[[], dict[str, Any]]:
    """Return a function that makes one rollout batch of `rows`, and returns seconds, sampled tokens and a digest."""

    def work() -> dict[str, Any]:
        if backend == "trl" and trainer.tools:
            trainer._sync_tool_dicts = [{"ping": trainer.tools[0]}] * len(rows)
            trainer._async_tool_dicts = [{}] * len(rows)
        started = now()
        prompt_ids, completion_ids, tool_mask, *_ = trainer._generate(rows)
        seconds = now() - started
        text = json.dumps([prompt_ids, completion_ids, tool_mask])
        if real:  # each samples its own text
            return {"seconds": seconds, "sampled": sum(map(len, completion_ids))}
        sampled = sum(map(sum, tool_mask))
        return {"seconds": seconds, "sampled": sampled, "text": hashlib.sha256(text.encode()).hexdigest()}

    return work


def lockstep(case: Case, dtype: str) -> Callable[[], dict[str, Any]]:
    """Run the plain loop, over as many tokens a row as the rollouts have on average."""
    import torch
    from transformers import DynamicCache

    from trl_toolgrpo.sampling.model_sampler import sample_tokens

    (model, tokenizer, distinct, tools), place = build_policy(case, dtype), device()
    model.eval()
    texts = [tokenizer.apply_chat_template(p, tools=tools, add_generation_prompt=True)["input_ids"] for p in distinct]
    texts = [text[-min(map(len, texts)) :] for text in texts]
    steps, rows = case.turns * case.turn_tokens, case.rows
    if case.ragged:
        script = script_of(rows, case.turns, tokenizer)
        steps = round(sum(len(turn) for turns in script for turn in turns) / rows)

    def work() -> dict[str, Any]:
        started = now()
        with torch.no_grad(), autocast(dtype):
            cache, prompts = DynamicCache(config=model.config), torch.tensor(texts, device=place)
            logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            cache.batch_repeat_interleave(case.samples)
            logits = logits.repeat_interleave(case.samples, dim=0)
            for step in range(steps):
                tokens, _, _ = sample_tokens(logits, 1.0, torch.rand(rows, device=place))
                if step + 1 < steps:
                    logits = model(tokens[:, None], past_key_values=cache).logits[:, -1]
        return {"seconds": now() - started, "sampled": rows * steps}

    return work


def compare(arguments: argparse.Namespace, sides: list[str], flags: list[str]) -> dict[str, dict[str, float]]:
    """Return tokens per second, seconds and peak memory in MiB of each side, in alternating rounds."""
    workers = [Worker(__file__, side, flags) for side in sides]
    for _ in range(arguments.repeats + 1):  # the first round is a warm-up
        for worker in workers:
            worker.work()
    for worker in workers:
        worker.end()
    texts = {found["text"] for worker in workers for found in worker.found if "text" in found}
    if len(texts) > 1 and not {"trl", "trl_toolgrpo"} - set(sides):
        raise SystemExit("The two trainers wrote different tokens: the ratio would mean nothing.")
    results = {}
    for worker in workers:
        seconds = statistics.median(found["seconds"] for found in worker.found[1:])
        last = worker.found[-1]
        figures = {"speed": last["sampled"] / seconds, "seconds": seconds, "peak_mib": last["peak_mib"]}
        results[worker.name] = {**figures, "sampled": last["sampled"]}
        for line in last.get("warnings", ()):  # such as a sampler that falls back
            print(f"{worker.name} warns: {line}", flush=True)
    return results


def report(name: str, results: dict[str, dict[str, float]]) -> float | None:
    """Print the row of a case, and return the ratio to TRL."""
    ours, plain, theirs = (results.get(side) for side in ("trl_toolgrpo", "lockstep", "trl"))
    line = f"{name:<50} {ours['speed']:8.1f} {plain['speed']:9.1f} {ours['speed'] / plain['speed']:7.0%}"
    ratio = None
    if theirs is not None:
        ratio = ours["speed"] / theirs["speed"]
        line += f" {theirs['speed']:8.1f} {ratio:6.1f}x {ours['peak_mib'] / theirs['peak_mib']:7.2f}x"
    print(f"{line} {ours['peak_mib']:7.0f}", flush=True)
    return ratio


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vs", choices=["trl", "none"], default="trl")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "custom"], default=list(CASES))
    add_case_flags(parser, Case())
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=DTYPE_HELP)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M with its real weights, one turn of text.")
    parser.add_argument("--vllm", action="store_true", help="Both sides sample with vLLM, in the trainer's process.")
    parser.add_argument("--growth", action="store_true", help="Also measure how the time grows with turns.")
    parser.add_argument("--picture", type=Path, help="Write an SVG there.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=["trl", "trl_toolgrpo", "lockstep"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sized = given_case(arguments, ragged=arguments.ragged, real=arguments.real) != Case()
    if sized and not (arguments.worker or arguments.growth or "custom" in arguments.cases):
        parser.error("the cases have sizes of their own: pass `--cases custom` with yours, or leave them out")
    return arguments


def work_for(arguments: argparse.Namespace) -> None:
    """Run one side in a process of its own."""
    import torch

    torch.set_num_threads(arguments.threads)
    side, case = arguments.worker, given_case(arguments, ragged=arguments.ragged, real=arguments.real)
    if side == "lockstep":
        return serve(lockstep(case, arguments.dtype))
    serve(rollouts(side, *build_trainer(side, case, arguments.dtype, arguments.vllm), case.real))


def main() -> None:
    """Run the cases, print the table, write the picture."""
    arguments = parse_arguments()
    if arguments.worker:
        return work_for(arguments)
    trl = ["trl"] if arguments.vs == "trl" else []
    common = [f"--dtype={arguments.dtype}", f"--threads={arguments.threads}", *(["--vllm"] * arguments.vllm)]
    custom = given_case(arguments, ragged=arguments.ragged, real=arguments.real)
    print(machine_line(arguments.dtype), flush=True)
    heads = f"{'here':>8} {'lockstep':>9} {'share':>7} {'TRL':>8} {'ratio':>7} {'memory':>8} {'MiB':>7}"
    print(f"{'tokens per second':<50} {heads}", flush=True)
    ratios, growth = {}, {}
    for key in arguments.cases:
        case = CASES.get(key, custom)
        found = compare(arguments, ["trl_toolgrpo", "lockstep", *trl], [*case.flags(), *common])
        ratios[case.name] = report(case.name, found)
    if arguments.growth:
        for turns in GROWTH:
            found = compare(arguments, ["trl_toolgrpo", *trl], [*replace(custom, turns=turns).flags(), *common])
            growth[turns] = {side: figures["seconds"] for side, figures in found.items()}
            print(f"{turns} turns: " + ", ".join(f"{side} {s:.2f} s" for side, s in growth[turns].items()), flush=True)
    if arguments.picture:
        arguments.picture.write_text(draw({n: r for n, r in ratios.items() if r}, growth), encoding="utf-8")


if __name__ == "__main__":
    main()

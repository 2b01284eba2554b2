"""Health rules on stored runs, output folders, simulated runs, and planted faults.

    python tests/benchmarks/health_runs.py                        stored runs and planted faults
    python tests/benchmarks/health_runs.py outputs/a outputs/b    these output folders instead of the stored runs
    python tests/benchmarks/health_runs.py --simulate 5           also simulated runs of 1,000 steps, 5 of each kind
    python tests/benchmarks/health_runs.py --record               record the stored runs again
    python tests/benchmarks/health_runs.py --keep outputs/a       store the runs of these output folders as well

`health.py` runs whole recipes instead.
"""

import argparse
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import add, chat_tokenizer, config, tiny_model
from datasets import Dataset
from peft import LoraConfig
from simulated_runs import FAULTS, SOUND, alarms, facts_of, simulate, weakest
from stored_runs import STORED, collapsed, keep, load, read_folder, stored

from trl_toolgrpo import ToolGRPOTrainer


STEPS = 30

# Runs that are recorded

LORA = {"peft": True, "learning_rate": 5e-3}
SYNC = {"beta": 0.02, "sync_ref_model": True, "ref_model_sync_steps": 4}
KINDS = {
    "plain": {},
    "bfloat16 autocast": {"bf16": True},
    "bfloat16 weights": {"dtype": torch.bfloat16, "learning_rate": 3e-4},
    "float64": {"dtype": torch.float64},
    "LoRA": LORA,
    "LoRA, bfloat16, synced reference": {**LORA, **SYNC, "bf16": True, "ref_model_mixup_alpha": 1.0},
    "LoRA, merged reference": {**LORA, **SYNC, "ref_model_mixup_alpha": 0.5},
    "gae": {"advantage_estimator": "gae", "value_learning_rate": 1e-2},
    "gae by turn, several epochs": {"advantage_estimator": "gae", "gae_unit": "turn", "value_epochs": 3},
    "group_gae": {"advantage_estimator": "group_gae", "value_learning_rate": 1e-2},
    "gae, warm-up, bfloat16": {
        "advantage_estimator": "gae", "value_warmup_steps": 5, "bf16": True, "learning_rate": 3e-4,
    },
    "two iterations": {"num_iterations": 2},
    "four iterations, bfloat16": {"num_iterations": 4, "bf16": True},
    "two iterations, gae": {"num_iterations": 2, "advantage_estimator": "gae", "value_learning_rate": 1e-2},
    "three optimizer steps of a batch": {"steps_per_generation": 3, "per_device_train_batch_size": 4},
    "two batches in an optimizer step": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2,
    },
    "batches across optimizer steps": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 3,
    },
    "KL term": {"beta": 0.05},
    "synced reference": {**SYNC, "ref_model_mixup_alpha": 1.0},
    "averaged reference, two iterations": {**SYNC, "ref_model_mixup_alpha": 0.6, "num_iterations": 2},
    "assisted steps": {"assist_warmup_steps": 6, "force_rate": 0.5, "force_level": "schema"},
    "assisted steps, gae": {
        "assist_warmup_steps": 6, "force_rate": 0.5, "force_level": "name", "advantage_estimator": "gae",
    },
    "no shared prompts": {"shared_prompt_updates": False},
    "deterministic": {"deterministic_rollouts": True},
    "one group": {"per_device_train_batch_size": 4},
    "pairs": {"num_generations": 2},
    "groups of eight": {"num_generations": 8, "learning_rate": 2e-3},
    "warm-up of the rate": {"warmup_steps": 20, "num_iterations": 2, "learning_rate": 1e-4},
    "a tiny rate": {"learning_rate": 1e-6, "num_iterations": 2},
    "logged every fifth step": {"logging_steps": 5, "max_steps": 80, "num_iterations": 2},
    "dr_grpo, no scaling": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "scaled by batch": {"scale_rewards": "batch"},
    "truncated rollouts masked": {"mask_truncated_completions": True},
}  # fmt: skip


def question(a, b):
    """Return a prompt."""
    return [{"role": "user", "content": f"{a}+{b}"}]


def warm_policy(tokenizer, steps=400):
    """Train a tiny model to call the tool and to answer, often with the wrong numbers."""
    texts = []
    for a in range(5):
        for b in range(5):
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
            messages = [
                *question(a, b),
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "name": "add", "content": str(a + b)},
                {"role": "assistant", "content": str(a + b)},
            ]
            asked = tokenizer.apply_chat_template(
                question(a, b), tools=[add], add_generation_prompt=True, tokenize=False
            )
            whole = tokenizer.apply_chat_template(messages, tools=[add], tokenize=False).rstrip("\n")
            start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
            texts.append((start, tokenizer(whole, add_special_tokens=False)["input_ids"]))
    width = max(len(ids) for _, ids in texts)
    ids = torch.tensor([own + [tokenizer.pad_token_id] * (width - len(own)) for _, own in texts])
    labels = torch.tensor([[-100] * start + own[start:] + [-100] * (width - len(own)) for start, own in texts])
    mask = torch.tensor([[1] * len(own) + [0] * (width - len(own)) for _, own in texts])
    model = tiny_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(steps):
        rows = torch.randint(len(texts), (8,))
        loss = model(ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), loss.item()


def score(completions, sums, **kwargs):
    """Return partial credit for a call that succeeds, and for the answer."""
    found = []
    for messages, expected in zip(completions, sums, strict=True):
        results = [message["content"] for message in messages if message["role"] == "tool"]
        answer = messages[-1].get("content") or ""
        found.append(0.2 * bool(results) + 0.4 * (str(expected) in results) + 0.4 * (answer.strip() == str(expected)))
    return found


def record(name, seed, tokenizer, weights):
    """Make a run, and return its stored form."""
    changes = dict(KINDS[name])
    dtype, peft = changes.pop("dtype", torch.float32), changes.pop("peft", False)
    options = {
        "max_steps": STEPS, "learning_rate": 1e-3, "per_device_train_batch_size": 16 if seed % 2 else 8,
        "max_completion_length": 96,
        "seed": seed, "rollout_log_limit": 0, **changes,
    }  # fmt: skip
    rows = [{"prompt": question(a, b), "sums": a + b} for a in range(5) for b in range(5)]
    model = tiny_model(tokenizer)
    model.load_state_dict(weights)
    folder = tempfile.mkdtemp()
    model.to(dtype).save_pretrained(folder)
    model.config._name_or_path = folder  # from which a reference is loaded
    trainer = ToolGRPOTrainer(
        model, score, config(tempfile.mkdtemp(), **options), Dataset.from_list(rows), tools=[add],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]) if peft else None,
    )  # fmt: skip
    trainer.train()
    return stored(f"{name}, seed {seed}", trainer.state.log_history, trainer.records.health.monitor.facts)


def record_all(seeds):
    """Make every kind of run with each seed, and store those that stay healthy."""
    tokenizer = chat_tokenizer("qwen3_instruct_2507")
    torch.manual_seed(0)
    weights, loss = warm_policy(tokenizer)
    print(f"warm start: loss {loss:.3f}", flush=True)
    for seed in range(seeds):
        for name in KINDS:
            run = record(name, seed, tokenizer, weights)
            if collapsed(run):
                print(f"{run['name']}: the policy was destroyed, and the run is not stored", flush=True)
            else:
                keep([run])


# Findings of the rules


def show_runs(runs):
    """Print how many runs raise an alarm, and each alarm; return how many."""
    count = raised = steps = 0
    for name, entries, facts in runs:
        found = alarms(entries, facts)
        count, raised, steps = count + 1, raised + len(found), steps + len(entries)
        for rule, step in found.items():
            print(f"  {name}: {rule} in step {step}")
    print(f"{count} runs, {steps} logged steps, {raised} alarms")
    return raised


def show_faults(seeds):
    """Print the weakest strength of each fault that every seed reports; return how many faults are missed."""
    missed = 0
    print(f"\n{'fault':42} {'rule':18} {'weakest caught':>14}  of")
    for name, fault in FAULTS.items():
        found = weakest(fault, range(seeds))
        missed += found is None
        tried = ", ".join(f"{strength:g}" for strength in fault.strengths)
        print(f"{name:42} {fault.rule:18} {'none' if found is None else f'{found:g}':>14}  {tried} ({fault.unit})")
    return missed


def main():
    """Apply the rules to the runs and print the tables; exit with 1 for an alarm or a missed fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--record", action="store_true", help=f"write {STORED.name}")
    parser.add_argument("--keep", action="store_true", help="store the runs of the folders as well")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of each kind of run that is recorded")
    parser.add_argument("--simulate", type=int, default=0, metavar="N", help="runs of each simulated kind")
    arguments = parser.parse_args()
    if arguments.record:
        record_all(arguments.seeds)
    if arguments.keep:
        keep([stored(*read_folder(folder)) for folder in arguments.folders])
    if arguments.folders and not arguments.keep:
        raised = show_runs(map(read_folder, arguments.folders))
    else:
        raised = show_runs(load())
    if arguments.simulate:
        print("\nsimulated:")
        raised += show_runs(
            (str(kind), list(simulate(kind, seed, 1000)), facts_of(kind))
            for kind in SOUND
            for seed in range(arguments.simulate)
        )
    missed = show_faults(10)
    sys.exit(int(bool(raised or missed)))


if __name__ == "__main__":
    main()

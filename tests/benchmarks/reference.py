"""The cost of a verified sync of the reference: a rank-16 adapter on all linear layers of SmolLM2-135M, in both modes.

Then the cost of a synced reference for the steps between, compared with TRL's reference of a LoRA run, which never
moves.

    python -m trl_toolgrpo.recipes.models.smollm2 --output smollm2 && python tests/benchmarks/reference.py smollm2
"""

import argparse
import statistics

import torch
from peft import LoraConfig, get_peft_model
from training_cost import add_arguments, compare
from transformers import AutoModelForCausalLM

from trl_toolgrpo.reference.adapter import AdapterReference, Comparison
from trl_toolgrpo.reference.merged import MergedReference


def main() -> None:
    """Sync repeatedly with a policy that moves in between, and print the median time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Folder or Hub id of the model.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--syncs", type=int, default=9)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=arguments.rank, target_modules="all-linear"))
    for kind, alpha in ((AdapterReference, 1.0), (MergedReference, 0.5)):
        reference, seconds = kind(model, "default"), []
        for _ in range(arguments.syncs):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.01 * torch.randn_like(parameter))
            report = reference.sync(alpha, Comparison())
            seconds.append(report.seconds)
        size = sum(tensor.numel() * tensor.element_size() for tensor in reference.state().values()) / 2**20
        print(
            f"{kind.mode}: {statistics.median(seconds):.3f} s a sync, {report.tensors} tensors compared, "
            f"{len(report.differ)} differ by up to {report.max_abs_diff:.1e}; {size:.0f} MiB kept"
        )
    fixed = {"beta": 0.04, "lora_rank": arguments.rank}
    synced = {**fixed, "sync_ref_model": True, "ref_model_sync_steps": 1000}
    for kind, alpha in (("adapter", 1.0), ("merged", 0.5)):
        compare(fixed, {**synced, "ref_model_mixup_alpha": alpha}, f"a reference that is synced ({kind})", arguments)


if __name__ == "__main__":
    main()

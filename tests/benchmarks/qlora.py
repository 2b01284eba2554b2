"""Peak memory of LoRA and of QLoRA on a CPU: a few steps of a recipe with each, in processes of their own.

    python -m trl_toolgrpo.recipes.models.smollm2 --output smollm2 && python tests/benchmarks/qlora.py smollm2
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[2]
LORA = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_r", "16", "--learning_rate", "1e-4"]
METHODS = {"LoRA": [], "QLoRA": ["--load_in_4bit", "true"]}


def measure(model: str, steps: int, flags: list[str], threads: int) -> tuple[float, float, list[dict]]:
    """Return peak memory in MiB, seconds and the log of a run."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "recipes" / "qwen3_tools.py"), "--config", "recipes/bfcl.yaml"]
        command += ["--model_name_or_path", model, "--output_dir", folder, "--max_steps", str(steps)]
        start = time.perf_counter()
        with open(Path(folder) / "console.txt", "w+") as console:
            process = subprocess.Popen(
                [*command, *LORA, *flags], cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            console.seek(0)
            if status != 0:
                raise RuntimeError(f"The run ended with status {status}:\n{console.read()[-3000:]}")
        log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return usage.ru_maxrss / 1024, time.perf_counter() - start, [entry for entry in log if "loss" in entry]


def main() -> None:
    """Run both and print memory and time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Folder or Hub id of the model.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for name, flags in METHODS.items():
        peak, seconds, log = measure(str(Path(arguments.model).absolute()), arguments.steps, flags, arguments.threads)
        ratios = ", ".join(f"{entry['ratio/mean']:.3f}" for entry in log)
        print(
            f"{name}: {len(log)} steps, peak {peak:.0f} MiB, {seconds:.0f} s in all; ratios {ratios}; "
            f"sampled log-probs off by {max(entry.get('sampling/logp_diff_max', 0.0) for entry in log):.1e} at most",
            flush=True,
        )


if __name__ == "__main__":
    main()

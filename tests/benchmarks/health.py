"""False alarms: whole runs of healthy recipes, and what the health rules report about each.

    python tests/benchmarks/health.py
    python tests/benchmarks/health.py --recipes mcp --steps 30
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


RECIPES = Path(__file__).parents[2] / "recipes"
LORA = [
    *("--use_peft", "true", "--lora_r", "16", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "2e-3"),
    *("--beta", "0.01", "--sync_ref_model", "true", "--ref_model_sync_steps", "5", "--ref_model_mixup_alpha", "1.0"),
]
RUNS = {
    "tiny_cpu": ("tiny_cpu.yaml", []),
    "tiny_cpu_value": ("tiny_cpu_value.yaml", []),
    "tiny_cpu with LoRA and a synced reference": ("tiny_cpu.yaml", LORA),
    "mcp": ("mcp.yaml", []),
    "smollm2_bfcl": ("smollm2_bfcl.yaml", []),
}


def main() -> None:
    """Run the recipes, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=RUNS, default=list(RUNS)[:3])
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of those of the recipe")
    arguments = parser.parse_args()
    alarms = 0
    for name in arguments.recipes:
        file, flags = RUNS[name]
        folder = tempfile.mkdtemp()
        command = [sys.executable, str(RECIPES / "qwen3_tools.py"), "--config", str(RECIPES / file), *flags]
        command += ["--output_dir", folder] + (["--max_steps", str(arguments.steps)] if arguments.steps else [])
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        steps = sum('"loss"' in line for line in (Path(folder) / "metrics.jsonl").read_text().splitlines())
        file = Path(folder) / "health.jsonl"
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        alarms += len(found)
        print(f"{name}: {steps} steps, {len(found)} lines in health.jsonl")
        for line in found:
            print(f"  step {line['step']} {line['rule']} {line['level']}: {line.get('message', 'over')}")
    print(f"{alarms} alarms")


if __name__ == "__main__":
    main()

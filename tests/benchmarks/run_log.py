"""The cost of logging: the rollout log, and all diagnostics and logging together, as shares of step time.

Both are measured inside one run of the tiny recipe.

    python tests/benchmarks/run_log.py

Work on the training thread is measured by the clock, work of the background writer by its processor time, since on a
busy machine it takes that from training.
"""

import argparse
import functools
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any


RECIPES = Path(__file__).parents[2] / "recipes"

class Meter:
    """Sums up the time of calls by kind, without calls of the same kind inside them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = threading.local()

    def watch(self, owner: Any, name: str, *kinds: str) -> None:
        """Count the calls of a function or method in each of the kinds."""
        called = getattr(owner, name)

        @functools.wraps(called)
        def counted(*args: Any, **kwargs: Any) -> Any:
            own = self._open.__dict__
            fresh = [kind for kind in kinds if not own.get(kind)]
            clock = time.perf_counter if threading.current_thread() is threading.main_thread() else time.thread_time
            own.update(dict.fromkeys(fresh, True))
            started = clock()
            try:
                return called(*args, **kwargs)
            finally:
                for kind in fresh:
                    self.seconds[kind] += clock() - started
                    own[kind] = False

        setattr(owner, name, counted)


def main() -> None:
    """Train, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(RECIPES / "tiny_cpu.yaml"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", default=None, help="folder of a model that is there already")
    arguments, more = parser.parse_known_args()

    from trl_toolgrpo.monitoring.health import watch as health_watch
    from trl_toolgrpo.monitoring.health.rules import RULES
    from trl_toolgrpo.recipes.arguments import parse_arguments
    from trl_toolgrpo.recipes.qwen3_tools import build_task, build_trainer
    from trl_toolgrpo.run_folder import writer as run_log

    folder = tempfile.mkdtemp()
    flags = ["--config", arguments.config, "--output_dir", folder, "--max_steps", str(arguments.steps)]
    flags += ["--held_out_size", "8", "--sample_every", "0", *more]
    flags += ["--model_name_or_path", arguments.model] if arguments.model else []
    recipe, training, model = parse_arguments(flags, {})
    trainer, _ = build_trainer(build_task(recipe, training), recipe, training, model)
    training.eval_on_start = False

    meter = Meter()
    records = trainer.records
    for name in ("on_batch", "on_update", "after_micro_batch"):
        meter.watch(records.log, name, "rollout log", "all")
    meter.watch(run_log.RolloutWriter, "_write", "rollout log", "all")
    meter.watch(records, "on_rollouts", "all")
    meter.watch(records.health, "after_log", "all")
    meter.watch(trainer.update.ratios, "add", "all")
    meter.watch(trainer.update.ratios, "metrics", "all")
    meter.watch(run_log, "add_line", "all")
    for name in ("costs", "correlation_within_groups"):
        meter.watch(health_watch, name, "all")
    started = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - started
    times = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry]
    rollouts = list((Path(folder) / "rollouts").glob("*.parquet"))
    size = sum(path.stat().st_size for path in rollouts) / 2**20
    rules = len(RULES)
    median = statistics.median(times)
    print(f"{len(times)} steps of {median:.3f} s, {rules} rules, {size / len(rollouts):.3f} MiB a rollout batch")
    for kind, limit in (("rollout log", 0.02), ("all", 0.03)):
        share = meter.seconds[kind] / whole
        words = "rollout log" if kind == "rollout log" else "diagnostics and logging together"
        each = 1000 * meter.seconds[kind] / len(times)
        print(f"{words}: {share:.2%} of step time, {each:.1f} ms a step (limit {limit:.0%})")


if __name__ == "__main__":
    main()

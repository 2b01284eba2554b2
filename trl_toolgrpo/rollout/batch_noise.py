"""Which noise a rollout batch gets with `deterministic_rollouts`, so that it is the same whatever the timing."""

from ..sampling.noise import RolloutNoise
from ..trl_hooks import Run


class BatchNoise:
    """
    The noise of each rollout batch of a run. Rows are in TRL's order: the rollouts of process 0 come first.

    Args:
        run ([`Run`]):
            The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._evaluated = 0  # rollouts of the evaluation in progress

    def begin_evaluation(self) -> None:
        """Begin an evaluation: each gets the same noise."""
        self._evaluated = 0

    def next_noise(self, count: int) -> RolloutNoise | None:
        """Return noise for the next `count` rollouts of this process; `None` if they need not be reproducible."""
        run = self._run
        if not run.args.deterministic_rollouts:
            return None
        own = run.accelerator.process_index * count
        if run.training:
            return RolloutNoise(run.args.seed, run.batch_number, own)
        first = self._evaluated + own
        self._evaluated += run.accelerator.num_processes * count
        return RolloutNoise(run.args.seed, run.state.global_step, first, "eval")

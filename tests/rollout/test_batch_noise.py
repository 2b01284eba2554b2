"""Which noise each rollout batch gets, without a trainer."""

from types import SimpleNamespace

from trl_toolgrpo.rollout.batch_noise import BatchNoise
from trl_toolgrpo.sampling.noise import RolloutNoise
from trl_toolgrpo.trl_hooks import Run


def made(process=0, processes=1, **changes):
    """Return noise of a run whose rollout batches feed two micro-batches, and what stands in for the trainer."""
    args = {"deterministic_rollouts": True, "seed": 5, "steps_per_generation": 2, "num_iterations": 1, **changes}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**args),
        accelerator=SimpleNamespace(process_index=process, num_processes=processes),
        model=SimpleNamespace(training=True),
        state=SimpleNamespace(global_step=0),
        _step=0,
    )
    return BatchNoise(Run(trainer)), trainer


def test_there_is_none_unless_it_is_asked_for():
    noise, _ = made(deterministic_rollouts=False)
    assert noise.next_noise(4) is None


def test_rollout_batches_are_told_apart_by_their_number_and_not_by_the_optimizer_step():
    noise, trainer = made()
    found = []
    for trainer._step, trainer.state.global_step in ((0, 0), (2, 0), (4, 7)):
        found.append(noise.next_noise(4))
    assert found == [RolloutNoise(5, 0), RolloutNoise(5, 1), RolloutNoise(5, 2)]


def test_rollouts_of_all_processes_are_counted_on():
    assert [made(process, 3)[0].next_noise(4).first for process in range(3)] == [0, 4, 8]
    assert made(1, 2)[0].next_noise(4)([0, 3]).tolist() == made()[0].next_noise(8)([4, 7]).tolist()


def test_each_evaluation_gets_the_same_noise_however_it_is_cut_into_batches():
    whole, trainer = made()
    trainer.model.training, trainer.state.global_step = False, 3
    expected = whole.next_noise(8)
    assert expected == RolloutNoise(5, 3, 0, "eval") and whole.next_noise(2).first == 8
    keys = expected(range(8)).tolist()
    noises = [made(process, 2) for process in range(2)]
    for _, other in noises:
        other.model.training, other.state.global_step = False, 3
    for _ in range(2):
        found = []
        for noise, _ in noises:
            noise.begin_evaluation()
        for _ in range(2):  # batches of two rollouts in each of two processes
            for noise, _ in noises:
                found += noise.next_noise(2)(range(2)).tolist()
        assert found == keys


def test_an_evaluation_does_not_change_the_noise_of_training():
    noise, trainer = made()
    trainer.model.training = False
    evaluated = noise.next_noise(4)
    trainer.model.training = True
    assert noise.next_noise(4) == RolloutNoise(5, 0) != evaluated

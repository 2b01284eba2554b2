"""`Run`, a trainer as parts see it: names, the place in the rollout batch, the state of a resumed run."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.extras.profiling import ProfilingContext

from trl_toolgrpo.config.batch_position import micro_batches_of, optimizer_steps_of
from trl_toolgrpo.trl_hooks import ATTRIBUTES, Run, profiler_reporting_within, replaced_attention


def arguments(accumulated=1, per_batch=1, passes=1):
    return SimpleNamespace(
        gradient_accumulation_steps=accumulated, steps_per_generation=per_batch, num_iterations=passes
    )


def trainer_at(step, args, batches=None, training=True):
    """Return what `Run` reads of a trainer at a micro-batch."""
    return SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=training),
        _step=step,
        _buffered_inputs=batches,
        _metrics={"train": {"reward": [1.0]}, "eval": {"reward": [2.0]}},
        _tr_loss=torch.tensor(0.5),
        _globalstep_last_logged=3,
    )


class FromTRL:
    """The part of TRL's trainer that chooses the micro-batch, with a rollout batch that says when it was made."""

    def __init__(self, args):
        self.args, self.num_iterations = args, args.num_iterations
        self.model = SimpleNamespace(training=True)
        self._step, self._buffered_inputs, self.made = 0, None, []

    def _generate_and_score_completions(self, inputs):
        self.made.append(self._step)
        batch, count = len(self.made) - 1, self.args.steps_per_generation
        return {"batch": torch.full((count,), batch)}

    def take(self):
        return GRPOTrainer._prepare_inputs.__wrapped__(self, {})


# Names


@pytest.mark.parametrize("name", sorted(Run.__annotations__))
def test_names_stand_for_attributes_of_the_trainer(name):
    trainer = SimpleNamespace()
    run = Run(trainer)
    theirs, first, second = ATTRIBUTES.get(name, name), object(), object()
    with pytest.raises(AttributeError, match=theirs):
        getattr(run, name)
    setattr(trainer, theirs, first)
    assert getattr(run, name) is first
    setattr(run, name, second)
    assert vars(trainer) == {theirs: second} and name not in vars(run)


@pytest.mark.parametrize("name", ["_step", "_buffered_inputs", "anything"])
def test_other_names_of_a_trainer_are_not_there(name):
    run = Run(SimpleNamespace(**{name: 1}))
    with pytest.raises(AttributeError, match=f"A run has no `{name}`"):
        getattr(run, name)


def test_other_names_are_the_runs_own():
    trainer = SimpleNamespace()
    run = Run(trainer)
    run.loss_to_take_up = (torch.tensor(1.0), 2)
    assert vars(trainer) == {} and run.loss_to_take_up[1] == 2


def test_names_have_one_meaning():
    assert len(set(ATTRIBUTES.values())) == len(ATTRIBUTES)
    assert not set(ATTRIBUTES) & {name for name in vars(Run) if name != "__annotations__"}


@pytest.mark.parametrize("training", [True, False])
def test_metrics_are_those_of_the_mode(training):
    run = Run(trainer_at(0, arguments(), training=training))
    assert run.training is training
    assert run.metrics == {"reward": [1.0 if training else 2.0]} and run.training_metrics == {"reward": [1.0]}


def test_callbacks_and_methods_are_the_trainers():
    calls = []

    def record(name):
        return lambda *args, **kwargs: calls.append((name, args, kwargs)) or name

    names = ["add_callback", "pop_callback", "save_model", "push_to_hub", "create_model_card", "_get_output_dir"]
    names += ["_generate_and_score_completions", "_finish_current_push"]
    trainer = SimpleNamespace(**{name: record(name) for name in names})
    trl = SimpleNamespace(init_hf_repo=record("init_hf_repo"), create_model_card=record("TRL's card"))
    run = Run(trainer, trl)
    run.add_callback(TrainerCallback)
    assert run.pop_callback(TrainerCallback) == "pop_callback"
    run.save_model()
    assert run.push_to_hub("done", False) == "push_to_hub"
    run.create_model_card(tags=["a"])
    assert run.output_folder() == "_get_output_dir" and run.generate([{}]) == "_generate_and_score_completions"
    run.finish_current_push()
    run.create_repository("token", True)
    run.trl_model_card("name", "data", ("a",))
    assert calls == [
        ("add_callback", (TrainerCallback,), {}),
        ("pop_callback", (TrainerCallback,), {}),
        ("save_model", (), {"_internal_call": True}),
        ("push_to_hub", ("done", False), {}),
        ("create_model_card", (), {"tags": ["a"]}),
        ("_get_output_dir", (None,), {}),
        ("_generate_and_score_completions", ([{}],), {}),
        ("_finish_current_push", (), {}),
        ("init_hf_repo", ("token", True), {}),
        ("TRL's card", ("name", "data", ["a"]), {}),
    ]


def test_other_arguments_are_read_while_open():
    usual, other = arguments(), arguments()
    run = Run(SimpleNamespace(args=usual))
    with pytest.raises(KeyError), run.arguments(other):
        assert run.args is other
        raise KeyError
    assert run.args is usual


# The place in the rollout batch


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("per_batch", range(1, 6))
@pytest.mark.parametrize("accumulated", range(1, 7))
def test_place_agrees_with_trls_rule(accumulated, per_batch, passes):
    args = arguments(accumulated, per_batch, passes)
    trainer = FromTRL(args)
    run = Run(trainer)
    steps = {}
    for count in range(60 * per_batch * passes):
        due, number, index = run.batch_is_due, run.batch_number, run.micro_batch_index
        assert run.batch_in_use == (not due)
        made = len(trainer.made)
        inputs = trainer.take()
        assert due == (len(trainer.made) > made)
        assert number == inputs["batch"].item()
        assert inputs is trainer._buffered_inputs[index] and inputs is run.next_micro_batch
        trainer._step += 1  # TRL does so when a micro-batch has passed
        steps.setdefault(number, set()).add(count // accumulated)
    assert micro_batches_of(args) == per_batch * passes
    assert optimizer_steps_of(args) == max(map(len, steps.values()))


def test_a_lost_batch_is_due_again():
    """A checkpoint of TRL's does not hold the batch."""
    run = Run(trainer_at(6, arguments(per_batch=4)))
    assert run.batch_is_due and not run.batch_in_use and run.batch_number == 1
    with pytest.raises(RuntimeError, match="no rollout batch"):
        _ = run.next_micro_batch


def test_a_run_that_begins_anew_is_at_a_batch():
    run = Run(trainer_at(6, arguments(per_batch=4), [{}] * 4))
    assert run.batch_in_use
    run.forget_place()
    assert run.batch_is_due and (run.step, run.batch_number, run.micro_batches) == (0, 0, None)


# A resumed run


def test_state_is_restored():
    batches = [{"advantages": torch.arange(3.0) + part} for part in range(4)]
    trainer = trainer_at(6, arguments(per_batch=4), batches)
    state = Run(trainer).state_dict()
    trainer._metrics["train"]["reward"].append(5.0)  # a state is of its time
    fresh = trainer_at(0, arguments(per_batch=4))
    fresh._metrics["train"]["left over"] = [1.0]
    kept = fresh._metrics["train"]
    run = Run(fresh)
    run.load_state_dict(state)
    assert (run.step, run.batch_number, run.micro_batch_index, run.batch_in_use) == (6, 1, 2, True)
    assert run.training_metrics == {"reward": [1.0]} and run.training_metrics is kept
    assert [batch["advantages"].tolist() for batch in run.micro_batches] == [
        batch["advantages"].tolist() for batch in batches
    ]
    assert run.micro_batches[0] is not batches[0]
    assert Run(fresh).state_dict().keys() == state.keys()


def test_a_batch_that_was_used_up_is_not_kept():
    run = Run(trainer_at(8, arguments(per_batch=4), [{}] * 4))
    state = run.state_dict()
    assert state["batches"] == []
    run.load_state_dict(state)
    assert run.micro_batches is None and run.batch_is_due


def test_unlogged_loss_is_taken_up_once():
    state = Run(trainer_at(2, arguments())).state_dict()
    trainer = trainer_at(0, arguments())
    run = Run(trainer)
    run.load_state_dict(state)
    trainer._tr_loss, trainer._globalstep_last_logged = torch.tensor(0.0), 9  # as transformers begins to train
    for _ in range(2):
        run.take_up_unlogged_loss()
        assert trainer._tr_loss.item() == 0.5 and trainer._globalstep_last_logged == 3


def test_a_new_run_takes_up_no_loss():
    trainer = trainer_at(0, arguments())
    run = Run(trainer)
    run.take_up_unlogged_loss()
    run.load_state_dict(Run(trainer_at(2, arguments())).state_dict())
    run.forget_unlogged_loss()
    run.take_up_unlogged_loss()
    assert trainer._tr_loss.item() == 0.5


# What is replaced for a while


def test_attention_is_put_back_after_a_failure():
    config = SimpleNamespace(_attn_implementation="sdpa")
    with pytest.raises(KeyError), replaced_attention(config, "other"):
        assert config._attn_implementation == "other"
        raise KeyError
    assert config._attn_implementation == "sdpa"


def test_durations_are_reported_within_the_guard():
    events = []

    @contextmanager
    def guard():
        events.append("opened")
        try:
            yield
        except TypeError:
            events.append("failed")

    usual = ProfilingContext._log_metrics
    broken = ProfilingContext("part", report_to=None, is_main_process=True)
    with profiler_reporting_within(guard), broken:
        pass
    assert events == ["opened", "failed"] and ProfilingContext._log_metrics is usual

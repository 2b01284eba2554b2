"""What scripts do to TRL's trainer in addition to training it: call its parts, with records they made themselves."""

import copy
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import chat_tokenizer, config, prompts, tiny_model
from trl import GRPOTrainer

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.sampling.protocol import scoring_mode


def make(kind, path, **changes):
    tokenizer = chat_tokenizer()
    return kind(
        tiny_model(tokenizer),
        lambda completions, **kwargs: [float(len(str(completion))) for completion in completions],
        config(path, **{"per_device_eval_batch_size": 4, "num_generations_eval": 4, **changes}),
        prompts(),
        processing_class=tokenizer,
    )


def rollouts(trainer, training):
    trainer.model.train(training)
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "hello"}]}] * 4)


def move(trainer):
    """What an optimizer step does to a policy, writ large."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def trls_loss(trainer, inputs):
    """The loss as TRL's own trainer computes it from the same weights and the same batch."""
    other = make(GRPOTrainer, trainer.args.output_dir)
    other.model.load_state_dict(trainer.model.state_dict())
    other.model.train(trainer.model.training)
    other.current_gradient_accumulation_steps = 1
    return other._compute_loss(other.model, inputs)


def test_a_recomputed_loss_uses_the_current_weights(tmp_path):
    trainer = make(ToolGRPOTrainer, tmp_path)
    inputs = rollouts(trainer, training=False)
    with torch.no_grad():
        first = trainer._compute_loss(trainer.model, inputs)
        move(trainer)
        again = trainer._compute_loss(trainer.model, inputs)
        torch.testing.assert_close(again, trls_loss(trainer, inputs))
    assert abs(again - first) > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_a_handmade_batch_is_not_taken_for_the_sampled_one(tmp_path, training):
    trainer = make(ToolGRPOTrainer, tmp_path)
    inputs = rollouts(trainer, training)
    by_hand = {**inputs, "completion_ids": inputs["completion_ids"].flip(dims=(0,))}
    assert not torch.equal(by_hand["completion_ids"], inputs["completion_ids"])
    with torch.no_grad():
        torch.testing.assert_close(trainer._compute_loss(trainer.model, by_hand), trls_loss(trainer, by_hand))


def test_a_loss_in_evaluation_mode_has_a_gradient(tmp_path):
    trainer = make(ToolGRPOTrainer, tmp_path)
    inputs = rollouts(trainer, training=False)
    trainer._compute_loss(trainer.model, inputs).backward()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_old_log_probs_has_trls_loss(tmp_path, training):
    trainer = make(ToolGRPOTrainer, tmp_path)
    inputs = rollouts(trainer, training)
    del inputs["old_per_token_logps"], inputs["sampling_per_token_logps"]
    torch.testing.assert_close(trainer._compute_loss(trainer.model, inputs), trls_loss(trainer, inputs))


def test_old_log_probs_are_recorded_even_where_generate_is_overridden(tmp_path):
    trainer = make(ToolGRPOTrainer, tmp_path)
    generate = trainer._generate

    def without_the_first(prompts):
        output = list(generate(prompts))
        output[4] = [[None, *row[1:]] for row in copy.deepcopy(output[4])]
        return tuple(output)

    trainer._generate = without_the_first
    batch = rollouts(trainer, training=True)
    recorded = trainer.rollouts.batch.logprobs(batch["completion_ids"].size(1), "cpu")
    assert batch["sampling_per_token_logps"][:, 0].isnan().all()
    torch.testing.assert_close(batch["old_per_token_logps"], recorded, rtol=0, atol=0)
    assert trainer._compute_loss(trainer.model, batch).isfinite()


def test_a_trainer_without_its_constructor_acts_as_trls(tmp_path):
    """Tests build a bare trainer to call one method of it."""
    trainer = object.__new__(ToolGRPOTrainer)
    vars(trainer).update(vars(make(GRPOTrainer, tmp_path)))
    record = {"prompt_ids": [[1]], "completion_ids": [[2]], "logprobs": [[-0.1]], "env_mask": [[1]]}
    trainer.rollout_func = lambda prompts, trainer: dict(record)
    trainer.model = SimpleNamespace(training=True)
    prompt_ids, completion_ids, mask, _, logprobs, *_ = trainer._generate(["hello"])
    assert [prompt_ids, completion_ids, mask, logprobs] == [[[1]], [[2]], [[1]], [[-0.1]]]


@pytest.mark.parametrize("in_training", [True, False])
def test_weights_of_a_4_bit_base_keep_the_form_they_are_trained_in(in_training):
    """On some CPUs bitsandbytes packs a weight for inference at the first pass in evaluation mode, for good."""
    layer = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu")  # which quantizes it
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    layer.support_avx512bf16_for_cpu = True
    model = torch.nn.ModuleDict({"layer": layer, "dropout": torch.nn.Dropout()}).train(in_training)
    before = layer.weight.data.clone()
    if in_training:
        with scoring_mode(model):
            assert not model["dropout"].training
            layer(torch.ones(1, 64))
        assert model["dropout"].training and layer.training
        assert torch.equal(layer.weight.data, before)
    else:  # a layer that nobody trains is left as it is
        with scoring_mode(model):
            assert not layer.training

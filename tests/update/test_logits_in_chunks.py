"""The logits of a micro-batch never stand whole: every pass over rollouts computes them in chunks, both ways."""

import pytest
import torch
from conftest import Largest, chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.models.rounding import Rounding, score
from trl_toolgrpo.update.packing import TRIAL_ROLLOUTS


VOCABULARY = 151_936
ROWS, WIDTH = 8, 8


def trainer_of(tmp_path, target=None, **changes):
    tokenizer = chat_tokenizer()
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "tie_word_embeddings": True}
    model = tiny_model(tokenizer, vocab_size=VOCABULARY, **small)
    adapter = LoraConfig(r=2, target_modules=[target]) if target else None
    trainer = ToolGRPOTrainer(
        model,
        lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))],
        config(tmp_path, per_device_train_batch_size=ROWS, **changes),
        prompts(8),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.update.scoring._aligns(trainer.model)  # a trial of 42 tokens, whatever the batch is
    return trainer


def batch(rows=ROWS):
    """Rollouts of one prompt, with as many tokens each."""
    draw = torch.Generator().manual_seed(0)
    completions = torch.randint(0, VOCABULARY, (rows, WIDTH), generator=draw)
    ids = torch.cat([torch.arange(3)[None].expand(rows, -1), completions], dim=1)
    return ids, torch.ones_like(ids), WIDTH


WHOLE = ROWS * WIDTH * VOCABULARY
CASES = {
    "packed": {},
    "one a row": {"shared_prompt_updates": False},
    "in bfloat16": {"bf16": True},
    "head in float32": {"bf16": True, "cast_lm_head_to_fp32": True},
    "checkpointing": {"gradient_checkpointing": True},
    "an adapter": {"target": "q_proj"},
    "an adapter on the head": {"target": "lm_head"},
    "values": {"advantage_estimator": "group_gae"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch_is_scored_in_chunks(tmp_path, name):
    trainer = trainer_of(tmp_path, **CASES[name])
    scoring = trainer.update.scoring
    scoring.packing.active = name != "one a row"  # without its trial
    want = ["logps", "entropies"] + ["values"] * (name == "values")
    trainer.model.train()
    with Largest() as largest:
        scores = scoring.score(trainer.model, batch(), want)
        (scores.logps + 0.1 * scores.entropies).sum().backward()
    assert scores.logps.shape == (ROWS, WIDTH) and (name == "values") is (scores.values is not None)
    assert VOCABULARY * 8 <= largest.elements < WHOLE / 3


@pytest.mark.parametrize("cast", [False, True])
def test_the_checks_of_log_probs_score_in_chunks(tmp_path, cast):
    trainer = trainer_of(tmp_path, bf16=True, cast_lm_head_to_fp32=cast)
    scoring = trainer.update.scoring
    with Largest() as largest:
        scoring.score_policy(batch())  # with the trial of packing
        found = scoring.measure_rounding(trainer.model, batch())
    assert isinstance(found, Rounding) and scoring.packing.active is not None
    assert largest.elements < WHOLE / 3


def test_a_pass_in_one_piece_would_be_noticed(tmp_path):
    trainer = trainer_of(tmp_path)
    ids = batch()[0]
    with Largest() as largest, torch.no_grad():
        trainer.model(input_ids=ids, logits_to_keep=WIDTH)
    assert largest.elements >= WHOLE


def test_every_process_measures_rounding_in_as_many_passes(tmp_path):
    """However many rollouts its largest group has."""
    trainer = trainer_of(tmp_path, bf16=True)
    passes, forward = [], trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs)
    found = {rows: trainer.update.scoring.measure_rounding(trainer.model, batch(rows)) for rows in (1, 2, 4)}
    assert len(passes) == 3 * 2 * TRIAL_ROLLOUTS
    assert found[1] != found[4]


def test_rollouts_are_scored_one_after_the_other():
    model = tiny_model(chat_tokenizer()).double().eval()
    prompt, completions = [3, 1, 4, 1, 5], torch.randint(0, 300, (3, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = score(model, prompt, completions, 0.7, torch.no_grad)
        ids = torch.cat([torch.tensor([prompt]).expand(3, -1), completions], dim=1)
        logps = torch.log_softmax(model(input_ids=ids).logits / 0.7, dim=-1)[:, 4:-1]
    expected = logps.gather(-1, completions[..., None])[..., 0]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)

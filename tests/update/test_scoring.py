"""Scoring with shared prompts: the packed layout, and log-probs and gradients equal to those of TRL's own pass."""


import pytest
import torch
import transformers
from conftest import chat_tokenizer, config, prompts, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.update import packing, scoring
from trl_toolgrpo.update.packed_attention import dense_mask
from trl_toolgrpo.update.packing import lay_out, obstacle_to_packing, pack


PAD = 0


def batch_of(prompts, completions):
    """Left-padded prompts and right-padded completions: ids, mask, and the width of the completions."""
    wide, long = max(map(len, prompts)), max(1, *map(len, completions))
    ids = [
        [PAD] * (wide - len(p)) + p + c + [PAD] * (long - len(c)) for p, c in zip(prompts, completions, strict=True)
    ]
    mask = [
        [0] * (wide - len(p)) + [1] * len(p) + [1] * len(c) + [0] * (long - len(c))
        for p, c in zip(prompts, completions, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask), long


def test_a_packed_group_by_hand():
    ids, mask, width = batch_of([[1, 2, 3], [1, 2, 3]], [[7, 8], [9]])
    packed = pack(ids, mask, width)
    assert packed.input_ids.tolist() == [[1, 2, 3, 7, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.labels.tolist() == [[-100, -100, 7, 8, 9]]
    assert dense_mask(packed.pieces, 5)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert packed.labelled().tolist() == [2, 3, 4]
    unpacked = packed.unpack(torch.tensor([[-7.0, -8.0, -9.0]]), packed.labelled())
    assert unpacked.tolist() == [[-7.0, -8.0], [-9.0, 0.0]]


def test_a_padded_batch_has_the_same_tokens():
    packed = pack(*batch_of([[1, 2, 3], [4, 5, 6, 7]] * 2, [[7, 8], [9], [6], [5, 4, 3]]))
    padded = packed.padded(8)
    assert packed.input_ids.shape == (2, 7) and padded.input_ids.shape == (2, 8) == padded.position_ids.shape
    assert torch.equal(padded.input_ids[:, :7], packed.input_ids) and padded.labels[:, 7].tolist() == [-100, -100]
    for batch in (packed, padded):
        kept = batch.labelled()
        unpacked = batch.unpack(batch.labels.reshape(1, -1)[:, kept], kept)
        assert unpacked.tolist() == [[7, 8, 0], [9, 0, 0], [6, 0, 0], [5, 4, 3]]
    assert torch.equal(padded.padded(8).place, padded.place)


def test_rows_are_laid_out_from_the_first_column():
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 0], [1, 2, 3, 4, 9, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]])
    values = torch.arange(14.0)[None]
    for aligned, expected_ids, expected_mask, expected in (
        (True, [[5, 6, 7, 8, 0], [1, 2, 3, 4, 9]], [[1, 1, 1, 1, 0], [1] * 5], [[1, 2, 0], [8, 0, 0]]),
        (False, ids.tolist(), mask.tolist(), [[3, 4, 0], [10, 0, 0]]),
    ):
        batch = lay_out(ids, mask, 3, aligned)
        assert batch.input_ids.tolist() == expected_ids and batch.attention_mask.tolist() == expected_mask
        assert batch.scored.tolist() == [[True, True, False], [True, False, False]]
        predicted = batch.labels.reshape(-1)[batch.labelled()]
        assert predicted.tolist() == [7, 8, 9]
        kept = batch.labelled()  # each token is predicted by the position before it
        assert batch.unpack(values[:, kept], kept).tolist() == expected


def test_batches_that_gain_nothing_are_not_packed():
    assert pack(*batch_of([[1, 2], [1, 3]], [[7], [8]])) is None  # no prompt is shared
    ids, mask, width = batch_of([[1, 2, 3]] * 2, [[7, 8, 9], [7, 8, 9]])
    mask[0, -2] = 0
    assert pack(ids, mask, width) is None  # a hole in a completion


def test_a_long_group_is_split_over_several_sequences(monkeypatch):
    monkeypatch.setattr(packing, "PACKED_LENGTH", 8)
    packed = pack(*batch_of([[1, 2, 3, 4]] * 4, [[7, 8], [9, 7], [8], [9, 9, 9]]))
    assert packed.input_ids.shape == (2, 7)
    assert packed.labels[0].tolist() == [-100, -100, -100, 7, 8, 9, 7]
    assert packed.labels[1].tolist() == [-100, -100, -100, 8, 9, 9, 9]
    monkeypatch.setattr(packing, "PACKED_LENGTH", 5)
    assert pack(*batch_of([[1, 2, 3, 4]] * 2, [[7, 8, 9], [9]])) is None  # not even one rollout fits


BATCHES = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 50), max_size=6)), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_every_completion_token_has_its_place(rows):
    shared = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24, 25, 26]]
    prompts, completions = [shared[index] for index, _ in rows], [completion for _, completion in rows]
    packed = pack(*batch_of(prompts, completions))
    if packed is None:
        return
    assert packed.scored.sum() == sum(map(len, completions)) == (packed.labels != -100).sum()
    kept = packed.labelled()
    found, inputs, positions = (
        packed.unpack(tensor.reshape(1, -1)[:, kept], kept)
        for tensor in (packed.labels, packed.input_ids, packed.position_ids)
    )
    flat = dense_mask(packed.pieces, packed.input_ids.shape[1])[:, 0]
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        count = len(completion)
        assert found[row, :count].tolist() == completion and not found[row, count:].any()
        assert inputs[row, :count].tolist() == ([prompt[-1], *completion])[:count]
        assert positions[row, :count].tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + count))
        for step in range(count):  # each token sees its own history, and nothing else
            index, place = divmod(int(packed.place[row, step]), packed.labels.shape[1])
            seen = packed.input_ids[index][flat[index, place]].tolist()
            assert seen == ([*prompt, *completion])[: len(prompt) + step]


def test_a_failed_pass_is_decided_on_by_all_processes(tmp_path, monkeypatch, caplog):
    trainer = trainer_of(tmp_path, tiny_model(tokenizer := chat_tokenizer()), tokenizer)
    gathered, gather = [], trainer.accelerator.gather
    monkeypatch.setattr(trainer.accelerator, "gather", lambda found: gathered.append(found) or gather(found))
    scoring = trainer.update.scoring
    monkeypatch.setattr(scoring, "_pass", lambda *args: (_ for _ in ()).throw(RuntimeError("no such mask")))
    scoring._decide_packing(trainer.model, batch_of([[1, 2, 3]] * 4, [[7, 8], [9], [7], [8]]), True)
    assert scoring.packing.active is False and scoring.packing.reason == "RuntimeError: no such mask"
    assert [found.tolist() for found in gathered] == [[[0, 1, 0, 0]]]
    assert "RuntimeError: no such mask" in caplog.text and "differ by" not in caplog.text


@pytest.mark.parametrize("other_fails", [False, True])
def test_no_process_waits_for_a_failed_one(tmp_path, monkeypatch, other_fails):
    """Both gather alike: the longest completion, its rounding and the verdict."""
    trainer = trainer_of(tmp_path, tiny_model(tokenizer := chat_tokenizer()), tokenizer, bf16=True)
    gathered, gather = [], trainer.accelerator.gather

    def gather_two(found):
        other = found.clone()
        if len(gathered) == 2 and other_fails:
            other[0, 1] = 1.0
        gathered.append(found)
        return torch.cat([gather(found), other])

    monkeypatch.setattr(trainer.accelerator, "gather", gather_two)
    batch = batch_of([[1, 2, 3]] * 4, [[7, 8], [9], [7], [8]])
    trainer.update.scoring._decide_packing(trainer.model, batch, True)
    assert trainer.update.scoring.packing.active is not other_fails
    assert [len(found.flatten()) for found in gathered] == [1, 5, 4]


def llama(tokenizer):
    torch.manual_seed(1)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **options))
    model.config._name_or_path = "tiny-llama"
    return model


def windowed(tokenizer):
    torch.manual_seed(1)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(tokenizer), **options))
    model.config._name_or_path = "tiny-gemma3"
    return model


def trainer_of(tmp_path, model, tokenizer, **changes):
    options = {"temperature": 0.7, "per_device_train_batch_size": 8, "beta": 0.0, **changes}
    rewards = lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]  # noqa: E731
    return ToolGRPOTrainer(model, rewards, config(tmp_path, **options), prompts(8), processing_class=tokenizer)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny_model, llama])
def test_log_probs_entropies_and_gradients_are_those_of_trl(tmp_path, make, attention, checkpointing, monkeypatch):
    tokenizer = chat_tokenizer()
    in_pieces = []
    with_pieces = scoring.packed_attention
    monkeypatch.setattr(scoring, "packed_attention", lambda *a: in_pieces.append(a) or with_pieces(*a))
    # transformers' eager attention masks padding with the smallest float64 and then takes a float32 softmax: NaN
    model = make(tokenizer).to(torch.float64 if attention == "sdpa" else torch.float32)
    exact = 1e-10 if attention == "sdpa" else 1e-5
    model.set_attn_implementation(attention)
    trainer = trainer_of(tmp_path, model, tokenizer, gradient_checkpointing=checkpointing is not None)
    if checkpointing is not None:
        trainer.model.gradient_checkpointing_enable(checkpointing)
    trainer.model.train()
    draw = torch.Generator().manual_seed(2)
    texts = [torch.randint(1, 200, (n,), generator=draw).tolist() for n in (40, 33)]
    completions = [torch.randint(1, 200, (n,), generator=draw).tolist() for n in (5, 9, 1, 0, 7, 9)]
    ids, mask, width = batch_of([texts[0], texts[1], texts[0], texts[0], texts[1], texts[0]], completions)
    weights = torch.rand(6, width, generator=draw, dtype=torch.float64)

    def run(score):
        trainer.model.zero_grad()
        logps, entropies, _ = score()
        ((logps + 0.3 * entropies) * weights.to(logps.dtype)).sum().backward()
        return logps.detach(), entropies.detach(), [p.grad.clone() for p in trainer.model.parameters()]

    arguments = (trainer.model, ids, mask, width)
    plain = run(lambda: GRPOTrainer._get_per_token_logps_and_entropies(trainer, *arguments, compute_entropy=True))
    ours = run(lambda: trainer._get_per_token_logps_and_entropies(*arguments, compute_entropy=True))
    assert trainer.update.scoring.packing.active is True
    assert bool(in_pieces) is (attention == "sdpa")
    torch.testing.assert_close(ours[0], plain[0], atol=exact, rtol=exact)
    torch.testing.assert_close(ours[1], plain[1], atol=exact, rtol=exact)
    for one, other in zip(ours[2], plain[2], strict=True):  # TRL's kernel adds up gradients in float32
        assert (one - other).norm() <= max(exact, 1e-6) * other.norm()
    chunked = trainer._get_per_token_logps_and_entropies(*arguments, batch_size=4)[0]
    torch.testing.assert_close(chunked, plain[0], atol=exact, rtol=exact)


def test_training_scores_each_prompt_once(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer()
    trainer = trainer_of(tmp_path, tiny_model(tokenizer), tokenizer, logprob_check="always", max_steps=2)
    shapes = []
    forward = trainer.model.forward

    def watch(*args, **kwargs):
        if kwargs.get("fused_lm_head"):
            shapes.append((torch.is_grad_enabled(), tuple(kwargs["input_ids"].shape)))
        return forward(*args, **kwargs)

    trainer.model.forward = watch
    trainer.train()
    assert trainer.update.scoring.packing.active is True
    trained = [shape for grad, shape in shapes if grad]
    assert len(trained) == 2 and all(shape[0] == 2 for shape in trained)  # two prompts, four rollouts each
    logs = [log for log in trainer.state.log_history if "ratio/mean" in log]
    assert all(log["ratio/mean"] == pytest.approx(1.0, abs=1e-4) for log in logs) and len(logs) == 2


def test_unpackable_models_are_scored_by_trl(tmp_path):
    tokenizer = chat_tokenizer()
    assert obstacle_to_packing(windowed(tokenizer)) is not None
    trainer = trainer_of(tmp_path, windowed(tokenizer), tokenizer, logprob_check="off")
    trainer.train()
    assert trainer.update.scoring.packing.active is False
    model = tiny_model(tokenizer)
    assert obstacle_to_packing(model) is None
    model.config._attn_implementation = "flash_attention_2"
    assert obstacle_to_packing(model) is not None


def test_a_model_that_ignores_the_mask_is_not_packed(tmp_path, monkeypatch, caplog):
    """A model that keeps its own attention would score packed rollouts as one long text."""
    tokenizer = chat_tokenizer()
    trainer = trainer_of(tmp_path, tiny_model(tokenizer), tokenizer, logprob_check="off")
    forward = trainer.model.forward

    def deaf(*args, **kwargs):
        trainer.model.config._attn_implementation = "sdpa"
        return forward(*args, **kwargs)

    trainer.model.forward = deaf
    trainer.train()
    assert trainer.update.scoring.packing.active is False and "scored one by one" in caplog.text


MIXED = {
    "Lfm2": {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    "Jamba": {"mamba_d_state": 8, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "use_mamba_kernels": False},
    "Bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
              "attn_layer_indices": [1]},
    "Qwen3Next": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8,
                  "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                  "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                  "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_layers_with_a_state_are_not_packed(name):
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = getattr(transformers, f"{name}Config")(**{**shape, **heads, **MIXED[name]})
    assert obstacle_to_packing(getattr(transformers, f"{name}ForCausalLM")(made)) is not None


class Recurrent(torch.nn.Module):
    """A layer that passes a little of each token on to later ones, under a name that does not say so."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, *args, **kwargs):
        mixed = hidden + 1e-4 * hidden.cumsum(dim=1)
        return self.inner(mixed, *args, **kwargs)


@pytest.mark.parametrize("low_precision", [False, True])
def test_a_small_leak_between_rollouts_is_found(tmp_path, low_precision, caplog):
    tokenizer = chat_tokenizer()
    model = tiny_model(tokenizer)
    model.model.layers[1].mlp = Recurrent(model.model.layers[1].mlp)
    trainer = trainer_of(tmp_path, model, tokenizer, logprob_check="off", bf16=low_precision)
    batch = batch_of([list(range(1, 40))] * 3, [[7, 8, 9, 10], [9, 4, 2], [7, 11]])
    trainer._get_per_token_logps_and_entropies(trainer.model, *batch)
    assert trainer.update.scoring.packing.active is False
    assert "the text of one changes the log-probs of another" in caplog.text


def test_running_out_of_memory_is_raised_everywhere(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer()
    trainer = trainer_of(tmp_path, tiny_model(tokenizer), tokenizer)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.update.scoring, "_pass", full)
    batch = batch_of([list(range(1, 40))] * 3, [[7, 8, 9, 10], [9, 4, 2], [7, 11]])
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trainer.update.scoring._decide_packing(trainer.model, batch, True)
    assert trainer.update.scoring.packing.active is None
    monkeypatch.undo()
    gather = trainer.accelerator.gather  # another process ran out of memory
    monkeypatch.setattr(trainer.accelerator, "gather", lambda x: torch.cat([gather(x), torch.ones_like(x)]))
    with pytest.raises(RuntimeError, match="Another process ran out of memory"):
        trainer.update.scoring._decide_packing(trainer.model, batch, True)


def test_without_recording_trls_pass_is_untouched(tmp_path):
    tokenizer = chat_tokenizer()
    trainer = trainer_of(tmp_path, tiny_model(tokenizer), tokenizer, record_sample_logprobs=False)
    trainer.train()
    assert trainer.update.scoring.packing.active is False

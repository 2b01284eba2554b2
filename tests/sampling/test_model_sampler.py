"""The default sampler against plain full forward passes, its state machine, and the sampling of single tokens."""

import math
from contextlib import contextmanager

import pytest
import torch
import transformers
from conftest import chat_tokenizer, config, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.errors import SamplerError
from trl_toolgrpo.sampling import model_sampler
from trl_toolgrpo.sampling.model_sampler import ModelSampler, ModelSession
from trl_toolgrpo.sampling.shared_prefix import ATTENTION_NAME


VOCAB = 61
STOPS = [1, 2]
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
NO_HEAD_DIM = {name: value for name, value in SHAPE.items() if name != "head_dim"}
ARCHITECTURES = {
    "Qwen3": SHAPE,
    "Llama": {**SHAPE, "num_key_value_heads": 1},
    "Mistral": {**SHAPE, "sliding_window": 9},
    "Gemma2": {
        **SHAPE,
        "sliding_window": 7,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "GptOss": {**SHAPE, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2": {**NO_HEAD_DIM, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Cohere2": {**NO_HEAD_DIM, "sliding_window": 6, "num_hidden_layers": 4},
    "Qwen3Moe": {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
NAMES = [*ARCHITECTURES, "LoRA"]

# Two groups of a shared prompt, one prompt of a single row and one of a single token
PROMPTS = (
    [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]] * 3 + [[20, 21, 22]] * 2 + [[30, 31, 32, 33, 34, 35]] + [[40]] * 2
)


def build(name, seed=0):
    """Return a tiny model with weights large enough for peaked distributions and attention that matters."""
    torch.manual_seed(seed)
    base = "Qwen3" if name == "LoRA" else name
    # Built by name, so that an architecture costs its import only where it is tested
    made = getattr(transformers, f"{base}Config")(**ARCHITECTURES[base])
    model = getattr(transformers, f"{base}ForCausalLM")(made)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
        if name == "GptOss" and parameter.ndim == 1 and parameter.shape[0] == 4:
            parameter.data.normal_()  # attention sinks
    if name == "LoRA":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.3)
    return model


def roll(sampler, prompts=PROMPTS, turns=4):
    """Sample ragged rollouts of several turns; return histories and (position, log-prob) of every sampled token."""
    histories = [list(prompt) for prompt in prompts]
    recorded = [[] for _ in prompts]
    done = [0] * len(prompts)
    with sampler.open(prompts, 200) as session:
        for row in range(len(prompts)):
            session.extend(row, [], 4 + row)
        while session.busy:
            for result in session.step():
                row = result.row
                assert len(result.token_ids) == len(result.logprobs) >= 1
                recorded[row] += zip(range(len(histories[row]), 1000), result.logprobs, strict=False)
                histories[row] += result.token_ids
                done[row] += 1
                if done[row] < turns:
                    read = [(3 * row + k) % 50 + 5 for k in range((row * 5 + done[row]) % 11)]
                    histories[row] += read
                    session.extend(row, read, 2 + (row + done[row]) % 5)
                else:
                    session.finish(row)
    assert done == [turns] * len(prompts)
    return histories, recorded


@torch.no_grad()
def recompute(model, history, temperature, by_token=False):
    """Return log-probs of every token of a history, by plain forward passes without a cache, softmax in float64."""
    ids = torch.tensor([history])
    if by_token:
        logits = torch.stack(
            [model(input_ids=ids[:, :stop], use_cache=False).logits[0, -1] for stop in range(1, len(history))]
        )
    else:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
    return [math.nan, *logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()]


def worst_gap(model, histories, recorded, temperature=1.0, by_token=False):
    model.eval()
    gaps = []
    for history, pairs in zip(histories, recorded, strict=True):
        expected = recompute(model, history, temperature, by_token)
        gaps += [abs(expected[place] - value) for place, value in pairs]
    assert len(gaps) > 40
    return max(gaps)


@contextmanager
def batched(monkeypatch, value):
    """Attend to all prompts in one padded product, or to one after the other, wherever both are possible."""
    original = ModelSession._layout

    def layout(self, prompts):
        found = original(self, prompts)
        used.append(found.batched)
        return found

    used = []
    monkeypatch.setattr(ModelSession, "_pads", lambda self, sizes: value)
    monkeypatch.setattr(ModelSession, "_layout", layout)
    yield
    assert value in used


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_recorded_logprobs_are_those_of_plain_forward_passes(name, together, monkeypatch):
    model = build(name)
    with batched(monkeypatch, together):
        histories, recorded = roll(ModelSampler(model, STOPS, 0, temperature=0.8))
    assert worst_gap(model, histories, recorded, temperature=0.8) < 2e-5


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_recorded_logprobs_of_a_float64_model_are_exact(name, together, monkeypatch):
    """Rows of one step have own tokens of different number, up to about 40; transformers' own eager attention, which
    Gemma 2 and gpt-oss have, takes its softmax in float32."""
    model = build(name).double()
    model.set_experts_implementation("eager")  # torch has no grouped product in float64
    with batched(monkeypatch, together):
        histories, recorded = roll(ModelSampler(model, STOPS, 0, temperature=0.8))
    eager = model.config._attn_implementation == "eager"
    assert worst_gap(model, histories, recorded, temperature=0.8) < (2e-6 if eager else 1e-9)


def test_recorded_logprobs_are_those_of_one_forward_pass_for_each_token():
    model = build("Mistral")
    histories, recorded = roll(ModelSampler(model, STOPS, 0))
    assert worst_gap(model, histories, recorded, by_token=True) < 2e-5


@pytest.mark.parametrize("name", ["Qwen3", "Gemma2", "GptOss"])
def test_sampled_tokens_do_not_depend_on_the_other_rows(name):
    """With given noise a row is the same alone and in a batch, whatever the others do."""
    model = build(name)
    noise = torch.rand(len(PROMPTS), 400, generator=torch.Generator().manual_seed(3))

    def rollouts(rows):
        drawn = dict.fromkeys(range(len(rows)), 0)

        def draw(asked):
            values = torch.tensor([noise[rows[row], drawn[row]] for row in asked])
            for row in asked:
                drawn[row] += 1
            return values

        session_prompts = [PROMPTS[row] for row in rows]
        with ModelSampler(model, STOPS, 0, noise=draw).open(session_prompts, 60) as session:
            found = [[] for _ in rows]
            for place, row in enumerate(rows):
                session.extend(place, [], 3 + row)
            while session.busy:
                for result in session.step():
                    found[result.row].append(result.token_ids)
                    if len(found[result.row]) < 3:
                        session.extend(result.row, [7] * rows[result.row], 4)
        return found

    together = rollouts(list(range(len(PROMPTS))))
    for row in range(len(PROMPTS)):
        assert rollouts([row])[0] == together[row]


def test_lora_adapter_is_part_of_the_policy():
    model = build("LoRA")
    histories, recorded = roll(ModelSampler(model, STOPS, 0))
    with model.disable_adapter():
        assert worst_gap(model, histories, recorded) > 0.1
    assert worst_gap(model, histories, recorded) < 2e-5


def test_many_distinct_prompts_are_prefilled_in_several_passes(monkeypatch):
    monkeypatch.setattr("trl_toolgrpo.sampling.model_sampler.PREFILL_TOKENS", 16)
    model = build("Qwen3")
    prompts = [[3 + (row * k) % 50 for k in range(1, length)] for row, length in enumerate([9, 2, 14, 3, 30, 2, 9], 1)]
    histories, recorded = roll(ModelSampler(model, STOPS, 0), prompts)
    assert [h[: len(p)] for h, p in zip(histories, prompts, strict=True)] == prompts
    assert worst_gap(model, histories, recorded) < 2e-5


def test_waiting_rows_join_the_decoding_ones_in_time():
    """A row with a tool result to read is not held up forever by rows that keep decoding."""
    model = build("Qwen3")
    with ModelSampler(model, [], 0).open([[5, 6]] * 12, 100) as session:
        for row in range(12):
            session.extend(row, [], 1 if row == 0 else 60)
        (first,) = session.step()
        assert first.row == 0
        session.extend(0, [7, 8, 9], 1)
        steps = 0
        while not any(result.row == 0 for result in session.step()):
            steps += 1
        assert steps <= 5


# Under autocast, against the trainer


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_autocast_stays_close_to_the_trainers_scoring(tmp_path, lora):
    tokenizer = chat_tokenizer()
    model = tiny_model(tokenizer)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    trainer = ToolGRPOTrainer(
        model,
        reward_funcs=lambda completions, **kwargs: [float(len(c)) for c in completions],
        args=config(tmp_path, bf16=True, max_completion_length=24, logprob_check="off"),
        train_dataset=Dataset.from_list([{"prompt": "the name of the employee"}] * 4),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12] * 3] * 4
    sampler = ModelSampler(trainer.model, [], 0, autocast=trainer.accelerator.autocast)
    with sampler.open(prompts, 48) as session:
        for row in range(4):
            session.extend(row, [], 48)
        found = {}
        while session.busy:
            found.update({result.row: result for result in session.step()})
    ids = torch.tensor([prompts[row] + found[row].token_ids for row in range(4)])
    trainer.model.eval()
    with torch.no_grad():
        scored, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 48)
    gap = (scored - torch.tensor([found[row].logprobs for row in range(4)])).abs()
    assert gap.max() < 0.15 and gap.mean() < 0.02
    with torch.no_grad():  # and it was autocast: float32 gives other values
        exact = torch.log_softmax(unwrapped(trainer.model)(input_ids=ids).logits.float(), -1)
    exact = exact[:, -49:-1].gather(-1, ids[:, -48:, None])[..., 0]
    assert (exact - torch.tensor([found[row].logprobs for row in range(4)])).abs().max() > 1e-4


def unwrapped(model):
    """Return the model without the autocast that accelerate puts around `forward`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return lambda **inputs: type(base).forward(base, **inputs)


def test_long_tool_results_are_read_in_passes_of_bounded_size():
    """A row with a long result does not widen the pass of all others, and the sampled tokens stay the same."""

    def sample(bound):
        widths, read = [], ModelSession._read

        def counted(self, rows, first):
            widths.append((len(rows), max(len(self.rows[row].pending) for row in rows) - 1))
            return read(self, rows, first)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_sampler, "PREFILL_TOKENS", bound)
            patch.setattr(ModelSession, "_read", counted)
            torch.manual_seed(4)
            return roll(ModelSampler(build("Qwen3"), STOPS, 0)), widths

    (whole, logprobs), few = sample(8192)
    (split, again), many = sample(12)
    assert split == whole and len(many) > len(few)
    assert max(rows * width for rows, width in few) > 12 and all(r * w <= 12 or r == 1 for r, w in many)
    for one, other in zip(logprobs, again, strict=True):
        assert [place for place, _ in one] == [place for place, _ in other]
        assert [v for _, v in one] == pytest.approx([v for _, v in other], abs=1e-5)


# What is restored


@pytest.mark.parametrize("fail", [None, "body", "prompt"])
def test_training_flags_gradients_and_attention_are_restored(fail):
    model = build("Qwen3")
    model.train()
    model.model.layers[1].eval()  # a frozen part stays in evaluation mode
    before = [module.training for module in model.modules()]
    attention = model.config._attn_implementation
    prompts = [[]] if fail == "prompt" else [[5, 6]]
    try:
        with ModelSampler(model, STOPS, 0).open(prompts, 8) as session:
            assert model.config._attn_implementation == ATTENTION_NAME != attention
            assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
            session.extend(0, [], 2)
            session.step()
            assert all(not key.requires_grad for key, _ in (*session.store.own, *session.store.prompts))
            if fail:
                raise KeyError("stop")
        assert fail is None
    except (KeyError, SamplerError):
        assert fail is not None
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == attention and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()
    loss.backward()  # the model trains as before
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_sampling_uses_torchs_generator_by_default():
    model = build("Qwen3")

    def once():
        torch.manual_seed(11)
        return roll(ModelSampler(model, STOPS, 0))[0]

    first = once()
    assert once() == first
    torch.manual_seed(12)
    assert roll(ModelSampler(model, STOPS, 0))[0] != first

"""The bound on keys and values by the memory of a GPU: known answers, what a run needs, and a run whose device says
that it is one."""

import itertools
import math
import re
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from trl_toolgrpo import ConfigError, ModelShape, ToolGRPOTrainer, estimate_memory
from trl_toolgrpo.memory import sampling_memory
from trl_toolgrpo.rollout import cache_choice
from trl_toolgrpo.rollout.cache_budget import parts_that_fit
from trl_toolgrpo.rollout.cache_choice import ChosenCache, DeviceMemory, MemoryNeeds, device_memory, memory_needs
from trl_toolgrpo.sampling import model_sampler, shared_prefix
from trl_toolgrpo.sampling.model_sampler import PREFILL_TOKENS


TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 heads of width 8, float32


@pytest.mark.parametrize(
    ("lasting", "update", "sampling", "kept", "chosen"),
    [
        (0, 0, 0, 0, 900),
        (100, 0, 0, 0, 800),
        (100, 300, 50, 300, 500),
        (100, 300, 350, 350, 450),  # they take turns, and the larger of the two counts
        (100, 600, 50, 400, 400),  # an update finds the rest where keys and values were
        (100, 600, 500, 500, 300),
        (100, math.inf, 0, 400, 400),
        (100, 0, 900, 800, 0),
        (950, 10, 10, 0, 0),
    ],
)
def test_known_answers(lasting, update, sampling, kept, chosen):
    found = ChosenCache(DeviceMemory(free=600, reserved=700, allocated=300), MemoryNeeds(lasting, update, sampling))
    assert (found.memory.available, found.kept, found.bytes) == (1000, kept, chosen)


def test_the_line_has_all_figures():
    memory = DeviceMemory(70 * 2**30, 20 * 2**30, 10 * 2**30)
    assert str(ChosenCache(memory, MemoryNeeds(2.0 * 2**30, 30.5 * 2**30, 2**30))) == (
        "39.5 GiB for the keys and values of rollouts in progress, of 80 free on the GPU; 2 are kept for the "
        "optimizer, 30.5 for updates and sampling, 8 as a margin"
    )


def test_only_a_cuda_gpu_is_asked_for_its_memory(monkeypatch):
    assert device_memory(torch.device("cpu")) is None and device_memory(torch.device("mps")) is None
    asked = []
    for name, value in {"mem_get_info": (11, 80), "memory_reserved": 7, "memory_allocated": 5}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: asked.append(device) or value)
    assert device_memory(torch.device("cuda", 1)) == DeviceMemory(11, 7, 5)
    assert asked == [torch.device("cuda", 1)] * 3


# What a run needs


def needs(path, model=None, lengths=(5, 9), supported=True, run=None, **options):
    args = config(path, **{"per_device_train_batch_size": 4, "max_completion_length": 12, **options})
    accelerator = SimpleNamespace(num_processes=4)
    given = {"optimizer": None, "tools": [], "is_fsdp_enabled": False, "is_deepspeed_enabled": False, **(run or {})}
    model = tiny_model(chat_tokenizer()) if model is None else model
    rows = [[1] * length for length in lengths]
    return memory_needs(SimpleNamespace(args=args, accelerator=accelerator, **given), model, rows, supported)


def activations(model, method="full", **changes):
    shape = ModelShape.from_config(model.config)
    sizes = {"micro_batch": 4, "prompt_length": 9, "completion_length": 12, "compute_bytes": 4}
    return estimate_memory(shape, method, **{**sizes, "gradient_checkpointing": False, **changes}).activations


def test_an_update_needs_gradients_and_activations_and_leaves_optimizer_state(tmp_path):
    model = tiny_model(chat_tokenizer())
    weights = 4 * sum(p.numel() for p in model.parameters())
    found = needs(tmp_path, model, gradient_checkpointing=False)
    assert found.lasting == 2 * weights and found.update == weights + activations(model)
    cheaper = needs(tmp_path, model, gradient_checkpointing=True)
    assert cheaper.update == weights + activations(model, gradient_checkpointing=True) < found.update
    half = needs(tmp_path, model, gradient_checkpointing=False, bf16=True)
    assert half.update == weights + activations(model, compute_bytes=2)


def test_an_adapter_needs_room_for_itself_alone(tmp_path):
    model = tiny_model(chat_tokenizer())
    peft = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trained = 4 * peft.get_nb_trainable_parameters()[0]
    found = needs(tmp_path, peft, gradient_checkpointing=False)
    assert found.lasting == 2 * trained and found.update == trained + activations(model, "lora")
    peft.requires_grad_(False)
    assert needs(tmp_path, peft, lengths=()).lasting == 0


def test_what_is_there_already_needs_no_room(tmp_path):
    model = tiny_model(chat_tokenizer())
    weights = 4 * sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    before = needs(tmp_path, model, run={"optimizer": optimizer})
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    with_gradients = needs(tmp_path, model, run={"optimizer": optimizer})
    assert with_gradients.update == before.update - weights and with_gradients.lasting == before.lasting
    optimizer.step()
    assert needs(tmp_path, model, run={"optimizer": optimizer}).lasting == 0
    assert needs(tmp_path, model, run={"is_deepspeed_enabled": True}).lasting == 0


def test_gradients_stay_where_rollouts_are_sampled_within_an_optimizer_step(tmp_path):
    model = tiny_model(chat_tokenizer())
    weights = 4 * sum(p.numel() for p in model.parameters())
    sizes = {"gradient_accumulation_steps": 4, "steps_per_generation": 4}
    whole = needs(tmp_path, model, **sizes)
    within = needs(tmp_path, model, **{**sizes, "steps_per_generation": 2})
    assert within.lasting - whole.lasting == whole.update - within.update == weights
    twice = needs(tmp_path, model, **{**sizes, "steps_per_generation": 2, "num_iterations": 2})
    assert twice.lasting == whole.lasting


@pytest.mark.parametrize(
    ("name", "bytes_per_weight"),
    [("adamw_torch", 8), ("adamw_8bit", 2), ("paged_adamw_8bit", 0), ("sgd", 0), ("adafactor", 0)],
)
def test_the_state_of_optimizers(tmp_path, name, bytes_per_weight):
    model = tiny_model(chat_tokenizer())
    found = needs(tmp_path, model, optim=name).lasting
    assert found == bytes_per_weight * sum(p.numel() for p in model.parameters())


def test_sharded_runs_need_a_share(tmp_path):
    model = tiny_model(chat_tokenizer())
    whole, shared = needs(tmp_path, model), needs(tmp_path, model, run={"is_fsdp_enabled": True})
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert shared.lasting == whole.lasting / 4 and whole.update - shared.update == weights * 3 / 4


@pytest.mark.parametrize(
    ("changes", "rollouts", "read", "attended"),
    [
        ({"gradient_accumulation_steps": 2}, 8, 4 * 9, 0),  # each prompt once, for two rollouts
        ({"per_device_eval_batch_size": 40}, 40, 20 * 9, 0),
        ({"lengths": [3000], "per_device_eval_batch_size": 40}, 40, PREFILL_TOKENS, 0),
        ({"lengths": [9000]}, 4, 9000, 0),
        ({"run": {"tools": [add]}, "max_tool_output_tokens": 50}, 4, 4 * 50, 12),
        ({"run": {"tools": [add]}, "max_tool_output_tokens": 5}, 4, 4 * 5, 12),
        ({"run": {"tools": [add]}, "max_tool_output_tokens": 5000}, 4, PREFILL_TOKENS, 12),
    ],
)
def test_sampling_needs_logits_and_a_pass_that_reads(tmp_path, changes, rollouts, read, attended):
    model = tiny_model(chat_tokenizer())
    found = needs(tmp_path, model, **{"num_generations": 2, "per_device_eval_batch_size": 2, **changes})
    shape = ModelShape.from_config(model.config)
    assert found.sampling == sampling_memory(shape, rollouts, read, attended, compute_bytes=4)


def test_layers_with_a_window_hold_scores(tmp_path):
    model = tiny_model(chat_tokenizer())
    plain = needs(tmp_path, model, per_device_eval_batch_size=4).sampling
    model.config.sliding_window = 5
    scores = 3 * 9 * model.config.num_attention_heads * 12 * 4
    assert needs(tmp_path, model, per_device_eval_batch_size=4).sampling == plain + scores


def test_sampling_needs_copies_of_weights_under_autocast(tmp_path):
    model = tiny_model(chat_tokenizer())
    shape, count = ModelShape.from_config(model.config), sum(p.numel() for p in model.parameters())
    head = 4 * shape.vocab_size * shape.hidden_size
    low = needs(tmp_path, model, bf16=True)
    assert needs(tmp_path, model, bf16=True, cast_lm_head_to_fp32=True).sampling == low.sampling + head
    model.bfloat16()
    assert needs(tmp_path, model, bf16=True).sampling == low.sampling - 2 * count


def test_sampling_memory_by_hand():
    shape = ModelShape(4, 8, 2, 2, 1, 3, 10)
    block = 5 * 2 * (6 * 4 + 3 * 6 + 3 * 3 + 4 * 8)
    assert sampling_memory(shape, rollouts=7, read=5) == 3 * 7 * 10 * 4 + block
    assert sampling_memory(shape, 7, 5, attended=11, adapters=True) == pytest.approx(
        3 * 7 * 10 * 4 + 1.2 * block + 3 * 5 * 2 * 11 * 4
    )


def test_half_is_kept_where_a_model_does_not_tell_its_shape(tmp_path):
    assert needs(tmp_path, supported=False).update == math.inf
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=8, n_layer=1, n_head=2))
    found = needs(tmp_path, other)
    assert found.update == math.inf and found.sampling == 0
    assert found.lasting == 8 * sum(p.numel() for p in other.parameters())


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is open, as an allocator of a GPU does."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key):
        self.now -= self.sizes.pop(key)


def test_bytes_of_tensors_are_counted():
    with TensorMemory() as memory:
        one = torch.zeros(100)
        view = one.view(10, 10)
        del one
        assert memory.now == 400
        double = view + view
        del view
        assert (memory.now, memory.peak) == (400, 800)
        del double
    assert (memory.now, memory.peak) == (0, 800)


SHAPE = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "result"), [(300, 2), (20, 150), (300, 60)])
def test_sampling_takes_what_is_kept_for_it(monkeypatch, prompt, result):
    """Two turns of eight rollouts of two prompts, with the attention of a GPU."""
    monkeypatch.setattr(shared_prefix, "_CPU_KERNEL", None)
    monkeypatch.setattr(model_sampler, "packed_linears", lambda model, rows: nullcontext())
    model = tiny_model(chat_tokenizer(), **SHAPE)
    rows, own = [[1 + row // 4] * prompt for row in range(8)], 4 + result + 4
    sampler = model_sampler.ModelSampler(model, stop_ids=(), pad_id=0)
    with TensorMemory() as memory, sampler.open(rows, own) as session:
        for tokens in ([], [5] * result):
            for row in range(8):
                session.extend(row, tokens, 4)
            while session.busy:
                session.step()
    shape = ModelShape.from_config(model.config)
    cache = 4 * shape.cached_values * (2 * prompt + 8 * (own + 1))
    kept = sampling_memory(shape, 8, read=max(2 * prompt, 8 * result), attended=max(prompt, own), compute_bytes=4)
    assert 0.3 * kept < memory.peak - cache < kept


# A run


def make(path, **changes):
    tokenizer = chat_tokenizer()
    rewards = lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]  # noqa: E731
    options = {"per_device_train_batch_size": 8, "deterministic_rollouts": True, "max_steps": 2, **changes}
    model = tiny_model(tokenizer, max_position_embeddings=256)
    return ToolGRPOTrainer(model, rewards, config(path, **options), prompts(), processing_class=tokenizer)


def rows(lengths=(1, 2)):
    return [{"prompt": [{"role": "user", "content": "hello " * size}]} for size in lengths for _ in range(4)]


def rollouts(trainer):
    return trainer._generate_and_score_completions(rows())["completion_ids"]


def size_of(trainer, row):
    return len(trainer._tokenize_prompts([row["prompt"]])[0][0])


def pretend_gpu(monkeypatch, trainer, tokens):
    """Have the device of a trainer say that it is a GPU with room for so many tokens; return who was asked."""
    longest = [1] * size_of(trainer, rows()[-1])
    found = memory_needs(trainer.run, trainer.model, [longest], True)
    sizes = (DeviceMemory(free, 0, 0) for free in itertools.count(0, 100))
    free = next(size.free for size in sizes if ChosenCache(size, found).bytes >= tokens * TOKEN)
    asked = []
    monkeypatch.setattr(
        cache_choice, "device_memory", lambda device: asked.append(device) or DeviceMemory(free, 9000, 9000)
    )
    return asked


def test_a_gpu_samples_in_parts_that_fit_and_says_so(tmp_path, monkeypatch, capsys):
    whole = rollouts(make(tmp_path / "whole"))
    assert "rollout_cache_gib" not in capsys.readouterr().out  # a CPU has no limit
    trainer, opened = make(tmp_path / "parts"), []
    tokens = 3 * 17 + 2 * size_of(trainer, rows()[-1])
    asked = pretend_gpu(monkeypatch, trainer, tokens)
    run_part = trainer.rollouts.engine._run_part
    monkeypatch.setattr(
        trainer.rollouts.engine,
        "_run_part",
        lambda policy, requests, *args: opened.append(len(requests)) or run_part(policy, requests, *args),
    )
    assert torch.equal(rollouts(trainer), whole)
    assert len(opened) > 1 and sum(opened) == 8
    printed = [line for line in capsys.readouterr().out.splitlines() if "rollout_cache_gib" in line]
    assert len(printed) == 1 and printed[0].startswith("`rollout_cache_gib`: ")
    assert printed[0].endswith(f"The first rollouts are sampled in {len(opened)} parts.")
    gib = trainer.run.metrics["rollout/cache_gib"][-1]
    assert tokens * TOKEN <= gib * 2**30 < tokens * TOKEN + 200
    monkeypatch.setattr(cache_choice, "device_memory", None)  # not asked again
    rollouts(trainer)
    assert asked == [torch.device("cpu")] and "rollout_cache_gib" not in capsys.readouterr().out
    assert trainer.run.metrics["rollout/cache_gib"] == [gib, gib]


def test_a_number_is_taken_as_it_is(tmp_path, monkeypatch, capsys):
    trainer = make(tmp_path, rollout_cache_gib=1.0)
    monkeypatch.setattr(cache_choice, "device_memory", None)
    rollouts(trainer)
    assert "rollout_cache_gib" not in capsys.readouterr().out and "rollout/cache_gib" not in trainer.run.metrics


def test_a_gpu_without_room_for_one_rollout_is_an_error(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    needed = size_of(trainer, rows()[-1]) + 17
    pretend_gpu(monkeypatch, trainer, needed - 1)
    with pytest.raises(ConfigError, match="The GPU has too little memory left for rollouts: ") as found:
        rollouts(trainer)
    assert f"That holds {needed - 1} tokens of this model." in found.value.message
    assert f"can need {needed}, which is " in found.value.message and "free on the GPU" in found.value.message
    least = float(re.search(r"which is (\S+) GiB", found.value.message)[1])
    assert needed * TOKEN / 2**30 <= least < 1.01 * needed * TOKEN / 2**30
    assert f"pass `rollout_cache_gib`, at least {least:.3g}," in found.value.remedy
    pretend_gpu(monkeypatch, trainer, needed)
    trainer.rollouts.engine._chosen = None
    rollouts(trainer)


@pytest.mark.parametrize("own", [1, 15, 66, 123, 999])
def test_what_an_error_asks_for_is_enough(tmp_path, own):
    model, row = tiny_model(chat_tokenizer()), [[1] * 5]
    with pytest.raises(ConfigError) as found:
        parts_that_fit(config(tmp_path, max_completion_length=own, rollout_cache_gib=1e-9), model, row)
    least = float(found.value.remedy.split()[3].rstrip(","))
    assert f"which is {least:.3g} GiB" in found.value.message
    parts_that_fit(config(tmp_path, max_completion_length=own, rollout_cache_gib=least), model, row)

"""Packed attention: by pieces, where gradient checkpointing repeats a pass, and by flex attention."""

import logging
import threading

import pytest
import torch
from conftest import Largest, chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from trl.models.utils import disable_gradient_checkpointing

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.update import block_attention, scoring
from trl_toolgrpo.update.block_attention import BlockAttention, FlexAttention, block_mask, flex_attention_of
from trl_toolgrpo.update.packed_attention import PieceAttention, dense_mask, packed_attention, suits


CPU = torch.device("cpu")
# Of one length, so that the pieces of another batch fit, too
BATCHES = [[(5, [4, 3]), (3, [2, 2, 5])], [(5, [3, 4]), (4, [8])], [(2, [1, 9]), (0, [6, 6])]]
LENGTH = 12


def exact_model(**changes):
    return tiny_model(chat_tokenizer(), **changes).double().train()


def never(model):
    return model


def by_transformers(reentrant):
    def enable(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    return enable


def by_torch(kind):
    def wrap(model):
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=kind)
        return model

    return wrap


CHECKPOINTING = {
    "transformers": by_transformers(False),
    "transformers, reentrant": by_transformers(True),
    "torch": by_torch(CheckpointImpl.NO_REENTRANT),
    "torch, reentrant": by_torch(CheckpointImpl.REENTRANT),
}


def inputs_of(pieces, length=LENGTH):
    draw = torch.Generator().manual_seed(sum(map(len, map(str, pieces))))
    ids = torch.randint(1, 300, (len(pieces), length), generator=draw)
    positions = torch.zeros_like(ids)
    for row, (start, counts) in enumerate(pieces):
        found = [*range(start), *(place for n in counts for place in range(start, start + n))]
        positions[row, : len(found)] = torch.tensor(found)
    return {"input_ids": ids, "position_ids": positions}


def loss_of(model, pieces, attend=None, length=LENGTH):
    """Return a loss over all tokens but padding; by `attend`, or with a dense mask."""
    given = inputs_of(pieces, length)
    if attend is None:
        hidden = model.model(**given, attention_mask=dense_mask(pieces, length), use_cache=False).last_hidden_state
    else:
        with packed_attention(model, attend):
            hidden = model.model(**given, use_cache=False).last_hidden_state
    weights = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ends = torch.tensor([start + sum(counts) for start, counts in pieces])
    return (hidden * weights * (torch.arange(length) < ends[:, None])[..., None]).sum()


def gradients(model):
    return [p.grad.clone() for p in model.model.parameters()]


def assert_close(found, expected, bound=1e-10):
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= bound * other.norm()


def expected_gradients(batches, make=exact_model, length=LENGTH, scale=lambda index: 1.0):
    model = make()
    for index, pieces in enumerate(batches):
        (scale(index) * loss_of(model, pieces, length=length)).backward()
    return gradients(model)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_repeated_pass_reads_its_own_pieces(kind, order):
    """Of several micro-batches whose backward passes come later, with passes of other kinds in between."""
    model = CHECKPOINTING[kind](exact_model())
    losses = []
    for index, pieces in enumerate(BATCHES):
        losses.append((index + 1) * loss_of(model, pieces, PieceAttention(pieces, CPU)))
        with torch.no_grad(), disable_gradient_checkpointing(model, {"use_reentrant": "reentrant" in kind}):
            loss_of(model, BATCHES[index - 1], PieceAttention(BATCHES[index - 1], CPU))
    plain = model.model(input_ids=torch.arange(1, 9)[None], use_cache=False).last_hidden_state.sum()
    for index in order:
        losses[index].backward()
        with torch.no_grad():
            loss_of(model, BATCHES[index], PieceAttention(BATCHES[index], CPU))
    assert_close(gradients(model), expected_gradients(BATCHES, scale=lambda index: index + 1))
    model.zero_grad()
    plain.backward()
    other = exact_model()
    other.model(input_ids=torch.arange(1, 9)[None], use_cache=False).last_hidden_state.sum().backward()
    assert_close(gradients(model), gradients(other))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_the_backward_pass_may_run_in_another_thread(kind):
    """As it does on a GPU."""
    model = CHECKPOINTING[kind](exact_model())
    losses = [loss_of(model, pieces, PieceAttention(pieces, CPU)) for pieces in BATCHES]
    thread = threading.Thread(target=lambda: sum(losses).backward())
    thread.start()
    thread.join()
    assert_close(gradients(model), expected_gradients(BATCHES))


def test_checkpointing_is_left_as_it_was():
    model = by_transformers(False)(exact_model())
    layers = list(model.model.layers)
    before = [layer._gradient_checkpointing_func for layer in layers]
    loss_of(model, BATCHES[0], PieceAttention(BATCHES[0], CPU))
    with pytest.raises(ZeroDivisionError), packed_attention(model, PieceAttention(BATCHES[0], CPU)):
        assert layers[0]._gradient_checkpointing_func is not before[0]
        raise ZeroDivisionError
    assert [id(layer._gradient_checkpointing_func) for layer in layers] == [id(function) for function in before]


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_no_tensor_is_as_large_as_a_mask(kind):
    pieces = [(40, [40] * 16)]
    length = 40 * 17
    model = CHECKPOINTING[kind](exact_model())
    with Largest() as largest:
        loss_of(model, pieces, PieceAttention(pieces, CPU), length).backward()
    assert 40 * 17 * 64 <= largest.elements < length**2 / 4  # the MLP's width is 64
    with Largest() as largest:
        loss_of(model, pieces, length=length).backward()
    assert largest.elements >= length**2


def test_checkpointing_by_a_function_that_is_not_known_keeps_the_mask():
    model = exact_model()
    assert suits(model)
    model.model.layers[1].gradient_checkpointing = True
    assert not suits(model)
    model.gradient_checkpointing_enable()
    assert suits(model)
    model.set_attn_implementation("eager")
    assert not suits(model)


def trainer_of(tmp_path, **changes):
    tokenizer = chat_tokenizer()
    options = {"per_device_train_batch_size": 8, "max_steps": 2, "logprob_check": "always", "beta": 0.0, **changes}
    rewards = lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]  # noqa: E731
    model = tiny_model(tokenizer, head_dim=16)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if options["beta"] else None
    return ToolGRPOTrainer(
        model, rewards, config(tmp_path, **options), prompts(8), processing_class=tokenizer, peft_config=adapter
    )


@pytest.mark.parametrize("changes", [{}, {"beta": 0.1}, {"advantage_estimator": "group_gae"}])
def test_training_with_checkpointing_makes_no_mask(tmp_path, monkeypatch, changes):
    plain = trainer_of(tmp_path / "plain", **changes)
    plain.train()
    monkeypatch.setattr(scoring, "dense_mask", lambda *args: pytest.fail("a dense mask"))
    trainer = trainer_of(tmp_path / "checkpointing", gradient_checkpointing=True, **changes)
    trainer.train()
    assert trainer.update.scoring.packing.active and trainer.model.is_gradient_checkpointing
    pairs = zip(trainer.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# Flex attention

SHAPES = [
    [(5, [4, 3]), (3, [2, 2, 20])],
    [(8, [8, 8, 8]), (0, [3, 29])],
    [(31, [1])],
    [(1, [1] * 20), (20, [1]), (17, [7, 7]), (0, [])],
    [(9, [16, 7]), (24, [8])],
]


@pytest.mark.parametrize("block", [4, 8, 32])
@pytest.mark.parametrize("pieces", SHAPES)
def test_the_block_mask_is_the_dense_mask(monkeypatch, pieces, block):
    monkeypatch.setattr(block_attention, "BLOCK", block)
    found = block_mask(pieces, 32, CPU)
    assert found.shape == (len(pieces), 1, 32, 32)
    visible = create_mask(found.mask_mod, len(pieces), 1, 32, 32, device="cpu")
    assert torch.equal(visible, dense_mask(pieces, 32))
    expected = create_block_mask(found.mask_mod, len(pieces), None, 32, 32, device="cpu", BLOCK_SIZE=block)
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            one, other = (getattr(mask, f"{name}_{part}") for mask in (found, expected))
            assert torch.equal(one, other) and one.dtype == other.dtype, name
    blocks = visible.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).transpose(-2, -3)
    assert torch.equal(found.full_kv_num_blocks, blocks.all(dim=-1).all(dim=-1).sum(dim=-1))


def dense_kernel(query, key, value, block_mask, scale, enable_gqa):
    """Stand in for flex attention, which has no backward pass on a CPU."""
    rows, length = query.shape[0], query.shape[2]
    mask = create_mask(block_mask.mask_mod, rows, 1, length, length, device="cpu")
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def layer_inputs(pieces, length, dtype=torch.float32, size=16):
    draw = torch.Generator().manual_seed(1)
    heads = (4, 2, 2)
    return [torch.randn(len(pieces), n, length, size, generator=draw).to(dtype) for n in heads]


class Layer(torch.nn.Module):
    num_key_value_groups = 2


LONG = [(50, [70, 60]), (129, [40, 1])]


def attentions(flex, **changes):
    """Return what both ways give for a layer, without padding."""
    options = {"dropout": 0.0, "scaling": 0.3}
    given = layer_inputs(LONG, 256, **changes)
    blocks = BlockAttention(flex, LONG, 256, CPU)
    ends = [start + sum(counts) for start, counts in LONG]
    found = [
        torch.cat([rows[:end] for rows, end in zip(attend(Layer(), *given, options), ends, strict=True)])
        for attend in (blocks, PieceAttention(LONG, CPU))
    ]
    assert found[0].shape == (sum(ends), 4, changes.get("size", 16))
    return found


def test_torchs_flex_attention_attends_like_the_pieces(monkeypatch):
    flex = FlexAttention(flex_attention)
    monkeypatch.setattr(BlockAttention, "_failure", lambda *args: None)  # it needs a backward pass
    with torch.no_grad():
        torch.testing.assert_close(*attentions(flex), atol=2e-6, rtol=2e-6)
    assert flex.reason is None


def test_other_pieces_of_the_same_shape_are_not_compiled_anew(monkeypatch):
    counter = CompileCounter()
    flex = FlexAttention(torch.compile(flex_attention, backend=counter))
    monkeypatch.setattr(BlockAttention, "_failure", lambda *args: None)
    given = layer_inputs(LONG, 256)
    for pieces in (LONG, [(40, [40, 30, 20]), (1, [90])], LONG[::-1]):
        with torch.no_grad():
            found = BlockAttention(flex, pieces, 256, CPU)(Layer(), *given, {"scaling": 0.3})
        expected = PieceAttention(pieces, CPU)(Layer(), *given, {"scaling": 0.3})
        torch.testing.assert_close(found[0, :90], expected[0, :90])
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", [None, *CHECKPOINTING])
def test_gradients_of_the_block_mask_are_those_of_the_dense_mask(monkeypatch, kind):
    """The first layer is tried out within its checkpoint, if there is one."""
    monkeypatch.setattr(block_attention, "DTYPES", (torch.float64,))
    monkeypatch.setattr(block_attention, "BLOCK", 4)
    calls = []
    flex = FlexAttention(lambda *args, **kwargs: calls.append(1) or dense_kernel(*args, **kwargs))
    model = CHECKPOINTING.get(kind, never)(exact_model(head_dim=16))
    losses = [loss_of(model, pieces, BlockAttention(flex, pieces, LENGTH, CPU)) for pieces in BATCHES]
    for loss in reversed(losses):
        loss.backward()
    assert_close(gradients(model), expected_gradients(BATCHES, lambda: exact_model(head_dim=16)))
    assert flex.reason is None and len(calls) == 1 + 6 * (1 if kind is None else 2)


def test_packed_updates_by_blocks(tmp_path, monkeypatch):
    """A run whose kernel is replaced, and padded to whole blocks, against one by pieces."""
    plain = trainer_of(tmp_path / "plain")
    plain.train()
    lengths = []

    def kernel(query, *args, **kwargs):
        lengths.append(query.shape[2])
        return dense_kernel(query, *args, **kwargs)

    monkeypatch.setattr(scoring, "flex_attention_of", lambda *args: FlexAttention(kernel))
    trainer = trainer_of(tmp_path / "blocks", gradient_checkpointing=True)
    trainer.train()
    assert trainer.update.scoring.packing.active and set(lengths) == {128}
    pairs = zip(trainer.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def broken(query, *args, **kwargs):
    raise RuntimeError("no such kernel\nand more")


def other_scale(query, key, value, block_mask, scale, enable_gqa):
    return dense_kernel(query, key, value, block_mask, 2 * scale, enable_gqa)


def other_gradient(query, key, value, block_mask, scale, enable_gqa):
    return dense_kernel(query, key + (key - key.detach()), value, block_mask, scale, enable_gqa)


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("kernel", "changes", "options", "reason"),
    [
        (dense_kernel, {"dtype": torch.float64}, {}, "the model computes in float64"),
        (dense_kernel, {"size": 8}, {}, "heads have a size of 8, and it takes 16 to 256"),
        (dense_kernel, {}, {"dropout": 1e-9}, "attention has a dropout of 1e-09"),
        (dense_kernel, {}, {"s_aux": torch.zeros(4)}, "attention has sinks (`s_aux`)"),
        (broken, {}, {}, "it fails here (RuntimeError: no such kernel)"),
        (other_scale, {}, {}, "its output differ by"),
        (other_gradient, {}, {}, "its gradients differ by"),
    ],
)
def test_layers_fall_back_to_pieces_and_say_why_once(caplog, kernel, changes, options, reason):
    flex = FlexAttention(kernel)
    given = layer_inputs(LONG, 256, **changes)
    options = {"dropout": 0.0, "scaling": 0.3, **options}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = BlockAttention(flex, LONG, 256, CPU)(Layer(), *given, options)
            torch.testing.assert_close(found, PieceAttention(LONG, CPU)(Layer(), *given, options))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and flex.reason.startswith(reason)
    assert warnings[0].startswith(f"Packed updates attend by pieces, not by flex attention: {reason}")


def test_capped_scores_are_not_given_to_flex_attention():
    """Torch's own attention refuses them by itself."""
    flex = FlexAttention(dense_kernel)
    with pytest.raises(ValueError, match="softcap"):
        BlockAttention(flex, LONG, 256, CPU)(Layer(), *layer_inputs(LONG, 256), {"softcap": 30.0})
    assert flex.reason == "attention caps its scores (`softcap`)"


def test_running_out_of_memory_is_no_fault_of_the_kernel():
    with pytest.raises(torch.OutOfMemoryError):
        attentions(FlexAttention(out_of_memory))


def test_autocast_is_followed():
    flex, found = FlexAttention(dense_kernel), []
    query, key, value = layer_inputs(LONG, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for attend in (BlockAttention(flex, LONG, 256, CPU), PieceAttention(LONG, CPU)):
            found.append(attend(Layer(), query, key, value.bfloat16(), {"scaling": 0.3})[0, :180])
    assert flex.reason is None and found[0].dtype == found[1].dtype == torch.bfloat16
    torch.testing.assert_close(*found, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("paths", "device", "compiled", "used"),
    [
        ("updates", "cuda", False, True),
        ("all", "cuda:1", False, True),
        ("none", "cuda", False, False),
        ("attention", "cuda", False, False),
        ("updates", "cpu", False, False),
        ("updates", "cuda", True, False),
    ],
)
def test_flex_attention_is_used_where_it_is_turned_on(tmp_path, caplog, paths, device, compiled, used):
    args = config(tmp_path, gpu_paths=paths, torch_compile=compiled)
    with caplog.at_level(logging.WARNING):
        assert (flex_attention_of(args, torch.device(device)) is not None) is used
    assert ("`torch_compile` compiles the model" in caplog.text) is compiled

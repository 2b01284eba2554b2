"""Packed linear layers: the same product, restored at the end, and only for plain layers."""

import pytest
import torch
from conftest import chat_tokenizer, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_toolgrpo.sampling import packed_linear
from trl_toolgrpo.sampling.model_sampler import ModelSampler
from trl_toolgrpo.sampling.packed_linear import packed_linears, product_dtype


@pytest.mark.parametrize("for_rows", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_product_is_equal_and_the_layer_is_restored(bias, for_rows, monkeypatch):
    """By oneDNN for any number of rows, and by MKL for five."""
    if for_rows and not torch.backends.mkl.is_available():
        pytest.skip("torch has no MKL here")
    monkeypatch.setattr(packed_linear, "_packs_for_rows", lambda: for_rows)
    model = nn.Sequential(nn.Linear(256, 320, bias=bias), nn.SiLU(), nn.Linear(320, 256, bias=bias))
    for shape in ((1, 256), (2, 1, 256), (3, 1, 256), (5, 1, 256), (5, 256), (6, 1, 256), (2, 70, 256)):
        inputs = torch.randn(*shape)
        with torch.no_grad():
            expected = model(inputs)
            with packed_linears(model, 5):
                assert all("forward" in model[place].__dict__ for place in (0, 2))
                torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-5)
        assert not any("forward" in layer.__dict__ for layer in model)


def test_other_layers_are_not_packed():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    patched = nn.Linear(512, 512)
    patched.forward = lambda input: input
    kept = [Scaled(512, 512), patched, nn.Linear(512, 512).double(), nn.Linear(8, 8), nn.Linear(512, 512).to("meta")]
    assert not any(map(product_dtype, kept)) and product_dtype(nn.Linear(512, 512)) == torch.float32
    model = nn.Sequential(*kept[:2], nn.Linear(512, 512))
    inputs = torch.randn(3, 512)
    with torch.no_grad():
        expected = model(inputs)
        with packed_linears(model, 5):
            torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-5)
        assert model[1] is patched and "forward" in patched.__dict__


@pytest.mark.parametrize("has_units", [False, True])
def test_products_in_low_precision_are_packed_where_the_processor_has_units_for_them(has_units, monkeypatch):
    monkeypatch.setattr(packed_linear, "_multiplies_bfloat16", lambda: has_units)
    layer = nn.Linear(512, 512)
    bfloat16 = torch.bfloat16 if has_units else None
    assert product_dtype(nn.Linear(512, 512).bfloat16()) == bfloat16
    assert product_dtype(nn.Linear(512, 512).half()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(layer) == bfloat16
    with torch.autocast("cpu", torch.float16):
        assert product_dtype(layer) is None


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_in_bfloat16_are_those_of_autocast(bias, weights, monkeypatch):
    monkeypatch.setattr(packed_linear, "_multiplies_bfloat16", lambda: True)
    layer = nn.Linear(256, 320, bias=bias).to(weights)
    inputs = torch.randn(5, 1, 256)
    exact = nn.functional.linear(inputs.double(), *(p.double() for p in layer.parameters()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(inputs)
        with packed_linears(layer, 5):
            found = layer(inputs)
            with torch.autocast("cpu", enabled=False):
                plain = nn.functional.linear(inputs.to(weights), *layer.parameters())
                assert torch.equal(layer(inputs.to(weights)), plain) and plain.dtype == weights
    assert found.dtype == expected.dtype == torch.bfloat16 and "forward" not in layer.__dict__
    assert (found - exact).abs().max() <= 1.05 * (expected - exact).abs().max() + 2**-8
    if weights == torch.bfloat16:
        with torch.no_grad(), packed_linears(layer, 5):
            assert layer(inputs.bfloat16()).dtype == torch.bfloat16


def test_layers_are_restored_when_sampling_fails():
    model = nn.Sequential(nn.Linear(512, 512))
    with pytest.raises(RuntimeError, match="lost"), packed_linears(model, 5):
        raise RuntimeError("lost")
    assert "forward" not in model[0].__dict__


def sample(model):
    with ModelSampler(model, (), 0).open([[5, 6, 7]] * 3, 8) as session:
        for row in range(3):
            session.extend(row, [], 4)
        found = [result for _ in range(4) for result in session.step()]
    return {result.row: (result.token_ids, result.logprobs) for result in found}


def test_rollouts_of_an_adapter_follow_its_weights(monkeypatch):
    """The base layers are packed anew for each rollout batch, and adapters go on top of them."""
    monkeypatch.setattr(packed_linear, "LEAST_WEIGHTS", 1)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(chat_tokenizer()), LoraConfig(target_modules="all-linear"))
    for step in range(3):
        rows = sample(model)
        for tokens, logprobs in rows.values():
            with torch.no_grad():
                logits = model.eval()(input_ids=torch.tensor([[5, 6, 7, *tokens]])).logits[0, 2:-1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or step == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)

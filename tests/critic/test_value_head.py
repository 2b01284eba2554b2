"""The value head: what it computes, where its gradient goes, its files, and its loss."""

import pytest
import torch
from conftest import chat_tokenizer, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from trl_toolgrpo import ValueHeadError
from trl_toolgrpo.critic.value_head import (
    HEAD_FILE,
    ValueHead,
    attach_value_head,
    load_value_head,
    save_value_head,
    without_value_head,
)
from trl_toolgrpo.update.losses import value_loss


def random_head(size=32, **options):
    head = ValueHead(size, **options)
    nn.init.normal_(head.output.weight)
    return head


def test_a_new_head_gives_zero():
    assert not ValueHead(8)(torch.randn(3, 4, 8)).any()
    assert ValueHead(8)(torch.randn(3, 4, 8)).shape == (3, 4)


def test_values_by_hand():
    head = random_head(4, width=3)
    hidden = torch.randn(4)
    scaled = hidden / (sum(x * x for x in hidden.tolist()) / 4 + 1e-6) ** 0.5
    between = head.layer.weight @ scaled + head.layer.bias
    expected = (head.output.weight @ (between * torch.sigmoid(between)) + head.output.bias)[0]
    torch.testing.assert_close(head(hidden), expected)


def test_the_gradient_is_exact_and_stops_if_detached():
    torch.manual_seed(0)
    free = random_head(4, detach=False).double()
    hidden = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(free, (hidden,))
    kept = random_head(4).double()
    kept(hidden).sum().backward()
    assert hidden.grad is None and kept.layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("lora", [False, True])
def test_values_are_those_of_the_final_hidden_state(lora):
    tokenizer = chat_tokenizer()
    model = tiny_model(tokenizer)
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    ids = torch.randint(1, 200, (2, 7))
    plain = model(ids).logits
    head = random_head()
    attach_value_head(model, head)
    output = model(ids, with_values=True)
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(output["token_values"], head(hidden))
    torch.testing.assert_close(output.logits, plain)
    assert "values" not in model(ids)
    assert head in list(model.modules()) and all(p.requires_grad for p in head.parameters())


def test_generation_is_unchanged():
    tokenizer = chat_tokenizer()
    model = tiny_model(tokenizer)
    ids = torch.randint(1, 200, (1, 5))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    before = model.generate(ids, **options)
    attach_value_head(model, random_head())
    assert torch.equal(model.generate(ids, **options), before)


def test_a_saved_head_is_loaded_unchanged(tmp_path):
    head = random_head(6, width=5)
    assert head.save_pretrained(tmp_path) == tmp_path / HEAD_FILE
    again = ValueHead.from_pretrained(tmp_path, detach=False)
    hidden = torch.randn(3, 6)
    assert torch.equal(again(hidden), head(hidden)) and not again.detach
    other = ValueHead(6, 5)
    load_value_head(other, tmp_path)
    assert torch.equal(other(hidden), head(hidden))
    save_value_head(head, tmp_path / "not written", write=False)
    assert not (tmp_path / "not written").exists()


def test_unsuitable_files_are_named(tmp_path):
    with pytest.raises(ValueHeadError, match=rf"no .*{HEAD_FILE}.*value_warmup_steps"):
        ValueHead.from_pretrained(tmp_path)
    random_head(6).save_pretrained(tmp_path)
    with pytest.raises(ValueHeadError, match=r"layer.weight.*\(6, 6\), expected \(8, 8\)"):
        load_value_head(ValueHead(8), tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / HEAD_FILE)
    with pytest.raises(ValueHeadError, match=r"holds \['weight'\]"):
        ValueHead.from_pretrained(tmp_path)


def test_the_policys_state_excludes_the_head():
    model = tiny_model(chat_tokenizer())
    names = set(model.state_dict())
    attach_value_head(model, random_head())
    assert len(model.state_dict()) == len(names) + 4
    assert set(without_value_head(model.state_dict())) == names


def test_files_hold_float32(tmp_path):
    random_head(4).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / HEAD_FILE).values()} == {torch.float32}


def test_the_value_loss_by_hand():
    values, old = torch.tensor([[1.0, 2.0, 0.0, 7.0]]), torch.tensor([[0.0, 2.0, 1.0, 0.0]])
    targets, mask = torch.tensor([[1.0, 3.0, 0.0, 5.0]]), torch.tensor([[1, 1, 1, 0]])
    # plain errors 0, 1, 0; clipped values 0.2, 2, 0.8 with errors 0.64, 1, 0.64
    assert value_loss(values, old, targets, mask, 0.2).item() == pytest.approx(0.5 * (0.64 + 1 + 0.64))
    assert value_loss(values, old, targets, mask, None).item() == pytest.approx(0.5)


def test_the_value_loss_has_an_exact_gradient():
    torch.manual_seed(0)
    values = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    old, targets = torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.rand(3, 5) > 0.4
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, targets, mask, 0.2), (values,))
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, targets, mask, None), (values,))

"""`torch_compile=True`: the same updates as without it, and files that load without it."""

import math

import pytest
import torch
from conftest import add, config, prompts, tiny_model
from peft import LoraConfig
from safetensors.torch import load_file

from trl_toolgrpo import ToolGRPOTrainer


pytestmark = pytest.mark.long

CASES = {
    "group": {"torch_compile_backend": "aot_eager"},
    "checkpointing": {"gradient_checkpointing": True},
    "a value head": {"advantage_estimator": "gae", "value_epochs": 2},
    "an adapter and its reference": {
        "lora": True, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0,
    },
    "assisted": {"tools": [add], "force_rate": 0.5, "assist_warmup_steps": 1},
}  # fmt: skip


def train(path, tokenizer, **changes):
    options = {"max_steps": 2, "learning_rate": 1e-2, "logprob_check": "always", "save_strategy": "steps", **changes}
    lora, tools = options.pop("lora", False), options.pop("tools", None)
    resumed = options.pop("resume", None)
    torch._dynamo.reset()
    torch.manual_seed(0)
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer, num_hidden_layers=1),
        lambda completion_ids, **kwargs: [float(sum(ids) % 11) for ids in completion_ids],
        config(path, save_steps=1, **options), prompts(4), processing_class=tokenizer, tools=tools,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if lora else None,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resumed)
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_policy_gets_the_same_updates(tmp_path, tokenizer, name):
    changes = {option: value for option, value in CASES[name].items() if not option.startswith("torch_compile")}
    plain = train(tmp_path / "plain", tokenizer, **changes)
    options = {"torch_compile": True, "torch_compile_backend": "eager", **CASES[name]}
    compiled = train(tmp_path / "compiled", tokenizer, **options)
    assert compiled.args.torch_compile
    for one, other in zip(plain.state.log_history[:2], compiled.state.log_history[:2], strict=True):
        if "ratio/mean" in one:  # not in assisted steps
            assert other["ratio/mean"] == pytest.approx(1.0, abs=1e-5) and other["sampling/logp_diff_max"] < 1e-4
        for figure in ("loss", "reward", "grad_norm", "value/loss", "forced/loss"):
            if figure in one and math.isfinite(one[figure]):
                assert other[figure] == pytest.approx(one[figure], rel=1e-3, abs=1e-6), figure
    files = sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "compiled").glob("*.safetensors"))
    for file in files:
        one, other = (load_file(tmp_path / kind / file) for kind in ("plain", "compiled"))
        assert set(one) == set(other), "names without the compiler's prefix"
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, atol=1e-3, rtol=1e-3)


def test_a_compiled_run_is_resumed(tmp_path, tokenizer):
    options = {"torch_compile": True, "torch_compile_backend": "eager", "advantage_estimator": "gae"}
    whole = train(tmp_path, tokenizer, **options)
    again = train(tmp_path, tokenizer, resume=str(tmp_path / "checkpoint-1"), **options)
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)

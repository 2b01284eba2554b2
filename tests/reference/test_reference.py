"""References that follow a policy: copies and averages against dense ones, for each kind of adapter."""

import copy
import json

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import use_adapter

from trl_toolgrpo import CheckpointError, ConfigError, ReferenceSyncError, ToolGRPOTrainer
from trl_toolgrpo.reference.adapter import AdapterReference, Comparison, SyncReport
from trl_toolgrpo.reference.merged import MergedReference, ModelReference, effective_weights


LINEAR = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=LINEAR),
    "rslora": LoraConfig(r=4, target_modules=LINEAR, use_rslora=True),
    "dora": LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "modules_to_save": LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head", "norm"]),
    "bias": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="all"),
    "lora_bias": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "pissa": LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa"),
    "loha": LoHaConfig(r=4, target_modules=LINEAR),
    "lokr": LoKrConfig(r=4, target_modules=LINEAR),
}
COPIED = {**ADAPTERS, "ia3": IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"])}
IDS = torch.arange(24).view(2, 12)


def policy_with(adapter, **changes):
    tokenizer = chat_tokenizer()
    changes = {"attention_bias": True, **changes}
    return get_peft_model(tiny_model(tokenizer, **changes), copy.deepcopy(adapter)).eval()


def move(model, seed):
    """Change every trained parameter, and no other, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def reference_logits(model, reference):
    """Compute the reference's logits as TRL's scoring pass does."""
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        assert reference.scoring()
        with reference.weights():
            return model(input_ids=IDS).logits


def merged_by_peft(model):
    """Return the parameters of a copy that PEFT has merged; a tied head is untied, as merging would change it."""
    model = copy.deepcopy(model)
    head = model.get_base_model().get_output_embeddings()
    if "weight" in head._parameters:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return {name: p.detach().clone() for name, p in model.merge_and_unload().named_parameters()}


@pytest.mark.parametrize("name", sorted(COPIED))
def test_a_copied_adapter_scores_as_the_policy_at_the_last_sync(name):
    model = policy_with(COPIED[name])
    move(model, 1)
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    start = logits(model)
    reference = AdapterReference(model, "default")
    assert {n: p.requires_grad for n, p in model.named_parameters() if ".ref" not in n} == trained
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".ref" in n)
    assert torch.equal(logits(model), start)
    torch.testing.assert_close(reference_logits(model, reference), start, rtol=0, atol=0)
    move(model, 2)
    moved = logits(model)
    assert (moved - start).abs().max() > 1e-3
    torch.testing.assert_close(reference_logits(model, reference), start, rtol=0, atol=0)
    assert torch.equal(logits(model), moved)
    report = reference.sync(1.0, Comparison())
    assert (report.differ, report.max_abs_diff) == ((), 0.0)
    assert report.tensors == sum(trained.values())
    torch.testing.assert_close(reference_logits(model, reference), moved, rtol=0, atol=0)
    assert {n: p.requires_grad for n, p in model.named_parameters() if ".ref" not in n} == trained


@pytest.mark.parametrize("name", sorted(ADAPTERS))
@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_follow_the_policy_exactly(name, tied):
    if tied and name == "modules_to_save":
        pytest.skip("PEFT unties the head that it trains")
    model = policy_with(ADAPTERS[name], tie_word_embeddings=tied)
    move(model, 1)
    start = logits(model)
    reference = MergedReference(model, "default")
    torch.testing.assert_close(reference_logits(model, reference), start, rtol=1e-4, atol=1e-5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    move(model, 2)
    moved = logits(model)
    torch.testing.assert_close(reference_logits(model, reference), start, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), moved)
    report = reference.sync(1.0, Comparison())
    assert report.differ == ()
    torch.testing.assert_close(reference_logits(model, reference), moved, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), moved)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in frozen)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_ten_averages_are_the_dense_average(name):
    """W_ref <- W/2 + W_ref/2, computed in float64 from what PEFT itself merges."""
    model = policy_with(ADAPTERS[name])
    reference = MergedReference(model, "default")
    dense = {n: w.double() for n, w in merged_by_peft(model).items()}
    names = set(reference.state())
    for seed in range(10):
        move(model, seed)
        report = reference.sync(0.5, Comparison())
        assert report.differ == ()
        for n, weight in merged_by_peft(model).items():
            dense[n] = 0.5 * weight.double() + 0.5 * dense[n]
    assert names <= set(dense)
    for n, weight in reference.state().items():
        assert (weight.double() - dense[n]).norm() <= 1e-6 * dense[n].norm(), n
    untouched = set(dense) - names
    base = dict(model.get_base_model().named_parameters())
    for n in untouched & set(base):
        torch.testing.assert_close(base[n].double(), dense[n], rtol=1e-12, atol=0)


def test_an_average_of_factors_is_no_average_of_weights():
    """Two adapters of one weight each: ((b1 + b2) / 2)((a1 + a2) / 2) is not (b1 a1 + b2 a2) / 2: 1.25 and 2.5."""
    (b1, a1), (b2, a2) = (0.0, 0.0), (1.0, 5.0)
    assert ((b1 + b2) / 2) * ((a1 + a2) / 2) == 1.25 and (b1 * a1 + b2 * a2) / 2 == 2.5
    model = policy_with(ADAPTERS["lora"])
    reference, averaged = MergedReference(model, "default"), policy_with(ADAPTERS["lora"])
    for seed in range(10):
        move(model, seed)
        reference.sync(0.5, Comparison())
        with torch.no_grad():
            for mean, current in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.mul_(0.5).add_(current, alpha=0.5)
    base = policy_with(ADAPTERS["lora"]).get_base_model()
    wrong = dict(effective_weights(averaged, "default"))
    errors = []
    for name, right in reference.state().items():
        start = base.get_submodule(name.removesuffix(".weight")).get_base_layer().weight.detach()
        errors.append(float((wrong[name] - right).norm() / (right - start).norm()))
    assert min(errors) > 0.02  # of the distance the reference has come; 0.04 to 0.06 here


def test_a_second_model_gets_the_merged_weights():
    model = policy_with(ADAPTERS["embedding"], tie_word_embeddings=True)
    second = tiny_model(chat_tokenizer(), attention_bias=True, tie_word_embeddings=True).eval()
    reference = ModelReference(second, model, "default")
    move(model, 1)
    assert reference.sync(1.0, Comparison()).differ == ()
    torch.testing.assert_close(logits(second), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_full_fine_tuning_syncs_as_trl_does(alpha):
    policy, ours, theirs = (tiny_model(chat_tokenizer(), seed=seed) for seed in (0, 1, 1))
    assert ModelReference(ours, policy).sync(alpha, Comparison()).differ == ()
    SyncRefModelCallback._sync_target_model(policy, theirs, alpha)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(chat_tokenizer(), hidden_size=64, head_dim=16, attention_bias=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_nf4_bases_are_never_touched(quantized_folder, mode, use_dora):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(
        quantized_folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    # As in training: in evaluation mode bitsandbytes itself repacks the weights, on a CPU with AVX512-BF16
    model = get_peft_model(base, LoraConfig(r=4, target_modules=LINEAR, use_dora=use_dora)).train()
    move(model, 1)
    stored = {n: t.clone() for n, t in base.state_dict().items() if "lora_" not in n}
    assert any(t.dtype == torch.uint8 for t in stored.values())
    reference = (AdapterReference if mode == "adapter" else MergedReference)(model, "default")
    start = logits(model)
    torch.testing.assert_close(reference_logits(model, reference), start, rtol=1e-3, atol=1e-4)
    move(model, 2)
    report = reference.sync(1.0, Comparison())
    assert report.differ == () and report.tensors > 0
    torch.testing.assert_close(reference_logits(model, reference), logits(model), rtol=1e-3, atol=1e-4)
    after = base.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("mode", [AdapterReference, MergedReference])
def test_a_failed_sync_names_the_tensors(mode, tmp_path):
    model = policy_with(ADAPTERS["lora"])
    reference = mode(model, "default")
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.q_proj.lora_B["default"].weight[0, 0] = torch.nan
    report = reference.sync(1.0, Comparison())
    assert len(report.differ) == 1 and "layers.1.self_attn.q_proj" in report.differ[0]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_wrong_merged_weight_is_found(kind):
    model = policy_with(ADAPTERS[kind])
    reference = MergedReference(model, "default")
    move(model, 1)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    acting_otherwise = layer.lora_A["default"].register_forward_hook(lambda module, given, output: 1.01 * output)
    assert reference.sync(0.5, Comparison()).differ == ("model.layers.0.mlp.down_proj.weight",)
    acting_otherwise.remove()
    assert reference.sync(0.5, Comparison()).differ == ()


def test_a_failed_sync_stops_the_run(tmp_path, tokenizer, monkeypatch):
    run = trainer(tmp_path, tokenizer)
    report = SyncReport(12, ("model.q_proj",), 0.5, 0.1)
    monkeypatch.setattr(run.reference.synced, "sync", lambda *given: report)
    with pytest.raises(ReferenceSyncError, match=r"1 of 12 tensors of the reference \(adapter\).*model\.q_proj"):
        run.train()


def test_weights_trained_outside_the_adapter_are_refused():
    model = policy_with(ADAPTERS["lora"])
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"trained outside of it: .*norm\.weight"):
        AdapterReference(model, "default")


# In the trainer


def reward(completions, **kwargs):
    return [float(len(str(completion)) % 7) for completion in completions]


def trainer(path, tokenizer, **changes):
    options = {"learning_rate": 0.02, "beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0}
    peft = changes.pop("peft_config", LoraConfig(r=4, target_modules=LINEAR))
    model = changes.pop("model", None) or tiny_model(tokenizer)
    args = config(path, **{**options, "ref_model_sync_steps": 2, "max_steps": 4, **changes})
    return ToolGRPOTrainer(model, reward, args, prompts(8), processing_class=tokenizer, peft_config=peft)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_syncs_are_made_logged_and_verified(tmp_path, tokenizer, capsys, alpha):
    run = trainer(tmp_path, tokenizer, ref_model_mixup_alpha=alpha, max_steps=5)
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log.get("ref/syncs") for log in logs] == [None, 1, 1, 2, 2]
    assert [log.get("ref/tensors_differ") for log in logs] == [None, 0, 0, 0, 0]
    assert [("ref/kl" in log) for log in logs] == [False, False, True, False, True]
    assert logs[0]["kl"] < 1e-7 < 1e-5 < logs[1]["kl"]
    if alpha == 1:
        assert all(log["ref/kl"] <= 1e-7 for log in logs if "ref/kl" in log)
        assert logs[2]["kl"] <= 1e-7 < 1e-5 < logs[3]["kl"]
    else:
        assert logs[2]["ref/kl"] > 1e-5
    assert "ref synced 2× (0 tensors differ)" in capsys.readouterr().out


def test_the_reference_of_a_full_fine_tuning_is_synced(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    run = trainer(tmp_path / "out", tokenizer, model=model, peft_config=None)
    run.train()
    assert not any(type(c) is SyncRefModelCallback for c in run.callback_handler.callbacks)
    for one, other in zip(run.model.parameters(), run.ref_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_due_sync_waits_for_the_end_of_a_rollout_batch(tmp_path, tokenizer):
    """Two optimizer steps share a batch; a sync due after each of them waits for the second."""
    run = trainer(tmp_path, tokenizer, num_iterations=2, ref_model_sync_steps=1, max_steps=4)
    made, sync = [], run.reference.synced.sync

    def noted(*args):
        made.append(run.state.global_step)
        return sync(*args)

    run.reference.synced.sync = noted
    run.train()
    assert made == [2, 4]


def test_a_sync_by_hand_waits_for_the_end_of_a_rollout_batch(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, num_iterations=2, ref_model_sync_steps=100, max_steps=3)
    assert run.sync_reference().differ == ()  # nothing has been sampled yet
    run.train()
    assert run.sync_reference() is None
    assert run.reference._pending and run.reference._syncs == 1


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_has_the_same_reference(tmp_path, tokenizer, alpha, full):
    if full and alpha == 1:
        pytest.skip("as with 0.5")
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "ref_model_mixup_alpha": alpha}
    if full:
        tiny_model(tokenizer).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        options |= {"peft_config": None}

    def start(path):
        given = dict(options)
        if full:
            given["model"] = tiny_model(tokenizer)
            given["model"].config._name_or_path = str(tmp_path / "model")
        return trainer(path, tokenizer, **given)

    whole = start(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "reference.safetensors").is_file() and not (checkpoint / "ref").exists()
    resumed = start(tmp_path / "resumed")
    resumed.reference.load(checkpoint)
    stored = load_file(checkpoint / "reference.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in resumed.reference.synced.state().items())
    resumed = start(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.reference._syncs == whole.reference._syncs == 3
    expected = whole.reference.synced.state()
    for name, tensor in resumed.reference.synced.state().items():
        assert torch.equal(tensor, expected[name]), name
    whole.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "ref").exists() and not (tmp_path / "final" / "reference.safetensors").exists()
    if not full:
        assert not any(".ref." in name for name in load_file(tmp_path / "final" / "adapter_model.safetensors"))


def test_trls_own_reference_is_saved_in_checkpoints_only(tmp_path, tokenizer):
    """Without syncing TRL keeps a copy of a given adapter, which it restores from checkpoints."""
    model = get_peft_model(tiny_model(tokenizer), LoraConfig(r=4, target_modules=LINEAR))
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "sync_ref_model": False}
    run = trainer(tmp_path / "run", tokenizer, model=model, peft_config=None, **options)
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert (tmp_path / "run" / "checkpoint-1" / "ref" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "checkpoint-1" / "reference.safetensors").exists()
    assert not (tmp_path / "final" / "ref").exists()


def test_a_given_adapter_is_the_first_reference(tmp_path, tokenizer):
    for alpha in (1.0, 0.5):
        model = get_peft_model(tiny_model(tokenizer), LoraConfig(r=4, target_modules=LINEAR))
        move(model, 1)
        run = trainer(tmp_path, tokenizer, model=model, peft_config=None, ref_model_mixup_alpha=alpha, max_steps=3)
        run.train()
        logs = [log for log in run.state.log_history if "loss" in log]
        assert logs[0]["kl"] < 1e-7 < 1e-4 < logs[1]["kl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha=0.0"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha=1.5"),
        ({"ref_model_mixup_alpha": 0.5, "ref_sync_mode": "adapter"}, "average of two adapters' factors"),
        ({"beta": 0.0}, "no reference model to sync"),
        ({"ref_model_sync_steps": 0}, "at least 1 optimizer step"),
        ({"ref_sync_mode": "copy"}, "Choose one of auto, adapter, merged"),
        ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "type PROMPT_TUNING"),
        ({"peft_config": COPIED["ia3"], "ref_sync_mode": "merged"}, "type IA3, which a reference of the kind 'merg"),
        ({"peft_config": None, "ref_sync_mode": "adapter"}, "without an adapter"),
    ],
)
def test_impossible_sync_settings_are_refused(tmp_path, tokenizer, changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, tokenizer, **copy.deepcopy(changes))


def test_an_adapter_of_another_name_is_refused(tmp_path, tokenizer):
    model = get_peft_model(tiny_model(tokenizer), LoraConfig(r=4, target_modules=LINEAR), adapter_name="tools")
    with pytest.raises(ConfigError, match=r"adapters 'tools' and `beta=0\.1`, but none named 'default'"):
        trainer(tmp_path, tokenizer, model=model, peft_config=None)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tokenizer):
    run = trainer(tmp_path / "a", tokenizer, save_strategy="steps", save_steps=1, max_steps=1)
    run.train()
    checkpoint = tmp_path / "a" / "checkpoint-1"
    other = trainer(tmp_path / "b", tokenizer, peft_config=LoraConfig(r=8, target_modules=LINEAR))
    with pytest.raises(CheckpointError, match=r"adapter: r \(value\): 4 in the checkpoint, 8 here"):
        other.train(resume_from_checkpoint=str(checkpoint))
    merged = trainer(tmp_path / "b", tokenizer, ref_model_mixup_alpha=0.5)
    with pytest.raises(ReferenceSyncError, match="of the kind 'adapter', expected 'merged'"):
        merged.train(resume_from_checkpoint=str(checkpoint))
    for name in ("reference.safetensors", "manifest.json", "run_identity.json", "progress_0.safetensors"):
        (checkpoint / name).unlink()  # as one of TRL's own
    with pytest.raises(ReferenceSyncError, match="has `r=4`, the one of this run `r=8`"):
        other.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ReferenceSyncError, match="written without `sync_ref_model=True`"):
        trainer(tmp_path / "b", tokenizer).train(resume_from_checkpoint=str(checkpoint))
    assert json.loads((checkpoint / "adapter_config.json").read_text())["r"] == 4


def test_syncing_without_a_reference_is_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="no reference to sync"):
        trainer(tmp_path, tokenizer, sync_ref_model=False).sync_reference()

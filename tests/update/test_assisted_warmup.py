"""The supervised loss of assisted steps, against a plain forward pass over each whole rollout."""

import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, script_ours, tiny_model, tool_call
from loss_options import Gradients
from peft import LoraConfig

from trl_toolgrpo import ToolGRPOTrainer


TOKENIZER = chat_tokenizer()
END = "<|im_end|>"
CALL = tool_call("add", a=1, b=2) + END
BAD = "<tool_call>\nadd one and two\n</tool_call>" + END
SCRIPTS = {  # which rollouts are learned from is decided by their turns; a script is one for each rollout of a group
    "tool_limit": [[CALL, CALL, CALL], [f"no call{END}"], [CALL, CALL, CALL], [f"none{END}"]],
    "length in text": [[CALL, CALL, "and on " * 200], [f"no call{END}"], [CALL, "on " * 200], [f"none{END}"]],
    "length in a call": [[CALL, CALL, "<tool_call>\n" + "1" * 600], [f"no{END}"], [CALL, f"3{END}"], [f"none{END}"]],
    "parse_errors": [[CALL, BAD, BAD], [f"no call{END}"], [CALL, CALL, f"3{END}"], [f"none{END}"]],
    "a turn without a call": [[CALL, BAD, CALL, f"3{END}"], [f"no call{END}"], [CALL, f"3{END}"], [f"none{END}"]],
    "all end": [[CALL, CALL, f"3{END}"], [f"no call{END}"], [CALL, f"3{END}"], [f"none{END}"]],
}


def by_hand(model, trajectories, rewards):
    """Compute the token mean of the cross-entropy of calling turns in rollouts above the mean, one rollout a pass."""
    total, count = 0.0, 0
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        if reward <= sum(rewards) / len(rewards):
            continue
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
        logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)
        own = logps.gather(1, ids[0, 1:, None])[len(trajectory.prompt_ids) - 1 :, 0]
        for turn in trajectory.turns:
            if any(call.error is None for call in turn.tool_calls):
                total, count = total - own[turn.start : turn.end].sum(), count + turn.end - turn.start
    return total / count


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_prompt_updates": False},
        {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"advantage_estimator": "gae", "beta": 0.1},
    ],
    ids=["packed", "plain", "two batches", "two micro-batches", "critic"],
)
def test_loss_and_gradient_by_hand(monkeypatch, tmp_path, name, masked, changes):
    script_ours(monkeypatch, TOKENIZER, SCRIPTS[name])
    seen = []

    def reward(trajectories, **kwargs):
        rewards = [float(len(t.turns)) for t in trajectories]
        seen.append((trajectories, rewards))
        return rewards

    model = tiny_model(TOKENIZER)
    with torch.no_grad():  # attention that matters
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    options = {
        "max_completion_length": 400, "max_tool_calling_iterations": 2, "assist_warmup_steps": 1, "max_steps": 2,
        "mask_truncated_completions": masked, "logprob_check": "off", "max_grad_norm": 0.0, "parse_error_budget": 1,
        "max_tool_output_tokens": 64, **changes,
    }  # fmt: skip
    if name == "a turn without a call":
        options["max_tool_calling_iterations"] = 5
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapter = lora if "beta" in changes else None
    trainer = ToolGRPOTrainer(
        model, reward, config(tmp_path, **options), prompts(8), processing_class=TOKENIZER, tools=[add],
        peft_config=adapter,
    )  # fmt: skip
    kept = Gradients()
    trainer.add_callback(kept)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    before = {key: value.detach().clone() for key, value in policy.state_dict().items()}
    trainer.train()
    batches = 2 if changes.get("gradient_accumulation_steps") == 2 and changes["steps_per_generation"] == 1 else 1
    policy.load_state_dict(before)
    policy.zero_grad()
    expected = sum(by_hand(policy, *batch) for batch in seen[:batches]) / batches
    expected.backward()
    # The head has no part in it
    trained = [p for n, p in policy.named_parameters() if p.requires_grad and "value_head" not in n]
    gradient = torch.cat([p.grad.flatten() for p in trained])
    found = kept.steps[0][: len(gradient)]
    stops = {t.stop_reason for batch in seen[:batches] for t in batch[0]}
    assert name == "a turn without a call" or name == "all end" or name.split()[0] in stops
    assert trainer.state.log_history[0]["forced/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert gradient.norm() > 0 and (found - gradient).norm() <= 1e-4 * gradient.norm()


def test_a_broken_record_is_not_learned_from(monkeypatch, tmp_path):
    script_ours(monkeypatch, TOKENIZER, SCRIPTS["all end"])
    trainer = ToolGRPOTrainer(
        tiny_model(TOKENIZER), lambda trajectories, **kwargs: [float(len(t.turns)) for t in trajectories],
        config(
            tmp_path, max_completion_length=400, assist_warmup_steps=1, strict_trajectories=False, logprob_check="off",
        ),
        prompts(4), processing_class=TOKENIZER, tools=[add],
    )  # fmt: skip
    run = trainer.rollouts.engine._run_part

    def broken(*args):
        batch = run(*args)
        batch.rollouts[0].trajectory.logprobs[0] = float("nan")
        return batch

    monkeypatch.setattr(trainer.rollouts.engine, "_run_part", broken)
    trainer.model.train()
    output = trainer._generate_and_score_completions([dict(trainer.train_dataset[0])] * 4)
    assert output["assist_mask"].any(dim=1).tolist() == [False, False, True, False]
    assert output["assist_count"] == output["assist_mask"].sum()

"""Every option of TRL's loss, for tests that compare updates, and a run that keeps the gradients of its steps."""

import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]

LOSS_OPTIONS = {
    **{name: {"loss_type": name} for name in LOSS_TYPES},
    "cispo, unclamped": {"loss_type": "cispo", "epsilon_high": 5.0},
    **{f"{name}, by sequence": {"loss_type": name, "importance_sampling_level": "sequence"} for name in LOSS_TYPES},
    "delta": {"delta": 1.5, "epsilon_high": 0.3},
    "off-policy mask": {
        "off_policy_mask_threshold": 1e-3, "num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2,
    },
    "kl": {"beta": 0.5},
    "kl, corrected": {"beta": 0.5, "use_bias_correction_kl": True},
    "entropy quantile": {"top_entropy_quantile": 0.2},
    "entropy quantile, kl": {"top_entropy_quantile": 0.5, "beta": 0.5, "loss_type": "grpo"},
    "entropy bonus": {"entropy_coef": 0.3},
    "entropy bonus and quantile": {"entropy_coef": 0.3, "top_entropy_quantile": 0.3},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 100.0, "max_steps": 3},
    "router loss": {"router_aux_loss_coef": 0.5},
    "router loss, grpo": {"router_aux_loss_coef": 0.5, "loss_type": "grpo"},
    "mixture of experts": {"router_aux_loss_coef": 0.0},
    "truncated masked": {"mask_truncated_completions": True},
    "batch scale": {"scale_rewards": "batch"},
    "no scale": {"scale_rewards": "none"},
    "normalize then sum": {"multi_objective_aggregation": "normalize_then_sum"},
    "steps on a batch": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4},
    "steps on a batch, grpo": {
        "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4, "loss_type": "grpo",
    },
    "passes over a batch": {"num_iterations": 2, "max_steps": 4},
    "batches in a step": {"steps_per_generation": 2, "max_steps": 2},
    "batches across steps": {"gradient_accumulation_steps": 3, "steps_per_generation": 4, "max_steps": 4},
    "entropy, passes over a batch": {"num_iterations": 2, "max_steps": 4, "entropy_coef": 0.3},
}  # fmt: skip


def model_of(options, tokenizer, sharp=3.0):
    """Return the policy, whose entropies differ from token to token, and the adapter that the options ask for."""
    if "router_aux_loss_coef" in options:
        torch.manual_seed(0)
        shape = {
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
        model.config._name_or_path = "tiny-moe"
    else:
        model = tiny_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(sharp)
    targets = ["q_proj", "v_proj"]
    adapter = LoraConfig(r=4, target_modules=targets, init_lora_weights=False) if options.get("beta") else None
    return model, adapter


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.steps.append(torch.cat(found).clone())


def run(kind, path, options, rewards, tools=None, prepare=None, stops=range(40)):
    """
    Train with some options over four micro-batches of four groups, or as the options say.

    Rollouts end at any of the tokens `stops`, so that they differ in length. Return the trainer and the gradients of
    its steps.
    """
    tokenizer = chat_tokenizer()
    model, adapter = model_of(options, tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *stops]
    given = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.0, "logprob_check": "off", "learning_rate": 1e-3}
    args = config(path, **{**given, **options})
    torch.manual_seed(0)
    trainer = kind(model, rewards, args, prompts(24), processing_class=tokenizer, peft_config=adapter, tools=tools)
    if prepare is not None:
        prepare(trainer, tokenizer)
    gradients = Gradients()
    trainer.add_callback(gradients)
    torch.manual_seed(1)
    trainer.train()
    return trainer, gradients.steps

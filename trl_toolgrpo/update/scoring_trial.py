"""A trial of TRL's scoring pass at construction, so that a model it cannot score is refused by name."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import ConfigError
from ..models.lm_head import base_model
from ..models.rounding import compute_dtype
from ..sampling.choice import differs, trial_rows
from ..sampling.protocol import scoring_mode
from ..trl_hooks import Run, attention_implementation


_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def check_scoring(run: Run) -> None:
    """
    Check that TRL's scoring pass runs for a policy and gives the log-probs of the model's own logits.

    TRL patches its own head into the model, which has to know how the family gets from hidden states to logits. The
    check is skipped if parameters are sharded, or will be by ZeRO-3, whose patched head gathers them already.

    Args:
        run ([`Run`]):
            The run, its policy patched.

    Raises:
        ConfigError: if the pass fails or gives other log-probs; naming the family.
    """
    model = run.model
    bare = base_model(model)
    name, config = type(bare).__name__, bare.config.get_text_config()
    device = next(model.parameters()).device
    if attention_implementation(config) == "flex_attention" and device.type == "cpu":
        raise ConfigError(
            "You passed a model with `attn_implementation='flex_attention'` on a CPU, where torch has no backward "
            "pass for it.",
            remedy="Load the model with `attn_implementation='sdpa'`, or train on a GPU.",
        )
    plugin = getattr(run.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return
    if any(p.is_meta or hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters()):
        return
    ids = torch.tensor(trial_rows(config.vocab_size), device=device)
    everything = torch.ones_like(ids)

    def score(**options: bool) -> Tensor:
        labels = ids.clone()
        return model(input_ids=ids, attention_mask=everything, labels=labels, fused_lm_head=True, **options).log_probs

    with scoring_mode(model), run.accelerator.autocast():
        try:
            found = score()
            logits = model(input_ids=ids, attention_mask=everything, use_cache=False).logits[:, :-1]
        except _FAILURES as error:
            raise ConfigError(
                f"TRL's scoring pass does not run for {name}: {_error_text(error)}. It takes the output of "
                f"`{bare.base_model_prefix}` for hidden states, and the output layer for all that comes after them.",
                remedy="Train a model of another family, or use a version of TRL that knows this one.",
            ) from error
        if run.aux_loss_enabled:
            try:
                score(output_router_logits=True)
            except _FAILURES as error:
                raise ConfigError(
                    f"TRL's load-balancing loss does not run for {name}: {_error_text(error)}. It is added since the "
                    f"model's configuration has `router_aux_loss_coef={run.router_aux_loss_coef}`.",
                    remedy="Set `router_aux_loss_coef=0.0`, which trains the router by the policy's loss alone.",
                ) from error
    scores = torch.log_softmax(logits.cpu().double() / run.args.temperature, dim=-1)
    expected = scores.gather(-1, ids[:, 1:, None].cpu())[..., 0]
    found = found.cpu()
    gap = (found.double() - expected).abs().max().item()
    if compute_dtype(run.args, bare) in (torch.float32, torch.float64):
        wrong = not gap <= 1e-4 + 1e-6 * logits.abs().max().item()
    else:
        wrong = differs(found, expected, scores[0] - scores[1], exact=False)
    if wrong:
        raise ConfigError(
            f"TRL's scoring pass gives log-probs that are not those of {name}'s own logits, by up to {gap:.3g} nats: "
            f"the family does something to its logits, such as capping them, that TRL does not know. An update would "
            f"be computed for another policy than the one that samples.",
            remedy="Train a model of another family.",
        )


def _error_text(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"

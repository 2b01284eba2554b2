"""A run without a trainer, to test parts that a trainer holds."""

from collections import defaultdict, deque
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from conftest import config, tiny_model
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from trl_toolgrpo.trl_hooks import Run


def bare_run(path, tokenizer, model=None, **options):
    """
    Return a [`Run`] over a plain object with a real model, configuration, accelerator and state.

    Args:
        path (`Path`):
            Output folder.
        tokenizer (`PreTrainedTokenizerFast`):
            Tokenizer of the run.
        model (`PreTrainedModel`, *optional*):
            The policy, in training mode; a tiny one by default.
        options:
            Of the configuration.
    """
    args = config(path, **options)
    model = (model or tiny_model(tokenizer)).train()
    handler = CallbackHandler([], model, tokenizer, None, None)
    names = ("prompt", "completion", "advantages")
    table = {**{name: deque() for name in names}, "rewards": defaultdict(deque), "extra": defaultdict(deque)}
    trainer = SimpleNamespace(
        args=args, model=model, model_wrapped=model, ref_model=None, optimizer=None, lr_scheduler=None,
        accelerator=Accelerator(cpu=True), state=TrainerState(max_steps=args.max_steps), control=TrainerControl(),
        callback_handler=handler, add_callback=handler.add_callback, pop_callback=handler.pop_callback,
        processing_class=tokenizer, train_dataset=None, tools=[], reward_funcs=[], reward_func_names=["reward"],
        reward_weights=torch.ones(1), num_generations=args.num_generations, recording=True, log_completions=False,
        is_fsdp_enabled=False, is_deepspeed_enabled=False, hub_model_id=None, push_in_progress=None,
        _step=0, _buffered_inputs=None, _tokenizer=tokenizer, _is_vlm=False, _logs=table, _pending_extra_logs={},
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _tr_loss=torch.tensor(0.0), _globalstep_last_logged=0, _get_output_dir=lambda trial=None: str(path),
    )  # fmt: skip
    return Run(trainer)

"""A clock that is set while a run is under way: durations, time limits and the order of files do not follow it."""

import time

import pytest
from conftest import ScriptedSampler, chat_tokenizer, config, prompts, tiny_model
from transformers import TrainerCallback

from trl_toolgrpo import ToolGRPOTrainer, find_checkpoint
from trl_toolgrpo.rollout import engine
from trl_toolgrpo.run_folder.files import read_lines


CALL = '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call><|im_end|>'


def wait() -> str:
    """Wait for a moment."""
    time.sleep(0.01)
    return "waited"


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0], ids=["backwards", "forwards"])
def test_durations_do_not_follow_a_clock_that_jumps_by_a_day(tmp_path, monkeypatch, jump):
    tokenizer, jumps, real = chat_tokenizer(), [], time.time
    sampler = ScriptedSampler(tokenizer, [[CALL, "done<|im_end|>"]], [tokenizer.eos_token_id])
    monkeypatch.setattr(engine, "make_sampler", lambda *args, **kwargs: sampler)
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer), lambda completion_ids, **kwargs: [float(i) for i in range(len(completion_ids))],
        config(
            tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2, max_completion_length=128,
            logprob_check="off", tool_timeout=5.0, report_to="none",
        ),
        prompts(4), processing_class=tokenizer, tools=[wait],
    )  # fmt: skip

    class Jump(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            jumps.append(jump)

    trainer.add_callback(Jump())
    monkeypatch.setattr(time, "time", lambda: real() + sum(jumps))
    begun = time.monotonic()
    trainer.train()
    took = time.monotonic() - begun
    monkeypatch.undo()
    assert len(jumps) == 3
    history = trainer.state.log_history
    assert 0 < history[-1]["train_runtime"] <= took + 1
    for entry in history[:-1]:
        assert entry["tools/wait/timeouts"] == 0 and entry["tools/wait/errors"] == 0
        assert 0.01 <= entry["tools/wait/latency_p50"] < 5 and 0 <= entry["rollout/tool_wait_fraction"] <= 1
        assert 0 < entry["step_time"] <= took and entry["rollout/tokens_per_second"] > 0
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 3]

"""Several evaluation sets: each has its own figures, and the best model is chosen by the one that is named."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, script_ours, tiny_model, tool_call
from transformers import EarlyStoppingCallback, TrainerCallback

from trl_toolgrpo import ConfigError, ToolGRPOConfig, ToolGRPOTrainer
from trl_toolgrpo.report.folder import read_folder
from trl_toolgrpo.report.page import build_report


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")
END = "<|im_end|>"


def scores(steps):
    """A reward that is what `steps` says for each data set, by its prompts, at each optimizer step."""

    def reward(prompts, trainer_state, log_metric, **kwargs):
        name = prompts[0][0]["content"].split()[0]
        value = steps.get(name, [0.0] * 9)[trainer_state.global_step]
        log_metric("seen", value)
        return [value + (row % 2) * 1e-3 * (name == "train") for row in range(len(prompts))]

    return reward


SETS = {"maths": prompts(4, "maths"), "code": prompts(4, "code")}
STEPS = {"maths": [0.0, 1.0, 3.0, 2.0], "code": [9.0, 8.0, 7.0, 6.0]}


def start(path, monkeypatch, rewards=None, evaluation=SETS, callbacks=None, **changes):
    """Rollouts of one call each; two evaluation rollouts of each prompt."""
    script_ours(monkeypatch, TOKENIZER, [[tool_call("add", a=1, b=2) + END, f"3{END}"], [f"no{END}"]])
    options = {
        "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2, "logprob_check": "off",
        "per_device_eval_batch_size": 4, "max_completion_length": 200, "num_generations": 4, **changes,
    }  # fmt: skip
    return ToolGRPOTrainer(
        tiny_model(TOKENIZER), rewards or scores(STEPS), config(path, **options), prompts(8, "train"), evaluation,
        TOKENIZER, tools=[add], callbacks=callbacks,
    )  # fmt: skip


OURS = ("tools/call_frequency", "tools/add/calls", "rollout/turns_mean", "rollout/stop/stop", "forced/fraction")
TRLS = ("reward", "reward_std", "rewards/reward/mean", "completions/mean_length", "entropy", "num_tokens")


def test_each_set_has_its_figures(tmp_path, monkeypatch):
    """In what `evaluate` returns, in the log, in the files and in the report."""
    trainer = start(tmp_path, monkeypatch)
    trainer.train()
    found = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    assert len(found) == 6
    for place, entry in enumerate(found):
        step, name = place // 2 + 1, ("maths", "code")[place % 2]
        for figure in (*OURS, *TRLS, "seen"):
            assert f"eval_{name}_{figure}" in entry, figure
        assert entry[f"eval_{name}_reward"] == entry[f"eval_{name}_seen"] == STEPS[name][step]
        assert {key.removeprefix(f"eval_{name}_") for key in entry} & {"loss", "runtime"}
        assert all(key.startswith(f"eval_{name}_") for key in entry if key not in ("epoch", "step"))
    trained = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(trained) == 3 and not any("maths" in key or "eval" in key for entry in trained for key in entry)
    run = read_folder(tmp_path)
    assert run.evaluations() == [("eval_maths_", "maths"), ("eval_code_", "code")]
    assert run.curve("eval_maths_reward") == ([1, 2, 3], [1.0, 3.0, 2.0])
    assert run.metric_of("eval_code_tools/add/calls") == "tools/add/calls"
    page = build_report([tmp_path]).html
    assert "The held-out reward on maths" in page and "The held-out reward on code" in page
    assert page.count('data-metric="reward"') == 1 and 'data-metric="maths_reward"' not in page


@pytest.mark.parametrize(
    ("metric", "greater", "best"),
    [("eval_maths_reward", True, 2), ("maths_reward", True, 2), ("eval_code_reward", True, 1),
     ("eval_code_reward", False, 3), ("eval_maths_reward", False, 1)],
)  # fmt: skip
def test_the_best_model_is_that_of_the_named_set(tmp_path, monkeypatch, metric, greater, best):
    trainer = start(
        tmp_path, monkeypatch, load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=greater,
        save_strategy="steps", save_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    weights = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights[state.global_step] = [p.detach().clone() for p in model.parameters()]

    trainer.add_callback(Keep())
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert trainer.state.best_metric == STEPS["code" if "code" in metric else "maths"][best]
    assert all(torch.equal(*pair) for pair in zip(trainer.model.parameters(), weights[best], strict=True))


def test_early_stopping_counts_the_named_set_once(tmp_path, monkeypatch):
    trainer = start(
        tmp_path, monkeypatch, callbacks=[EarlyStoppingCallback(2)], load_best_model_at_end=True, max_steps=6,
        metric_for_best_model="eval_code_reward", greater_is_better=True, save_strategy="steps", save_steps=1,
        rewards=scores({"code": [0, 5, 4, 3, 2, 1, 0], "maths": list(range(7))}),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3  # the best in step 1, and two that are not better


@pytest.mark.parametrize("prefix", ["eval", "test", "eval_other", "held_out"])
def test_one_set_has_the_prefix_it_is_given(tmp_path, monkeypatch, prefix):
    trainer = start(tmp_path, monkeypatch, evaluation=None, eval_strategy="no")
    found = trainer.evaluate(SETS["code"], metric_key_prefix=prefix)
    assert found[f"{prefix}_reward"] == 9.0 and f"{prefix}_tools/add/calls" in found
    assert all(key.startswith(f"{prefix}_") for key in found if key != "epoch")
    both = trainer.evaluate(SETS, metric_key_prefix=prefix)
    assert (both[f"{prefix}_maths_reward"], both[f"{prefix}_code_reward"]) == (0.0, 9.0)
    assert f"{prefix}_reward" not in both


def test_nothing_is_left_of_an_evaluation_that_fails(tmp_path, monkeypatch):
    trainer = start(tmp_path, monkeypatch, evaluation=None, eval_strategy="no")
    trainer.evaluate(SETS["maths"])
    broken = prompts(4, "broken")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "compute_loss", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate({"broken": broken})
    found = trainer.evaluate(SETS["code"])
    assert found["eval_reward"] == 9.0 and found["eval_seen"] == 9.0
    trainer.predict(SETS["maths"])
    assert trainer.evaluate(SETS["code"])["eval_reward"] == 9.0


def test_sets_do_not_depend_on_each_other(tmp_path, monkeypatch):
    """With deterministic rollouts a set gives the same whether or not another was evaluated before."""
    options = {"eval_strategy": "no", "evaluation": None, "deterministic_rollouts": True, "max_completion_length": 8}
    trainer = start(tmp_path, monkeypatch, **options)
    monkeypatch.undo()  # the default sampler
    both = trainer.evaluate(SETS)
    alone = trainer.evaluate({"code": SETS["code"]})
    assert alone["eval_code_entropy"] == pytest.approx(both["eval_code_entropy"], rel=1e-6)
    assert alone["eval_code_completions/mean_length"] == both["eval_code_completions/mean_length"]
    assert math.isfinite(alone["eval_code_loss"])


@pytest.mark.parametrize("metric", ["reward", "eval_reward", "eval_mathsreward", None])
def test_a_metric_of_no_set_is_refused(tmp_path, monkeypatch, metric):
    options = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ConfigError, match=r"Pass 'eval_maths_.*' or 'eval_code_.*'"):
        start(tmp_path, monkeypatch, metric_for_best_model=metric, **options)
    start(tmp_path, monkeypatch, metric_for_best_model=metric or "loss", evaluation=SETS["code"], **options)


def test_the_example_of_the_guide_runs(tmp_path):
    """With a tiny model and a step of a few seconds in place of Qwen3's."""
    guide = (Path(__file__).parents[1] / "recipes" / "GUIDE.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S) if "eval_travel_reward" in b)
    tiny_model(TOKENIZER).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    sizes = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "max_completion_length": 16, "use_cpu": True,
             "num_generations": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
             "report_to": "none", "output_dir": str(tmp_path / "run")}  # fmt: skip
    known = {
        "ToolGRPOConfig": lambda **given: ToolGRPOConfig(**{**given, **sizes}),
        "reward": lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))],
        "get_salary": add, "salaries": prompts(8), "travel": prompts(4), "finance": prompts(4, "money"),
    }  # fmt: skip
    text = block.replace("Qwen/Qwen3-0.6B", str(tmp_path / "model"))
    exec(text.replace("import ToolGRPOConfig, ToolGRPOTrainer", "import ToolGRPOTrainer"), known)
    trainer = known["trainer"]
    assert trainer.state.global_step == 2 and trainer.state.best_metric is not None
    assert {"eval_travel_reward", "eval_finance_reward"} <= {key for log in trainer.state.log_history for key in log}
    assert trainer.args.cast_lm_head_to_fp32 and trainer.args.bf16

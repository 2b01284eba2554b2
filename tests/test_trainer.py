"""The trainer as a whole: what it refuses at construction, what it logs, and what it does with a broken record."""

import functools
import math

import pytest
import torch
from conftest import MAKE_SAMPLER, ScriptedSampler, chat_tokenizer, config, prompts, tiny_model
from datasets import Dataset, Image
from transformers import AutoTokenizer
from trl import GRPOConfig

from trl_toolgrpo import (
    ConfigError,
    DatasetError,
    LogprobMismatchError,
    Tool,
    ToolGRPOConfig,
    ToolGRPOTrainer,
    ToolNameError,
    ToolSchemaError,
    TrajectoryError,
)
from trl_toolgrpo.rollout import engine
from trl_toolgrpo.sampling import model_sampler


def send_slack_message(recipient: str, text: str) -> str:
    """
    Send a message.

    Args:
        recipient: Who gets it.
        text: What it says.
    """
    return f"sent to {recipient}"


def length_reward(completions, **kwargs):
    return [float(len(str(completion)) % 7) for completion in completions]


def make(tmp_path, tokenizer=None, dataset=None, tools=None, reward=length_reward, args=None, model=None, **changes):
    tokenizer = tokenizer or chat_tokenizer()
    return ToolGRPOTrainer(
        model if model is not None else tiny_model(tokenizer),
        reward,
        args or config(tmp_path, **changes),
        dataset if dataset is not None else prompts(),
        processing_class=tokenizer,
        tools=tools,
    )


def steps(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


# Construction


def test_a_dataset_without_prompts_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"columns question.*none of them is `prompt`"):
        make(tmp_path, dataset=Dataset.from_list([{"question": "?"}]))


def test_string_prompts_with_tools_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"prompts are of type str.*'role': 'user'"):
        make(tmp_path, dataset=Dataset.from_list([{"prompt": "hello"}]), tools=[send_slack_message])


def test_a_prompt_that_names_a_tool_by_the_wrong_name_is_refused(tmp_path):
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "Use slack_send_message to tell people."},
                {"role": "user", "content": "hi"},
            ]
        }
    ]
    with pytest.raises(ToolNameError, match=r"slack_send_message.*send_slack_message"):
        make(tmp_path, dataset=Dataset.from_list(rows), tools=[send_slack_message])


def test_a_row_that_lists_a_tool_by_the_wrong_name_is_refused(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "tools": ["send_slack_mesage"]}]
    with pytest.raises(ToolNameError, match="send_slack_message"):
        make(tmp_path, dataset=Dataset.from_list(rows), tools=[send_slack_message])


def test_a_prompt_that_calls_a_tool_by_the_wrong_name_is_refused(tmp_path):
    call = {"type": "function", "function": {"name": "slack_send_message", "arguments": {}}}
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "slack_send_message", "content": "ok"},
        {"role": "user", "content": "again"},
    ]
    with pytest.raises(ToolNameError, match=r"slack_send_message.*did you mean `send_slack_message`"):
        make(tmp_path, dataset=Dataset.from_list([{"prompt": history}]), tools=[send_slack_message])


def test_a_dataset_without_rows_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="`train_dataset` without a single row"):
        make(tmp_path, dataset=prompts(1).select([]))


def test_a_prompt_that_a_transform_makes_is_accepted(tmp_path):
    def ask(batch):
        return {"prompt": [[{"role": "user", "content": f"Who is {name}?"}] for name in batch["name"]]}

    dataset = Dataset.from_dict({"name": ["Ada", "Grace"]}).with_transform(ask)
    trainer = make(tmp_path, dataset=dataset, tools=[send_slack_message])
    trainer.train()
    assert steps(trainer)


def test_a_prompt_of_a_transform_is_checked_like_any_other(tmp_path):
    dataset = Dataset.from_dict({"name": ["Ada"]}).with_transform(lambda batch: {"prompt": batch["name"]})
    with pytest.raises(DatasetError, match="prompts are of type str"):
        make(tmp_path, dataset=dataset, tools=[send_slack_message])


def test_unused_columns_are_not_decoded(tmp_path):
    rows = [{**row, "picture": {"bytes": b"no picture", "path": None}} for row in prompts(2)]
    dataset = Dataset.from_list(rows).cast_column("picture", Image())
    with pytest.raises((OSError, ImportError)):  # without Pillow, or with it
        dataset[0]
    make(tmp_path, dataset=dataset, tools=[send_slack_message])


def test_a_tools_column_without_tools_is_warned_of(tmp_path, caplog):
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "tools": ["send_slack_message"]}] * 4
    make(tmp_path, dataset=Dataset.from_list(rows))
    assert "has a column `tools`, but you passed neither" in caplog.text


def test_tools_that_are_no_list_are_refused(tmp_path):
    with pytest.raises(ToolSchemaError, match=r"is not a list.*tools=\[\.\.\.\]"):
        make(tmp_path, tools=send_slack_message)


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_time_limit_that_is_not_positive_is_refused(timeout):
    with pytest.raises(ToolSchemaError, match=rf"timeout={timeout}.*positive"):
        Tool("look", "Look.", {"type": "object", "properties": {}}, lambda: None, timeout=timeout)


def test_two_tools_of_one_name_are_refused(tmp_path):
    other = Tool("send_slack_message", "Another.", {"type": "object", "properties": {}}, lambda: None)
    with pytest.raises(ToolNameError, match="send_slack_message"):
        make(tmp_path, tools=[send_slack_message, other])


def test_a_tool_without_a_schema_is_refused(tmp_path):
    def undescribed(x):
        return x

    with pytest.raises(ToolSchemaError, match=r"undescribed.*type hints"):
        make(tmp_path, tools=[undescribed])


def test_a_template_that_cannot_call_tools_is_refused(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not support tool calling"):
        make(tmp_path, tokenizer=tokenizer, tools=[send_slack_message])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_p": 0.9}, r"top_p=0.9.*record_sample_logprobs=False"),
        ({"generation_kwargs": {"top_k": 50}}, r"generation_kwargs: top_k=50"),
        ({"rollout_backend": "sglang"}, r"rollout_backend='sglang'.*transformers"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"max_concurrent_tools": 0}, "at least 1"),
        ({"max_tool_calling_iterations": -1}, "max_tool_calling_iterations=-1.*at least 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **changes)


def test_an_environment_factory_that_cannot_be_called_is_refused(tmp_path):
    tokenizer = chat_tokenizer()
    with pytest.raises(ConfigError, match="cannot be called"):
        ToolGRPOTrainer(
            tiny_model(tokenizer),
            length_reward,
            config(tmp_path),
            prompts(),
            processing_class=tokenizer,
            environment_factory=object(),
        )


def test_every_kind_of_tool_is_rendered_by_its_one_name(tmp_path):
    class Greeter:
        """Greets."""

        def __call__(self, name: str) -> str:
            """
            Greet somebody.

            Args:
                name: Whom.
            """
            return f"hello {name}"

    plain = Tool("plain", "A tool.", {"type": "object", "properties": {"x": {"type": "integer"}}}, lambda x: x)
    bound = functools.partial(send_slack_message, recipient="ada")
    trainer = make(tmp_path, tools=[plain, bound, Greeter()])
    ids, _, _ = trainer._tokenize_prompts([[{"role": "user", "content": "hi"}]])
    text = trainer.processing_class.decode(ids[0])
    assert [f'"name": "{name}"' in text for name in ("plain", "send_slack_message", "Greeter")] == [True] * 3
    assert '"recipient"' not in text, "an argument that is bound is none of the policy's business"


def test_trls_configuration_is_accepted(tmp_path):
    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=1, use_cpu=True, bf16=False,
        max_completion_length=8, report_to="none", save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer = make(tmp_path, args=args)
    trainer.train()
    assert isinstance(trainer.args, ToolGRPOConfig)
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.record_sample_logprobs is True and saved.num_generations == 4


# Updates


def test_the_ratio_is_one_on_the_first_step_and_spreads_on_the_second(tmp_path, capsys):
    trainer = make(tmp_path, num_iterations=2, max_steps=4, learning_rate=1e-2, logprob_check="always")
    trainer.train()
    first, second, third, _ = steps(trainer)
    for log in (first, third):
        assert log["ratio/mean"] == pytest.approx(1, abs=1e-5) and log["ratio/std"] < 1e-5
        assert log["sampling/logp_diff_max"] < 1e-4
    assert second["ratio/std"] > 1e-3 and "sampling/logp_diff_max" not in second
    assert [log["forced/fraction"] for log in steps(trainer)] == [0.0] * 4
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ratio ")]
    assert len(lines) == 4 and lines[0].startswith("ratio 1.000±0.000 | forced 0.0%")


def test_reward_functions_get_the_trajectories(tmp_path):
    seen = []

    def reward(completions, completion_ids, trajectories, **kwargs):
        seen.append((completion_ids, trajectories))
        return [float(i) for i in range(len(completions))]

    make(tmp_path, reward=reward, tools=[send_slack_message]).train()
    ids, trajectories = seen[0]
    assert [trajectory.completion_ids for trajectory in trajectories] == ids
    for trajectory in trajectories:
        trajectory.validate()
        assert len(trajectory.turns) == 1 and trajectory.stop_reason in ("stop", "length")


def test_evaluation_logs_under_its_own_prefix(tmp_path):
    trainer = make(tmp_path, tools=[send_slack_message], per_device_eval_batch_size=4, num_generations_eval=1)
    metrics = trainer.evaluate(prompts(4))
    assert metrics["eval_rollout/turns_mean"] == 1.0
    assert "eval_tools/call_frequency" in metrics
    assert not any(name.startswith("eval_ratio") for name in metrics)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_evaluation_uses_recorded_log_probs(tmp_path, monkeypatch, beta):
    """Entropy and loss of an evaluation equal those of TRL's scoring pass, which is not run."""
    found = []
    for recorded in (True, False):
        torch.manual_seed(0)
        model = tiny_model(chat_tokenizer())
        model.save_pretrained(tmp_path / "model")
        model.config._name_or_path = str(tmp_path / "model")
        trainer = make(tmp_path, model=model, beta=beta, temperature=0.8, per_device_eval_batch_size=4)
        if not recorded:
            monkeypatch.setattr(engine.RolloutBatch, "entropies", lambda *args: None)
        passes = []
        forward = trainer.model.forward

        def counted(*args, forward=forward, passes=passes, **kwargs):
            passes.append(kwargs.get("fused_lm_head"))
            return forward(*args, **kwargs)

        trainer.model.forward = counted
        torch.manual_seed(1)
        found.append((trainer.evaluate(prompts(4)), passes.count(True)))
    (ours, ours_passes), (computed, computed_passes) = found
    assert ours_passes == 0 and computed_passes >= 1
    for name in ("eval_entropy", "eval_loss"):
        assert ours[name] == pytest.approx(computed[name], abs=1e-5)
    assert ours["eval_entropy"] > 1


def test_wrong_recorded_log_probs_are_found(tmp_path, monkeypatch):
    honest = model_sampler.sample_tokens

    def shifted(logits, temperature, noise):
        tokens, logprobs, entropies = honest(logits, temperature, noise)
        return tokens, logprobs - 0.01, entropies

    monkeypatch.setattr(engine, "unsupported_reason", lambda *args: None)  # its trial finds the shift too
    monkeypatch.setattr(model_sampler, "sample_tokens", shifted)
    words = r"rollout \d, turn 0, completion token \d+ .*recorded -.*recomputed -"
    with pytest.raises(LogprobMismatchError, match=words):
        make(tmp_path).train()
    make(tmp_path, logprob_check="off").train()
    make(tmp_path, logprob_check_tolerance=0.02).train()


def test_a_sampler_at_another_temperature_is_found(tmp_path, monkeypatch):
    honest = model_sampler.sample_tokens
    monkeypatch.setattr(engine, "unsupported_reason", lambda *args: None)
    monkeypatch.setattr(
        model_sampler, "sample_tokens", lambda logits, temperature, noise: honest(logits, 2 * temperature, noise)
    )
    with pytest.raises(LogprobMismatchError):
        make(tmp_path).train()


class BrokenSampler(ScriptedSampler):
    """A sampler that loses the last log-prob of row 0 and gives NaN for row 1."""

    def step(self):
        results = super().step()
        for sampled in results:
            if sampled.row == 0:
                sampled.logprobs = sampled.logprobs[:-1]
            elif sampled.row == 1:
                sampled.logprobs[0] = math.nan
        return results


def broken(monkeypatch, kind, tokenizer, script):
    sampler = kind(tokenizer, script, [tokenizer.eos_token_id])
    monkeypatch.setattr(MAKE_SAMPLER, lambda *args, **kwargs: sampler)


def test_a_broken_record_stops_training_by_name(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer()
    broken(monkeypatch, BrokenSampler, tokenizer, [["one<|im_end|>"], ["two<|im_end|>"]])
    with pytest.raises(TrajectoryError, match=r"Rollout 0: field `logprobs` of a turn has \d+ values, expected \d+"):
        make(tmp_path, tokenizer, logprob_check="off").train()


def test_without_strictness_broken_records_are_masked_out(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer()
    broken(monkeypatch, BrokenSampler, tokenizer, [["one<|im_end|>"], ["two<|im_end|>"]])
    trainer = make(tmp_path, tokenizer, logprob_check="off", strict_trajectories=False)
    outputs = []
    score = trainer._generate_and_score_completions

    def keep(inputs):
        outputs.append(score(inputs))
        return outputs[-1]

    trainer._generate_and_score_completions = keep
    trainer.train()
    output = outputs[0]
    kept = output["completion_mask"].sum(dim=1)
    assert kept[0] == kept[1] == 0 and kept[2] > 0 and kept[3] > 0
    assert output["num_items_in_batch"] == kept.sum()
    assert steps(trainer)[0]["rollout/invalid"] == 2.0
    assert math.isfinite(steps(trainer)[0]["loss"]) and math.isfinite(steps(trainer)[0]["grad_norm"])


class MuteSampler(ScriptedSampler):
    """A sampler that gives row 0 no token at all."""

    def step(self):
        results = super().step()
        for sampled in results:
            if sampled.row == 0:
                sampled.token_ids, sampled.logprobs, sampled.stopped = [], [], False
        return results


@pytest.mark.parametrize("tools", [None, [send_slack_message]])
def test_an_empty_completion_is_a_truncated_rollout(tmp_path, monkeypatch, tools):
    tokenizer = chat_tokenizer()
    broken(monkeypatch, MuteSampler, tokenizer, [["one<|im_end|>"]])
    seen = []

    def reward(completions, trajectories, **kwargs):
        seen.extend(trajectories)
        return [1.0, 0.0, 1.0, 0.0]

    trainer = make(tmp_path, tokenizer, tools=tools, reward=reward, logprob_check="off")
    trainer.train()
    assert [trajectory.stop_reason for trajectory in seen] == ["length", "stop", "stop", "stop"]
    assert steps(trainer)[0]["completions/clipped_ratio"] == 0.25
    assert math.isfinite(steps(trainer)[0]["loss"])


def test_without_recording_trl_samples(tmp_path):
    trainer = make(tmp_path, record_sample_logprobs=False, top_p=0.9, tools=[send_slack_message])
    trainer.train()
    assert "ratio/mean" not in steps(trainer)[0]


def test_the_tokenizer_is_found_by_the_models_name(tmp_path):
    tokenizer = chat_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == tokenizer.chat_template
    trainer = ToolGRPOTrainer(
        str(tmp_path / "model"), length_reward, config(tmp_path), prompts(), tools=[send_slack_message]
    )
    trainer.train()
    assert trainer.state.global_step == 1

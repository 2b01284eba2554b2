"""The model card of a run: its code runs, and it says what was set, what the method is and how the run ended."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import chat_tokenizer, config, prompts, tiny_model
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig

from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer
from trl_toolgrpo.hub.model_card import bars, curves


def find(city: str, days: int = 1) -> str:
    """
    The weather in a "city": '''quoted''', ```fenced``` and 100% {braced}.

    Args:
        city: Its name.
        days: How many days from today.
    """
    return city


def reward(completion_ids, **kwargs):
    """Differs within a group."""
    return [float(sum(ids) % 11) for ids in completion_ids]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a base model with its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), chat_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def start(base, folder, lora=True, dataset=None, **changes):
    options = {name: changes.pop(name) for name in ("tools", "environment_factory", "eval_dataset") if name in changes}
    return ToolGRPOTrainer(
        str(base), reward, config(folder, **changes), dataset or prompts(4),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None, **options,
    )  # fmt: skip


def code_of(card):
    """The Python of a card, block by block."""
    return [block for _, block in re.findall(r"^(`{3,})python\n(.*?)^\1$", card, re.MULTILINE | re.DOTALL)]


def pasted(card):
    """The names that the code of a card defines, and what it prints."""
    left, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        for block in code_of(card):
            exec(block, left)
    return left, said.getvalue()


class Weather:
    """An environment with a tool of its own."""

    def reset(self, **kwargs):
        pass

    def look(self, place: str) -> str:
        """
        Look out of the window.

        Args:
            place: Where.
        """
        return place


CASES = {
    "an adapter": {"lora": True, "tools": [find]},
    "a whole model": {"lora": False, "tools": [find]},
    "a value head": {"lora": True, "tools": [find], "advantage_estimator": "gae"},
    "switches of the template": {
        "lora": False, "tools": [find],
        "chat_template_kwargs": {"enable_thinking": False, "a b": [1, None], "why": "'\""},
    },
    "an environment": {"lora": True, "environment_factory": Weather},
    "no tools": {"lora": True},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_code_of_a_card_runs_and_renders_prompts_as_in_training(base, tmp_path, name):
    changes = dict(CASES[name])
    trainer = start(base, tmp_path / "out", changes.pop("lora"), **changes)
    trainer.train()
    trainer.save_model()
    left, said = pasted((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    ids = left["inputs"]["input_ids"][0].tolist()
    expected = trainer._tokenize_prompts([left["messages"]] * 4)[0][0]
    assert ids == expected, "what the policy reads is what it read in training"
    assert ("tools" in left) == (name != "no tools")
    assert said.strip() or left["output"].size(1) > len(ids)
    for (parameter, one), other in zip(
        sorted(trainer.model.state_dict().items()), sorted_values(left["model"], trainer), strict=True
    ):
        assert torch.equal(one, other), parameter
    if name == "a value head":
        assert torch.equal(left["value_head"].output.weight, trainer.critic.head.output.weight)


def sorted_values(model, trainer):
    """Parameters by name, with the value head, which is in a file of its own."""
    head = {name: value for name, value in trainer.model.state_dict().items() if "value_head" in name}
    return [value for _, value in sorted((head | model.state_dict()).items())]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("estimator", ["group", "gae"])
def test_the_code_of_a_card_runs_where_only_checkpoints_were_saved(base, tmp_path, lora, estimator):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 2}
    trainer = start(base, tmp_path, lora, advantage_estimator=estimator, **options)
    trainer.train()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f'from_pretrained("{tmp_path / "checkpoint-2"}")' in card.replace("base, ", "") and pasted(card)[1]
    trainer.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "checkpoint-2" not in "".join(code_of(card)) and pasted(card)[1]


def test_a_card_of_a_model_that_was_not_saved_says_so(base, tmp_path):
    trainer = start(base, tmp_path)
    trainer.train()
    assert "was not saved yet; `trainer.save_model()`" in (tmp_path / "README.md").read_text(encoding="utf-8")
    trainer.save_model()
    assert "was not saved yet" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_code_of_a_card_of_plain_prompts_runs(base, tmp_path):
    """A tokenizer without a chat template, and prompts that are texts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = start(tmp_path / "base", tmp_path / "out", lora=False, dataset=Dataset.from_dict({"prompt": ["a", "b"]}))
    trainer.train()
    trainer.save_model()
    left, _ = pasted((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert "messages" not in left and left["output"].size(1) > left["inputs"]["input_ids"].size(1)


@pytest.mark.parametrize("relative", [False, True])
def test_a_card_names_the_folder_it_is_in(base, tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    trainer = start(base, "runs/out" if relative else tmp_path / "runs" / "out", tools=[find])
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (Path("runs/out"), tmp_path / "final"):
        left, _ = pasted((folder / "README.md").read_text(encoding="utf-8"))
        assert "output" in left
    assert str(tmp_path / "final") in (tmp_path / "final" / "README.md").read_text()
    assert trainer.args.output_dir == ("runs/out" if relative else str(tmp_path / "runs" / "out"))


def test_options_of_the_base_model_are_in_the_code(base, tmp_path):
    trainer = start(base, tmp_path, tools=[find])
    assert f'PeftConfig.from_pretrained("{tmp_path}").base_model_name_or_path' in card_of(trainer)
    trainer.model.config._name_or_path, trainer.args.push_to_hub, trainer.hub_model_id = "you/base", True, "me/run"
    trainer.args.model_init_kwargs = {"revision": "abc", "trust_remote_code": True, "dtype": "float32"}
    card = card_of(trainer)
    assert 'from_pretrained("you/base", revision=\'abc\', trust_remote_code=True)' in card
    assert 'AutoTokenizer.from_pretrained("me/run", trust_remote_code=True)' in card
    compile("\n".join(code_of(card)), "card", "exec")


def test_a_multimodal_card_names_classes_that_exist(base, tmp_path):
    trainer = start(base, tmp_path, lora=False, tools=[find])
    trainer._is_vlm = True
    card = card_of(trainer)
    assert f'AutoProcessor.from_pretrained("{tmp_path}")' in card and "**inputs" in card
    compile("\n".join(code_of(card)), "card", "exec")
    for name in re.search(r"from transformers import (.*)", card)[1].split(", "):
        assert hasattr(transformers, name)


def test_the_card_of_a_run_without_tools_says_so(base, tmp_path):
    trainer = start(base, tmp_path)
    assert "## Tools\n\nNone.\n\n## Rewards" in card_of(trainer) and "Nothing was logged." in card_of(trainer)
    trainer.rollouts.tools.toolset.decided_at_reset = True
    assert "## Tools\n\nEach rollout had tools of its own" in card_of(trainer)


# The method


@pytest.mark.parametrize(
    ("changes", "papers"),
    [
        ({}, {"2402.03300", "2503.14476"}),
        ({"loss_type": "grpo"}, {"2402.03300"}),
        ({"loss_type": "dr_grpo"}, {"2402.03300", "2503.20783"}),
        ({"loss_type": "bnpo", "advantage_estimator": "gae"}, {"1506.02438", "1707.06347"}),
        ({"loss_type": "cispo", "advantage_estimator": "group_gae"}, {"2402.03300", "1506.02438", "2506.13585"}),
        ({"loss_type": "sapo"}, {"2402.03300", "2511.20347"}),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, {"2402.03300", "2503.14476", "2507.18071"}),
    ],
)
def test_the_card_cites_the_paper_of_each_method(base, tmp_path, changes, papers):
    trainer = start(base, tmp_path, **changes)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"huggingface.co/papers/([\d.]+)", card)) == papers
    assert "ToolGRPO" not in card and "trl_toolgrpo" in card and "method introduced in" not in card
    assert "Cite GRPO as:" in card and "Cite TRL as:" in card


# What was set


def configuration_of(card):
    return yaml.safe_load(re.search(r"What differs from the defaults:\n\n````yaml\n(.*?)\n````", card, re.DOTALL)[1])


BARE = {"use_cpu": True, "bf16": False}


@pytest.mark.parametrize("kind", [ToolGRPOConfig, GRPOConfig])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"report_to": "none"},
        {"report_to": [], "gradient_checkpointing": False},
        {"per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 4},
        {"eval_strategy": "steps", "logging_steps": 3, "load_best_model_at_end": True, "save_steps": 6},
        {"lr_scheduler_type": "cosine", "optim": "adamw_torch", "scale_rewards": False},
        {"scale_rewards": True, "loss_type": "dapo", "learning_rate": 1e-6, "num_generations": 8},
        {"model_init_kwargs": {"dtype": "float32"}, "chat_template_kwargs": {"enable_thinking": False}},
        {"fp16": False, "tf32": None, "dataloader_num_workers": 0, "max_steps": 3},
    ],
)
def test_the_card_lists_what_was_set_and_nothing_else(base, tmp_path, kind, changes):
    args = kind(str(tmp_path / "out"), **BARE, **changes)
    trainer = ToolGRPOTrainer(str(base), reward, args, prompts(8), prompts(8))
    trainer.create_model_card()
    found = configuration_of((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    usual = kind(str(tmp_path / "usual"), **BARE)
    expected = {name: value for name, value in {**BARE, **changes}.items() if not same(getattr(usual, name), value)}
    if changes.get("scale_rewards") is False:
        expected["scale_rewards"] = "none"
    assert found == expected | BARE


def same(usual, value):
    """Whether a value is that of a configuration in which nothing was set."""
    usual = getattr(usual, "value", usual)
    return usual == value or (value, usual) in [("none", []), (True, "group"), (None, "auto")]


def test_fields_changed_after_construction_are_listed(base, tmp_path):
    args = config(tmp_path)
    args.learning_rate, args.eval_on_start = 0.5, True
    trainer = ToolGRPOTrainer(str(base), reward, args, prompts(4), prompts(4))
    trainer.create_model_card()
    found = configuration_of((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert found["learning_rate"] == 0.5 and found["eval_on_start"] is True
    assert not set(found) & {"generation_batch_size", "steps_per_generation", "activation_checkpointing", "report_to"}
    again = ToolGRPOTrainer(str(base), reward, args, prompts(4), prompts(4))
    assert set(configuration_of(card_of(again))) == set(found)
    assert "_begun_with" not in json.dumps(args.to_dict(), default=str)


@pytest.mark.parametrize("kind", [ToolGRPOConfig, GRPOConfig])
def test_run_json_and_the_card_list_the_same_settings(base, tmp_path, kind):
    changes = {"accelerator_config": {"split_batches": False, "even_batches": False}, "learning_rate": 1e-4}
    args = kind(str(tmp_path), **BARE, report_to="none", max_steps=1, max_completion_length=4, **changes)
    ToolGRPOTrainer(str(base), reward, args, prompts(8)).train()
    settings = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["config"]
    assert settings.pop("output_dir") == str(tmp_path) and settings["accelerator_config"]["even_batches"] is False
    assert settings == configuration_of((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert set(settings) == {*BARE, *changes, "max_steps", "max_completion_length"}


def card_of(trainer):
    trainer.create_model_card()
    return (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")


# When it is written


def figures(folder, name):
    """First and last of a figure in a card."""
    row = re.search(rf"\| `{name}` \| (\S+) \| (\S+) \|", (folder / "README.md").read_text(encoding="utf-8"))
    return row and (float(row[1]), float(row[2]))


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
@pytest.mark.parametrize("saves", ["before", "after", "never"])
def test_the_card_includes_the_last_evaluation(base, tmp_path, save_strategy, saves):
    changes = {"save_strategy": save_strategy, "save_steps": 1, "eval_strategy": "no", "eval_on_start": True}
    trainer = start(base, tmp_path, eval_dataset=prompts(4), max_steps=2, learning_rate=0.1, **changes)
    trainer.train()
    started = trainer.state.log_history[0]["eval_reward"]
    assert figures(tmp_path, "eval_reward") == pytest.approx((started, started), rel=1e-3)
    assert figures(tmp_path, "reward") is not None
    if saves == "before":
        trainer.save_model()
    ended = trainer.evaluate()["eval_reward"]
    if saves == "after":
        trainer.save_model()
    assert abs(ended - started) > 0.1, "for the test to see which it is"
    assert figures(tmp_path, "eval_reward") == pytest.approx((started, ended), rel=1e-3)


def test_an_evaluation_without_training_writes_no_card(base, tmp_path):
    start(base, tmp_path / "out", eval_dataset=prompts(4)).evaluate()
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("save_strategy", ["no", "steps"])
@pytest.mark.parametrize("page", ["# My project\n\nIt uses trl_toolgrpo.\n", "---\ntitle: mine\n---\n\xe9 page\n"])
def test_a_readme_that_is_no_card_is_left_alone(base, tmp_path, caplog, lora, save_strategy, page):
    file = tmp_path / "README.md"
    file.write_bytes(page.encode("latin-1"))
    trainer = start(base, tmp_path, lora, save_strategy=save_strategy, save_steps=1, eval_dataset=prompts(4))
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    trainer.save_model(str(tmp_path))
    trainer.create_model_card()
    start(base, tmp_path, lora).train()  # which moves the run before
    assert file.read_bytes() == page.encode("latin-1") and caplog.text.count("is there, and is none") == 2
    assert not list(tmp_path.glob("earlier-run-1/README.md"))


def test_a_card_that_cannot_be_written_does_not_end_the_run(base, tmp_path, caplog, monkeypatch):
    trainer = start(base, tmp_path)
    monkeypatch.setattr(trainer, "_card_facts", lambda *args: 1 / 0)
    trainer.train()
    assert trainer.state.global_step == 1 and "The model card could not be written" in caplog.text
    assert "ZeroDivisionError" in caplog.text


# Curves that are flat


def test_a_curve_that_only_rounding_moves_is_flat():
    noise = [1.0, 1 + 1e-7, 1 - 1e-7, 1.0, 1 + 2e-7]
    assert bars(noise) == "▁" * 5
    assert bars([9e-8, 2e-7, 1e-7], metric="ratio/std") == "▁" * 3
    assert bars([1e-6, 5e-7, 0.0], metric="learning_rate") == "█▅▁"
    assert bars([1.0, 1.001, 1.002]) == "▁▄█" and bars([1e5, 1e5 + 0.01]) == "▁▁"
    log = [{"step": step, "ratio/mean": x, "ratio/std": abs(x - 1), "reward": step} for step, x in enumerate(noise)]
    rows = {row[0]: row[-1] for row in curves(log)}
    assert rows["`ratio/mean`"] == rows["`ratio/std`"] == "▁" * 5
    assert rows["`reward`"][0] == "▁" and rows["`reward`"][-1] == "█"

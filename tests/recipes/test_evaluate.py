"""Evaluation: intervals by hand, the command line on real rollouts, and the leaderboard's tasks of several turns."""

import ast
import json
import sys

import pytest
import torch
from conftest import ScriptedSampler, chat_tokenizer, tiny_model, tool_call
from peft import LoraConfig, get_peft_model

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.recipes import evaluate
from trl_toolgrpo.recipes.bfcl import multi_turn as bfcl_multi_turn
from trl_toolgrpo.recipes.bfcl.multi_turn import MultiTurn, MultiTurnEnvironment, check, open_world
from trl_toolgrpo.recipes.bfcl.task import BFCLEnvironment, build_bfcl, functions_of, identifier, judge
from trl_toolgrpo.recipes.evaluation.results import Rate, RunSettings, TaskResult, wilson
from trl_toolgrpo.recipes.task import Verdict


@pytest.fixture(scope="module")
def tasks():
    """Return all tasks of `multi_turn_base`, with their calls."""
    pytest.importorskip("bfcl_eval")
    return bfcl_multi_turn.read_questions(None, "multi_turn_base")


@pytest.mark.parametrize(
    ("successes", "questions", "low", "high"),
    [
        (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)  # fmt: skip
def test_wilson_intervals_by_hand(successes, questions, low, high):
    """The last case is the worked example of Newcombe (1998), to its four digits."""
    assert wilson(successes, questions) == pytest.approx((low, high), abs=5e-5)


def test_results_count_each_row_once():
    right, wrong = Verdict(True, 1.0, True), Verdict(False, 0.2, True)
    result = TaskResult.of("t", [("a", 1, right), ("b", 1, wrong), ("c", 2, wrong), ("a", 1, wrong)])
    assert (result.success.successes, result.success.questions) == (1, 3) and result.valid_calls.rate == 1.0
    assert result.by_difficulty[1] == Rate.of([True, False]) and result.by_difficulty[2].rate == 0.0
    assert result.outcomes == {"a": True, "b": False, "c": False}


def test_settings_of_a_run_are_kept(tmp_path):
    settings = RunSettings(task="bfcl", held_out_size=3, temperature=0.8)
    settings.save(tmp_path)
    given = evaluate.parse_arguments(["--model", str(tmp_path)])
    assert evaluate.settings_of(given) == settings
    (tmp_path / "checkpoint-3").mkdir()
    given = evaluate.parse_arguments(["--model", str(tmp_path / "checkpoint-3")])
    assert evaluate.settings_of(given) == settings
    given = evaluate.parse_arguments(["--model", str(tmp_path), "--limit", "5", "--temperature", "1.5"])
    assert evaluate.settings_of(given) == RunSettings(task="bfcl", held_out_size=5, temperature=1.5)
    assert evaluate.settings_of(evaluate.parse_arguments(["--model", "a/b"])) == RunSettings()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save a base model and an adapter for it."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), chat_tokenizer()
    model = tiny_model(tokenizer, max_position_embeddings=2**18)  # a token is a byte or two
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.config._name_or_path = model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("kind", "tasks"), [("base", ["workspace", "simple_python"]), ("adapter", ["multiple"])]
)
def test_the_command_line(folders, tmp_path, monkeypatch, capsys, kind, tasks):
    pytest.importorskip("bfcl_eval")
    flags = ["--limit", "3", "--max_completion_length", "24", "--output", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(folders / kind), "--task", *tasks, *flags])
    evaluate.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert [result["task"] for result in found["results"]] == tasks
    for result in found["results"]:
        assert result["success"]["questions"] == 3 == len(result["outcomes"]) and result["success"]["rate"] == 0.0
        assert sum(rate["questions"] for rate in result["by_difficulty"].values()) == 3
    text = capsys.readouterr().out
    assert tasks[-1] in text and "0.000 [0.000, 0.561]" in text


def test_a_run_on_a_task_without_evaluation_is_refused(folders, tmp_path, monkeypatch):
    RunSettings(task="mcp").save(tmp_path)
    for file in (folders / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(tmp_path)])
    with pytest.raises(ValueError, match="trained on 'mcp'"):
        evaluate.main()


def test_multiple_requires_the_right_function():
    pytest.importorskip("bfcl_eval")
    task = build_bfcl(0, 200, category="multiple")
    assert set(task.held_out["difficulty"]) == {2, 3, 4}
    row = next(row for row in task.held_out if row["row_id"] == "multiple_0")
    environment = BFCLEnvironment()
    environment.reset(**row)
    assert {tool.name for tool in environment.tools} == set(functions_of(row["function"]))
    tools = {tool.name: tool for tool in environment.tools}
    call = {"role": "assistant", "tool_calls": [{}]}
    assert judge([], environment, row) == Verdict(False, 0.0, False)
    assert tools["triangle_properties_get"].function(side1=5, side2=4, side3=3) == "Done."
    assert judge([call], environment, row).success
    environment.reset(**row)
    tools = {tool.name: tool for tool in environment.tools}
    tools["circle_properties_get"].function(radius=5)
    assert judge([call], environment, row) == Verdict(False, 0.2, True)
    assert identifier("a.b") == "a_b"


# Turn by turn


def as_arguments(call, world):
    """Return a published call as a tool and keyword arguments, as a policy makes it."""
    (node,) = ast.parse(call).body
    tool = next(tool for tool in world.tools if tool.name == node.value.func.id)
    names = list(tool.parameters["properties"])
    positional = {name: ast.literal_eval(value) for name, value in zip(names, node.value.args, strict=False)}
    return tool, {**positional, **{k.arg: ast.literal_eval(k.value) for k in node.value.keywords}}


def play(world, corrupt=None):
    """Make the published calls in a world, and return whether they solve its task. `corrupt` leaves out those of the
    last turn that has some, or changes all arguments."""
    environment = MultiTurnEnvironment({world.entry["id"]: world})
    last = max(turn for turn, calls in enumerate(world.truth) if calls)
    for turn, calls in enumerate(world.truth):
        environment.reset(world.entry["id"], turn)
        for call in calls:
            if corrupt == "missing" and turn == last:
                continue
            tool, arguments = as_arguments(call, world)
            if corrupt == "wrong":
                arguments = {name: _other(value) for name, value in arguments.items()}
            try:
                tool.function(**arguments)
            except Exception as error:  # some published calls fail in their world, and must fail
                assert not isinstance(error, (NameError, AttributeError)), call
    return check(world)


def _other(value):
    return value + 1 if isinstance(value, (int, float)) else f"{value}x" if isinstance(value, str) else value


def test_published_calls_solve_every_task(tasks):
    assert len(tasks) == 200
    failed = [entry["id"] for entry, answer in tasks if not play(open_world(entry, answer["ground_truth"]))]
    assert failed == []


@pytest.mark.parametrize(("corrupt", "solved"), [("missing", []), ("wrong", ["multi_turn_base_139"])])
def test_corrupted_calls_solve_none(tasks, corrupt, solved):
    """The exception is a task whose published call fails in its world, as any other call does."""
    worlds = [open_world(entry, answer["ground_truth"]) for entry, answer in tasks]
    assert [world.entry["id"] for world in worlds if play(world, corrupt)] == solved


def test_no_world_of_the_checker_is_kept(tasks):
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils

    entry, answer = tasks[0]
    before = set(vars(multi_turn_utils))
    assert play(open_world(entry, answer["ground_truth"]))
    assert set(vars(multi_turn_utils)) == before


class Player(ScriptedSampler):
    """Writes the published calls of the turn that each prompt ends with, one call a message, or all but the last."""

    def __init__(self, tokenizer, worlds, right, stop_ids):
        super().__init__(tokenizer, [], stop_ids)
        self.worlds, self.right = worlds, right

    def open(self, prompts, max_length):
        self.script = [self.texts(self.tokenizer.decode(ids)) for ids in prompts]
        return super().open(prompts, max_length)

    def texts(self, prompt):
        asked = [
            (prompt.rfind(messages[-1]["content"]), row_id, turn)
            for row_id, world in self.worlds.items()
            for turn, messages in enumerate(world.entry["question"])
        ]
        _, row_id, turn = max(asked)
        world = self.worlds[row_id]
        calls = [as_arguments(call, world) for call in world.truth[turn]]
        texts = [f"{tool_call(tool.name, **arguments)}<|im_end|>" for tool, arguments in calls]
        return [*(texts if self.right else texts[:-1]), "Done.<|im_end|>"]


@pytest.mark.parametrize("right", [True, False])
def test_rollouts_of_turns_are_judged_by_their_calls(tasks, folders, monkeypatch, right):
    """The trainer makes a rollout for each turn, on the conversation so far. Every task is solved, or none."""

    def unscored(self, model, input_ids, attention_mask, width, *args, **kwargs):
        return torch.zeros(len(input_ids), width), torch.zeros(len(input_ids), width), None

    run, tokenizer = MultiTurn(3), chat_tokenizer()
    monkeypatch.setattr(
        "trl_toolgrpo.rollout.engine.make_sampler",
        lambda policy, supported, stop_ids, **options: Player(tokenizer, run.worlds, right, stop_ids),
    )
    monkeypatch.setattr(ToolGRPOTrainer, "_get_per_token_logps_and_entropies", unscored)
    monkeypatch.setattr(evaluate, "MultiTurn", lambda size, seed: run)
    given = evaluate.parse_arguments(["--model", "x", "--batch_size", "8"])
    settings = RunSettings(held_out_size=3, max_completion_length=8000, max_tool_calling_iterations=30)
    policy, tokenizer = evaluate.load_policy(str(folders / "base"), "float32")
    result = evaluate.evaluate("multi_turn_base", policy, tokenizer, settings, given)
    assert result.success.questions == 3 and result.success.rate == float(right)
    assert set(result.by_difficulty) == {len(world.entry["question"]) for world in run.worlds.values()}
    for world in run.worlds.values():  # every turn was asked
        users = [message["content"] for message in world.history if message["role"] == "user"]
        assert users == [messages[-1]["content"] for messages in world.entry["question"]]

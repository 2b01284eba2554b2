"""The workspace task: its database, its questions and its judge, with answers worked out by hand."""

import json
import random
import sqlite3
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState
from trl.chat_template_utils import get_training_chat_template

from trl_toolgrpo.recipes.evaluation.scoreboard import Rates, Scoreboard, comparison, success_rates
from trl_toolgrpo.recipes.models.tiny_qwen3 import build_tokenizer, workspace_tools
from trl_toolgrpo.recipes.models.warm_start import batches_by_length, encode
from trl_toolgrpo.recipes.task import Verdict, final_answer
from trl_toolgrpo.recipes.workspace.demonstrations import demonstrate
from trl_toolgrpo.recipes.workspace.environment import WorkspaceEnvironment
from trl_toolgrpo.recipes.workspace.task import answers, build_workspace, judge
from trl_toolgrpo.tools.from_callable import environment_tools


EMPLOYEES = [
    {"employee_id": 101, "name": "Ada Chen", "salary": 52000, "manager_id": 103},
    {"employee_id": 102, "name": "Hugo Lund", "salary": 48000, "manager_id": 101},
    {"employee_id": 103, "name": "Mira Holt", "salary": 91000, "manager_id": 101},
]
ID = {
    "employees": EMPLOYEES,
    "subject": "Ada Chen",
    "answer": "101",
    "plan": [["find_employee", {"name": "Ada Chen"}]],
}
SLACK = {
    "employees": EMPLOYEES,
    "subject": "Ada Chen",
    "answer": "52000",
    "plan": [
        ["find_employee", {"name": "Ada Chen"}],
        ["get_salary", {"employee_id": 101}],
        ["send_slack_message", {"recipient": "Hugo Lund", "text": "52000"}],
    ],
}


@pytest.fixture
def workspace():
    environment = WorkspaceEnvironment()
    environment.reset(EMPLOYEES, prompt=[], difficulty=1)
    return environment


def verdict(environment, row, answer):
    """Judge a rollout that ends with this answer, or for None with a tool message."""
    last = {"role": "tool", "content": "x"} if answer is None else {"role": "assistant", "content": answer}
    return judge([last], environment, {**row, "plan": json.dumps(row["plan"])})


def test_tools_read_the_database(workspace):
    assert workspace.find_employee("Ada Chen") == {"employee_id": 101}
    assert workspace.get_salary(102) == {"salary": 48000}
    assert workspace.get_manager(101) == {"manager_id": 103, "name": "Mira Holt"}
    assert workspace.calls == [
        ("find_employee", {"name": "Ada Chen"}),
        ("get_salary", {"employee_id": 102}),
        ("get_manager", {"employee_id": 101}),
    ]


def test_sending_writes_the_database(workspace):
    assert workspace.send_slack_message("Hugo Lund", "52000") == {"sent": True}
    assert workspace.send_slack_message("Mira Holt", "hi") == {"sent": True}
    stored = workspace._database.execute("SELECT recipient_id, text FROM messages ORDER BY message_id").fetchall()
    assert stored == [(102, "52000"), (103, "hi")]
    assert workspace.outbox == [("Hugo Lund", "52000"), ("Mira Holt", "hi")]


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("find_employee", ["Ada"], "no employee is named 'Ada'"),
        ("get_salary", [7], "no employee has id 7"),
        ("get_manager", [7], "no employee has id 7"),
        ("send_slack_message", ["Ada", "x"], "no employee is named 'Ada'"),
        ("find_employee", ["' OR 1=1 --"], "no employee is named"),
    ],
)
def test_a_failed_lookup_is_an_error_and_not_recorded(workspace, call, arguments, message):
    with pytest.raises(LookupError, match=message):
        getattr(workspace, call)(*arguments)
    assert workspace.calls == [] and workspace.outbox == []


def test_reset_opens_a_fresh_database(workspace):
    workspace.find_employee("Ada Chen")
    workspace.send_slack_message("Ada Chen", "x")
    workspace.reset(EMPLOYEES[1:])
    assert workspace.calls == [] and workspace.outbox == []
    assert isinstance(workspace._database, sqlite3.Connection)
    assert workspace._database.execute("SELECT count(*) FROM messages").fetchone() == (0,)
    with pytest.raises(LookupError):
        workspace.find_employee("Ada Chen")
    with pytest.raises(RuntimeError, match=r"Call reset\(\) first"):
        WorkspaceEnvironment().find_employee("Ada Chen")


def test_a_message_is_part_of_the_success(workspace):
    workspace.find_employee("Ada Chen")
    workspace.get_salary(101)
    assert verdict(workspace, SLACK, "52000") == Verdict(False, pytest.approx(0.5 * 2 / 3), True)  # nothing was sent
    workspace.send_slack_message("Hugo Lund", "52000")
    assert verdict(workspace, SLACK, "52000") == Verdict(True, 1.0, True)
    assert verdict(workspace, SLACK, "48000") == Verdict(False, 0.5, True)
    assert verdict(workspace, SLACK, None) == Verdict(False, 0.5, True)
    workspace.send_slack_message("Hugo Lund", "52000")
    assert verdict(workspace, SLACK, "52000") == Verdict(False, 0.5, True)  # sent twice


def test_a_message_to_the_wrong_person_is_a_failure(workspace):
    workspace.send_slack_message("Mira Holt", "52000")
    assert verdict(workspace, SLACK, "52000") == Verdict(False, 0.0, True)
    workspace.find_employee("Ada Chen")
    assert verdict(workspace, ID, "101") == Verdict(False, 0.5, True)  # none was asked for


def test_progress_counts_the_dependent_calls_in_order(workspace):
    assert verdict(workspace, SLACK, "").reward == 0.0
    workspace.get_salary(101)  # before the look-up it depends on
    assert verdict(workspace, SLACK, "").reward == 0.0
    workspace.find_employee("Ada Chen")
    assert verdict(workspace, SLACK, "").reward == pytest.approx(0.5 / 3)


def test_turn_rewards_and_final_reward_add_up():
    environment = WorkspaceEnvironment(turn_rewards=True)
    environment.reset(EMPLOYEES, json.dumps(SLACK["plan"]))
    earned = []
    for call, arguments in [("get_salary", (101,)), ("find_employee", ("Ada Chen",)), ("find_employee", ("Ada Chen",)),
                            ("get_salary", (101,)), ("send_slack_message", ("Hugo Lund", "52000"))]:  # fmt: skip
        getattr(environment, call)(*arguments)
        earned.append(environment.turn_reward)
        environment.turn_reward = None  # as the trainer does
    share = pytest.approx(0.5 / 3)
    assert earned == [None, share, None, share, share] and environment.rewarded == pytest.approx(0.5)
    assert verdict(environment, SLACK, "52000") == Verdict(True, pytest.approx(0.5), True)
    assert verdict(environment, SLACK, "48000") == Verdict(False, pytest.approx(0.0), True)
    environment.reset(EMPLOYEES, json.dumps(SLACK["plan"]))
    assert environment.rewarded == 0.0
    environment.find_employee("Ada Chen")
    assert verdict(environment, SLACK, None).reward == pytest.approx(0.0)
    environment.get_salary(101)  # two calls in one turn
    assert environment.turn_reward == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("52000", "52000", True),
        ("The salary of Ada Chen is $52,000.", "52000", True),
        ("52000 or 48000", "52000", False),
        ("520000", "52000", False),
        ("", "52000", False),
        ("Mira Holt", "Mira Holt", True),
        ("Ada Chen's manager is Mira Holt.", "Mira Holt", True),
        ("Mira Holt or Hugo Lund", "Mira Holt", False),
        ("Mira", "Mira Holt", False),
    ],
)
def test_answers_by_hand(text, expected, right):
    assert answers(text, expected, EMPLOYEES, "Ada Chen") is right


def test_final_answer():
    call = {"role": "assistant", "content": "101", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert final_answer([{"role": "assistant", "content": "101"}]) == "101"
    assert final_answer([{"role": "assistant", "content": "101"}, {"role": "tool", "content": "5"}]) == ""
    assert final_answer([call]) == final_answer([]) == final_answer([{"role": "assistant", "content": None}]) == ""


def test_questions_are_seeded_and_the_splits_share_nothing():
    task, again, other = build_workspace(200, 100, 0), build_workspace(200, 100, 0), build_workspace(200, 100, 1)
    assert task.train.to_list() == again.train.to_list() != other.train.to_list()
    values = {
        name: {
            field: {person[field] for row in split for person in row["employees"]}
            for field in ("employee_id", "name", "salary")
        }
        for name, split in (("train", task.train), ("held_out", task.held_out), ("other", other.held_out))
    }
    for field in ("employee_id", "name", "salary"):
        assert not values["train"][field] & (values["held_out"][field] | values["other"][field])
    assert set(task.train["split"]) == {"train"} and set(task.held_out["split"]) == {"held_out"}
    assert len(set(task.train["row_id"])) == 200
    assert {row["kind"]: row["difficulty"] for row in task.train} == {
        "employee_id": 1,
        "salary": 2,
        "manager": 2,
        "manager_salary": 3,
        "slack_salary": 3,
    }


def test_every_question_needs_its_whole_plan():
    for row in build_workspace(60, 0).train:
        plan = json.loads(row["plan"])
        assert len(plan) == row["difficulty"]
        environment = WorkspaceEnvironment()
        environment.reset(**row)
        values = [row["prompt"][-1]["content"]]  # all that is known so far
        for name, arguments in plan:
            assert all(str(value) in " ".join(values) for value in arguments.values())
            values.append(json.dumps(getattr(environment, name)(**arguments)))
        assert row["answer"] in " ".join(values) and row["answer"] not in " ".join(values[: min(len(plan), 2)])
        assert judge([{"role": "assistant", "content": row["answer"]}], environment, row) == Verdict(True, 1.0, True)


def test_difficulty_selects_questions():
    task = build_workspace(6, 4, difficulty=3)
    assert {row["kind"] for row in [*task.train, *task.held_out]} == {"manager_salary", "slack_salary"}
    with pytest.raises(ValueError, match="difficulty 4, but there are only those of difficulty 1, 2, 3"):
        build_workspace(1, 1, difficulty=4)


def test_the_public_methods_are_the_tools():
    tools = environment_tools(WorkspaceEnvironment())
    assert [tool.name for tool in tools] == ["find_employee", "get_manager", "get_salary", "send_slack_message"]


def test_demonstrations_are_right_unless_they_slip():
    rows = list(build_workspace(100, 0).train)
    for slip_rate, share in ((0.0, 1.0), (1.0, 0.2)):  # always slipping, only one call is made
        successes = []
        for row in rows:
            messages = demonstrate(row, slip_rate)
            environment = WorkspaceEnvironment()
            environment.reset(**row)
            for call in [call for message in messages for call in message.get("tool_calls", [])]:
                getattr(environment, call["function"]["name"])(**call["function"]["arguments"])
            successes.append(judge(messages, environment, row).success)
        assert sum(successes) / len(rows) == share
    assert demonstrate(rows[4], 0.5, seed=1) == demonstrate(rows[4], 0.5, seed=1)


def test_a_mistyped_id_belongs_to_nobody_and_is_corrected_after_the_error():
    for row in build_workspace(40, 0).train:
        messages = demonstrate(row, slip_rate=0.0, mistype_rate=1.0)
        environment = WorkspaceEnvironment()
        environment.reset(**row)
        wrong = [i for i, message in enumerate(messages) if message.get("imitate") is False]
        plan = json.loads(row["plan"])
        assert len(wrong) == sum("employee_id" in arguments for _, arguments in plan)
        for i in wrong:
            (mistyped,), (corrected,) = (messages[k]["tool_calls"] for k in (i, i + 2))
            wrong_id, right_id = (call["function"]["arguments"]["employee_id"] for call in (mistyped, corrected))
            assert mistyped["function"]["name"] == corrected["function"]["name"]
            assert 1000 <= wrong_id <= 9999
            assert (wrong_id // 100 == right_id // 100) != (wrong_id % 100 == right_id % 100)
            assert json.loads(messages[i + 1]["content"]) == {"error": f"no employee has id {wrong_id}"}
        for call in [call for message in messages for call in message.get("tool_calls", ())]:
            arguments = call["function"]["arguments"]
            if [call["function"]["name"], arguments] in plan:
                getattr(environment, call["function"]["name"])(**arguments)
        assert judge(messages, environment, row).success


def test_only_imitated_tokens_are_targets():
    """These are what the assistant writes and the end of its turns, without the mistyped calls."""
    row = next(row for row in build_workspace(20, 0).train if row["kind"] == "manager_salary")
    messages = demonstrate(row, slip_rate=0.0, mistype_rate=1.0)
    tools = workspace_tools()
    tokenizer = build_tokenizer([messages], tools, 1200)
    ((input_ids, labels),) = encode(tokenizer, [messages], tools)
    template = get_training_chat_template(tokenizer)
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, chat_template=template)
    assert tokenizer.decode(input_ids) == text
    learned = labels != -100
    assert torch.equal(labels[learned], input_ids[learned])
    spoken = [message for message in messages if message["role"] == "assistant" and message.get("imitate", True)]
    calls = [call["function"] for message in spoken for call in message.get("tool_calls", ())]
    expected = "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>" for call in calls)
    expected += f"{row['answer']}<|im_end|>"
    said = tokenizer.decode(labels[learned]).replace("<|im_end|>\n", "<|im_end|>")
    assert said.replace("<think>\n\n</think>\n\n", "") == expected
    assert len(calls) == 3


def test_batches_have_similar_lengths_and_a_pass_yields_each_example_once():
    lengths = [3 * i % 41 + 1 for i in range(80)]
    examples = [(torch.zeros(length), torch.full((length,), i)) for i, length in enumerate(lengths)]
    batches = batches_by_length(examples, 4, random.Random(0))
    first, second = ([next(batches) for _ in range(20)] for _ in range(2))
    for batches_of_a_pass in (first, second):
        seen = sorted(int(labels[0]) for batch in batches_of_a_pass for _, labels in batch)
        assert seen == list(range(80))
    spread = [max(len(ids) for ids, _ in batch) - min(len(ids) for ids, _ in batch) for batch in first]
    assert sum(spread) / len(spread) < 8  # by chance, four of 1 to 41 lie 25 apart
    assert [len(batch) for batch in first] == [4] * 20
    with pytest.raises(ValueError, match="batch of 4 cannot be drawn from 3"):
        next(batches_by_length(examples[:3], 4, random.Random(0)))


def test_scoreboard_rewards_records_and_reports(tmp_path):
    task = build_workspace(5, 5)
    logged, args = {}, SimpleNamespace(output_dir=tmp_path)
    scoreboard = Scoreboard(task)

    def score(rows, right):
        environments, completions = [], []
        for row, good in zip(rows, right, strict=True):
            environments.append(WorkspaceEnvironment())
            environments[-1].reset(**row)
            for name, arguments in json.loads(row["plan"]):
                getattr(environments[-1], name)(**arguments)
            completions.append([{"role": "assistant", "content": row["answer"] if good else "no"}])
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        return scoreboard(
            prompts=[row["prompt"] for row in rows],
            completions=completions,
            environments=environments,
            log_metric=logged.__setitem__,
            trainer_state=object(),
            **columns,
        )

    assert score(list(task.train), [True, False, True, True, False]) == [1.0, 0.5, 1.0, 1.0, 0.5]
    assert logged == {"success": 0.6, "valid_calls": 1.0}
    assert scoreboard.sample[2] == Verdict(True, 1.0, True)
    scoreboard.on_evaluate(args, TrainerState(), None)
    assert scoreboard.evaluations == []  # training rollouts are not recorded
    score(list(task.held_out), [True, False, True, True, False])
    scoreboard.on_evaluate(args, TrainerState(global_step=0), None)
    score(list(task.held_out), [True] * 5)
    scoreboard.on_evaluate(args, TrainerState(global_step=4), None)
    before, after = scoreboard.evaluations
    assert before == Rates(0.6, {1: 1.0, 2: 0.5, 3: 0.5}, 1.0, 0)
    assert after == Rates(1.0, {1: 1.0, 2: 1.0, 3: 1.0}, 1.0, 4)
    assert comparison(before, after).splitlines() == [
        "difficulty 1: 1.00 -> 1.00",
        "difficulty 2: 0.50 -> 1.00",
        "difficulty 3: 0.50 -> 1.00",
        "held-out success: 0.60 -> 1.00",
    ]


def test_an_assisted_run_also_reports_its_stages():
    before, assisted, after = Rates(0.0, {1: 0.0}, 0.1), Rates(0.25, {1: 0.25}, 0.9), Rates(0.5, {1: 0.5}, 1.0)
    assert comparison(before, after, assisted).splitlines() == [
        "difficulty 1: 0.00 -> 0.50",
        "held-out success: 0.00 -> 0.50",
        "valid-call rate: 0.10 -> 0.90 -> 1.00",
        "accuracy: 0.00 -> 0.25 -> 0.50",
    ]


def test_an_evaluation_ends_the_assisted_warm_up():
    scoreboard = Scoreboard(build_workspace(5, 5))
    for replay, expected in ((None, [False, False, True, False]), ("a folder", [False] * 4)):
        args, asked = SimpleNamespace(assist_warmup_steps=3, replay=replay), []
        for step in range(1, 5):
            control = TrainerControl()
            scoreboard.on_step_end(args, TrainerState(global_step=step), control)
            asked.append(control.should_evaluate)
        assert asked == expected


def test_a_row_that_two_processes_scored_counts_once():
    right, called, silent = Verdict(True, 1.0, True), Verdict(False, 0.2, True), Verdict(False, 0.0, False)
    rates = success_rates([("a", 1, right), ("b", 2, silent), ("c", 2, right), ("a", 1, called)], 7)
    assert rates == Rates(pytest.approx(2 / 3), {1: 1.0, 2: 0.5}, pytest.approx(2 / 3), 7)

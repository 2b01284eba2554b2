"""The MCP recipe: its questions, its judge, and its demonstrations compared with the real servers."""

import itertools
import sqlite3
import sys
from pathlib import Path

import pytest
import yaml
from mcp_runs import Run


RECIPES = Path(__file__).parents[2] / "recipes"
SERVERS = RECIPES.parent / "outputs" / "servers"
from trl_toolgrpo import ToolResult
from trl_toolgrpo.recipes.arguments import parse_arguments
from trl_toolgrpo.recipes.mcp_company import demonstrations
from trl_toolgrpo.recipes.mcp_company import task as mcp_task
from trl_toolgrpo.recipes.mcp_company.servers import make_environment, resolve_servers
from trl_toolgrpo.tools.mcp.config import read_servers


RECIPE = yaml.safe_load((RECIPES / "mcp.yaml").read_text())


class Servers:
    """Answers as the servers would, from a database."""

    def __init__(self, folder):
        self.database = sqlite3.connect(folder / "company.db")
        self.database.row_factory = sqlite3.Row

    def call(self, tool, **arguments):
        if tool == "convert_time":
            return ToolResult(demonstrations.converted(**arguments))
        return ToolResult(str([dict(row) for row in self.database.execute(arguments["query"])]))


def play(conversation, servers):
    """Make the calls of a demonstration, check the answers, and return the messages after the prompt."""
    for message, answer in itertools.pairwise(conversation):
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if function["name"] == "write_query" and isinstance(servers, Servers):
                servers.database.execute(function["arguments"]["query"])
            else:
                assert servers.call(function["name"], **function["arguments"]).content == answer["content"]
    return conversation[2:]


def rows(kind, count=3):
    made = (mcp_task.make_row(f"train-{index}", 0) for index in range(1000))
    return [row for row in made if row["kind"] == kind][:count]


@pytest.mark.parametrize("kind", mcp_task.QUESTIONS)
def test_a_demonstration_without_a_slip_succeeds(tmp_path, kind):
    for row in rows(kind):
        servers = Servers(mcp_task.make_company(tmp_path))
        verdict = mcp_task.judge(play(demonstrations.demonstrate(row, 0.0), servers), servers, row)
        assert (verdict.success, verdict.reward, verdict.valid_call) == (True, 1.0, True)


def test_partial_success_earns_part_of_the_reward(tmp_path):
    row = rows("change")[0]
    servers = Servers(mcp_task.make_company(tmp_path))
    slip = mcp_task.judge(play(demonstrations.demonstrate(row, 1.0), servers), servers, row)
    assert (slip.success, round(slip.reward, 3)) == (False, 0.4)
    done = play(demonstrations.demonstrate(row, 0.0), servers)
    wrong = mcp_task.judge([*done[:-1], {"role": "assistant", "content": "1"}], servers, row)
    assert (wrong.success, round(wrong.reward, 3)) == (False, 0.3)
    assert mcp_task.judge([{"role": "assistant", "content": "1"}], servers, rows("time")[0]).reward == 0.0


def test_an_unrequested_change_of_the_database_is_no_success(tmp_path):
    row = rows("salary")[0]
    servers = Servers(mcp_task.make_company(tmp_path))
    servers.database.execute("UPDATE employees SET salary = 1 WHERE name != ?", [row["name"]])
    assert not mcp_task.judge(play(demonstrations.demonstrate(row, 0.0), servers), servers, row).success


def test_held_out_questions_are_about_people_of_their_own(tmp_path):
    task = mcp_task.build_mcp(200, 50, 0, tmp_path)
    asked = {split: {row["name"] for row in rows} for split, rows in (("a", task.train), ("b", task.held_out))}
    assert not asked["a"] & asked["b"] and len(task.train) == 200 and len(task.held_out) == 50
    assert task.train[0] == mcp_task.build_mcp(1, 1, 0, tmp_path).train[0]


def test_the_output_folder_is_inserted_into_server_settings(tmp_path):
    arguments = ["--config", str(RECIPES / "mcp.yaml"), "--output_dir", str(tmp_path / 'a "b"')]
    recipe, training, _ = parse_arguments(arguments, {})
    assert recipe.server_packages == RECIPE["server_packages"]
    (tmp_path / 'a "b"' / "company").mkdir(parents=True)
    sqlite, clock = read_servers(resolve_servers(recipe.mcp_servers, None, recipe.server_folder, training))
    assert sqlite.files == str(tmp_path / 'a "b"' / "company") and sqlite.per_rollout and not clock.per_rollout


def test_a_failed_install_is_an_error_that_quotes_pip(tmp_path, monkeypatch):
    monkeypatch.setattr("venv.create", lambda folder, with_pip: _python(folder))
    with pytest.raises(RuntimeError, match=r"pip could not install a\[:\n.*nvalid"):
        make_environment(tmp_path / "servers", ["a["])
    (tmp_path / "servers").mkdir(exist_ok=True)
    (tmp_path / "servers" / "packages.txt").write_text("a[")
    assert make_environment(tmp_path / "servers", ["a["]).name in ("bin", "Scripts")


def _python(folder):
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)


def real_servers(tmp_path, monkeypatch, command):
    """Return the recipe's servers, from the environment that it makes."""
    if (SERVERS / "packages.txt").is_file():
        monkeypatch.setenv("PATH", str(SERVERS / "bin"), prepend=":")
    elif command == "mcp-server-sqlite":
        pytest.skip(f"{SERVERS} is not there; `python -m trl_toolgrpo.recipes.mcp_company.servers` makes it")
    mcp_task.make_company(tmp_path / "company")
    text = yaml.safe_dump(RECIPE["mcp_servers"]).replace("{output_dir}", str(tmp_path))
    return [server for server in read_servers(yaml.safe_load(text)) if server.command == command]


@pytest.mark.parametrize("command", ["mcp-server-time", "mcp-server-sqlite"])
def test_the_real_servers_answer_as_the_demonstrations_say(tmp_path, monkeypatch, command):
    run = Run(*real_servers(tmp_path, monkeypatch, command), timeout=60.0)
    try:
        expected = demonstrations.demonstration_tools()
        described = {tool["function"]["name"]: tool["function"]["parameters"] for tool in expected}
        for tool in run.mcp.tools:
            assert list(tool.parameters["properties"]) == list(described[tool.name]["properties"])
        for kind in ["time"] if command == "mcp-server-time" else ["salary", "change"]:
            row, session = rows(kind, 1)[0], run.mcp.session()
            *messages, last = demonstrations.demonstrate(row, 0.0)[2:]
            calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
            told = [session.call(call["name"], **call["arguments"]) for call in calls]
            assert not any(result.is_error for result in told)
            if kind == "time":
                assert mcp_task.time_there(told[0].content) == last["content"]
            else:
                assert [result.content for result in told] == [m["content"] for m in messages if m["role"] == "tool"]
                assert mcp_task.judge([*messages, last], session, row).success
            run.mcp.take_back([session])
    finally:
        run.close()

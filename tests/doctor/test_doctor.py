"""The doctor: a healthy run is a go, and each fault is a no-go that names it."""

import sys
from pathlib import Path

import pytest
from families import ALL, family
from trl.chat_template_utils import add_response_schema

from trl_toolgrpo import DoctorError
from trl_toolgrpo.chat.tool_chat import ToolChat
from trl_toolgrpo.doctor import examine
from trl_toolgrpo.doctor.__main__ import main
from trl_toolgrpo.doctor.check_chat import check_chat, example_arguments
from trl_toolgrpo.doctor.load_script import find_script, output_folder
from trl_toolgrpo.doctor.machine import check_versions
from trl_toolgrpo.doctor.trial import describe
from trl_toolgrpo.rollout.trajectory import Trajectory, Turn
from trl_toolgrpo.tools.from_callable import as_tool


RECIPES = Path(__file__).parents[2] / "recipes"

# A user's own script; `fault` in the command line says what is wrong with it
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conftest import chat_tokenizer, config, prompts, tiny_model
from trl_toolgrpo import Tool, ToolGRPOTrainer

def add(a: int, b: int) -> int:
    '''Add.

    Args:
        a: one number.
        b: another.
    '''
    return a + b

def make_trainer(arguments):
    changes = dict(argument.lstrip("-").split("=") for argument in arguments if "=" in argument)
    fault = changes.pop("fault", "")
    tokenizer = chat_tokenizer()
    tools, data, options = [add], prompts(6), {{}}
    if fault == "template":
        tokenizer.chat_template = "{{{{ messages|length }}}}" + tokenizer.chat_template
    if fault == "schema":
        either = {{"type": "object", "properties": {{"a": {{"type": ["string", "integer"]}}}}}}
        tools = [Tool("either", "Takes one or the other.", either, lambda a: a)]
        tokenizer = chat_tokenizer("gemma4")
    if fault == "prompt":
        data = prompts(6, "long " * 400)
    if fault == "rewards":
        def reward(completions, **kwargs):
            raise OSError("the judge is not at home")
    else:
        def reward(completions, **kwargs):
            return [float(number) for number in range(len(completions))]
    if fault == "mention":
        data = prompts(6, "Use the tool `add_up`.")
    if fault == "sampling":
        options["top_k"] = 20
    if changes.pop("push_to_hub", None):
        options["push_to_hub"] = True
    if fault == "weights":
        options["logprob_check_tolerance"] = 1e-12
    if fault == "bug":
        return [][0]
    model = tiny_model(tokenizer, max_position_embeddings=2048)
    if fault == "frozen":
        model.requires_grad_(False)
    return ToolGRPOTrainer(
        model, reward, config({home!r}, **options), data, processing_class=tokenizer, tools=tools
    )
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "my_script.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), home=str(tmp_path / "out")))
    (tmp_path / "run.yaml").write_text("")
    yield path
    sys.modules.pop("my_script", None)
    sys.path.remove(str(tmp_path)) if str(tmp_path) in sys.path else None


def result_of(examination, subject):
    return next(result for result in examination.results if result.subject == subject)


def test_a_healthy_recipe_is_a_go(tmp_path, capsys):
    before = set(RECIPES.parent.iterdir())
    where = ["--output_dir", str(tmp_path / "out"), "--bf16", "false", "--use_cpu", "true"]
    fewer = ["--train_size", "40", "--held_out_size", "8", "--max_completion_length", "64"]
    assert main(["--config", str(RECIPES / "tiny_cpu.yaml"), *where, *fewer]) == 0
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1].startswith("go (")
    for words in ("versions", "hardware", "tools", "data: train_dataset", "self-check", "update", "memory"):
        assert words in said
    assert "mean little" in said
    assert "fault" not in said and "find_employee, get_manager" in said
    assert not (tmp_path / "out").exists() and set(RECIPES.parent.iterdir()) == before


def test_an_examination_creates_no_repository_on_the_hub(script, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: made.append(args))
    assert examine(script, ["--push_to_hub=1"]).go and not made


def test_a_users_own_script_is_a_go_and_every_check_has_a_result(script):
    examination = examine(script, [])
    assert examination.go, examination.faults
    subjects = [result.subject for result in examination.results]
    assert subjects == [
        "versions", "hardware", "configuration", "tools", "template: prefixes", "template: calls",
        "template: tool output", "data: train_dataset", "rollouts", "self-check", "update", "memory",
    ]  # fmt: skip
    assert "6 rows; prompts of" in result_of(examination, "data: train_dataset").message
    assert result_of(examination, "update").state == "ok" and result_of(examination, "self-check").state == "ok"
    assert "add. Their descriptions are" in result_of(examination, "tools").message


@pytest.mark.parametrize(
    "fault, subject, words, remedy",
    [
        ("template", "template", "template", "trl/chat_templates"),
        ("schema", "tools", "cannot render the tool 'either'", "Write the schema in words"),
        ("prompt", "data", "tools included, and the model 2048 positions", "Shorten the prompt"),
        ("sampling", "configuration", "top_k=20", "neutral value"),
        ("frozen", "configuration", "Nothing of the policy would be trained", "requires_grad_(True)"),
        ("weights", "self-check", "not those the trainer computes", "same weights"),
        ("rewards", "rollouts", "the judge is not at home", "training would end there too"),
        ("bug", "construction", "IndexError", "traceback"),
    ],
)
def test_a_fault_is_a_no_go_that_names_it(script, capsys, fault, subject, words, remedy):
    assert main(["--config", str(script.parent / "run.yaml"), f"--fault={fault}"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"no-go: {subject} (" in said
    examination = examine(script, [f"--fault={fault}"])
    assert [result.subject for result in examination.faults] == [subject]
    (found,) = examination.faults
    assert words in found.message and remedy in f"{found.message} {found.remedy}"


def test_the_table_holds_no_secret(script, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "judge is not")
    main(["--config", str(script.parent / "run.yaml"), "--fault=rewards", "--judge_key", "at home"])
    shown = capsys.readouterr().out
    assert "[secret]" in shown and "judge is not" not in shown and "at home" not in shown


def test_a_name_that_resembles_a_tool_is_noted_and_named_in_the_verdict(script, capsys):
    assert main(["--config", str(script.parent / "run.yaml"), "--fault=mention"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "go (" in said.splitlines()[-1] and ", with notes on: tools" in said
    assert said.count("names the tool `add_up`, which does not exist; did you mean `add`?") == 1
    result = result_of(examine(script, ["--fault=mention"]), "tools")
    assert result.state == "note" and "`add_up`" in result.message and "Correct the prompt" in result.remedy


def test_a_setting_the_recipe_refuses_is_a_no_go_before_anything_is_built(capsys):
    assert main(["--config", str(RECIPES / "tiny_cpu.yaml"), "--top_p", "0.9", "--bf16", "false"]) == 1
    said = capsys.readouterr().out
    assert "no-go: configuration" in said and "top_p=0.9" in said
    assert main(["--config", str(RECIPES / "tiny_cpu.yaml"), "--no_such_flag", "1"]) == 1
    assert "no-go: configuration" in capsys.readouterr().out


def test_the_script_is_the_one_next_to_the_yaml(script, tmp_path):
    assert find_script(tmp_path / "run.yaml") == script
    assert find_script(RECIPES / "bfcl.yaml") == RECIPES / "qwen3_tools.py"
    (tmp_path / "other.py").write_text("def make_trainer(arguments): ...")
    with pytest.raises(DoctorError, match=r"my_script.py, other.py"):
        find_script(tmp_path / "run.yaml")
    assert find_script(tmp_path / "run.yaml", tmp_path / "other.py") == tmp_path / "other.py"
    (tmp_path / "none.py").write_text("x = 1")
    with pytest.raises(DoctorError, match="has no function"):
        find_script(tmp_path / "run.yaml", tmp_path / "none.py")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.yaml").write_text("")
    with pytest.raises(DoctorError, match="there is none"):
        find_script(tmp_path / "empty" / "run.yaml")
    with pytest.raises(DoctorError, match="is no file"):
        find_script(tmp_path / "nothing.yaml")


def test_disk_space_is_checked_where_checkpoints_go(tmp_path):
    (tmp_path / "run.yaml").write_text("output_dir: outputs/here")
    given = ["--config", str(tmp_path / "run.yaml")]
    assert output_folder(given, "x") == Path("outputs/here")
    assert output_folder([*given, "--output_dir", "there"], "x") == Path("there")
    (tmp_path / "run.yaml").write_text("")
    assert output_folder(given, "x") == Path("x") == output_folder([], "x")


def test_a_yaml_without_a_script_is_a_no_go(tmp_path, capsys):
    assert main(["--config", str(tmp_path / "nothing.yaml")]) == 1
    assert "no-go" in capsys.readouterr().out


def test_every_template_of_trl_that_has_tools_can_carry_them():
    for name in ALL:
        answers = check_chat(family(name).chat, [as_tool(_noted)])
        assert [answer.state for answer in answers] == ["ok"] * 3, (name, answers)


def test_a_template_that_loses_calls_is_named(tokenizer):
    add_response_schema(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("</tool_call>", "</call>")
    chat = ToolChat(tokenizer, [tokenizer.eos_token_id])
    tool = as_tool(_noted)
    _, calls, output = check_chat(chat, [tool])
    assert calls.state == "fault" and "_noted({'text': 'a word'})" in calls.message
    assert output.state == "ok"


def _noted(text: str) -> str:
    """Note.

    Args:
        text: what.
    """
    return text


def test_arguments_fit_their_schema():
    properties = {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}, "c": {"anyOf": []}, "d": {"type": "boolean"}}
    assert example_arguments({"properties": properties}) == {"a": 7, "b": "x", "d": True}
    assert example_arguments({}) == {}


def test_a_version_that_does_not_fit_is_a_fault(monkeypatch):
    assert check_versions().state != "fault"
    needed = "trl_toolgrpo.doctor.machine.metadata.requires"
    monkeypatch.setattr(needed, lambda name: ["torch>=99", "no-such-package", "pytest; extra == 'test'"])
    result = check_versions()
    assert (
        result.state == "fault"
        and "torch is" in result.message
        and "no-such-package is not installed" in result.message
    )
    assert "pytest" not in result.message + result.remedy and "'torch>=99'" in result.remedy


def test_truncated_rollouts_and_missing_calls_are_noted():
    cut = Trajectory([1], [2], [-0.1], [1], [0], [Turn(0, 1, "length")], "length")
    ended = Trajectory([1], [2], [-0.1], [1], [0], [Turn(0, 1)], "stop")
    assert "Every one was cut off" in describe([cut, cut], 1.0).message
    assert "None called a tool" in describe([cut, ended], 1.0).message


def test_the_configuration_of_the_recipe_is_the_one_examined(tmp_path):
    sys.path.insert(0, str(RECIPES))
    from trl_toolgrpo.recipes.qwen3_tools import make_trainer

    with pytest.raises(ValueError, match="num_generations"):
        make_trainer(["--config", str(RECIPES / "tiny_cpu.yaml"), "--bf16", "false", "--num_generations", "1"])

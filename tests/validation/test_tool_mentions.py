"""Slips in the names of tools are found, and prose and code are left alone."""

import logging
import random
import time

import pytest
from conftest import add, config, prompts, tiny_model
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_toolgrpo import ConfigError, Tool, ToolGRPOTrainer
from trl_toolgrpo.errors import ToolNameError
from trl_toolgrpo.validation.tool_mentions import check_tool_columns, find_mentions


TOOLS = ["send_slack_message", "get_weather", "add", "github", "listFiles", "max", "and_then", "lookup"]
CODERS = [
    *("read_file", "run_tests", "search", "get_user", "python", "query_sql", "list_files", "file"),
    *("create_user", "fs.read"),
]


def found(text, tools=TOOLS, known=()):
    return [(mention.name, mention.tool) for mention in find_mentions([text], tools, known)]


@pytest.mark.parametrize(
    ("text", "name", "tool"),
    [
        ("Use slack_send_message to post it.", "slack_send_message", "send_slack_message"),
        ("- slack_send_message(text): posts", "slack_send_message", "send_slack_message"),
        ("call sendSlackMessage now", "sendSlackMessage", "send_slack_message"),
        ("call SlackSendMessage now", "SlackSendMessage", "send_slack_message"),
        ("call `send-slack-message`", "send-slack-message", "send_slack_message"),
        ("the weather is in get_wether", "get_wether", "get_weather"),
        ("call `getweather`", "getweather", "get_weather"),
        ("call getweathr(city)", "getweathr", "get_weather"),
        ("use list_files", "list_files", "listFiles"),
        ("look_up finds it", "look_up", "lookup"),
        ("Use the tool `lookup_key`.", "lookup_key", "lookup"),
        ("Use the lookup_key tool.", "lookup_key", "lookup"),
        ("You have the tools weather_report and `sum`", "weather_report", "get_weather"),
        ("The tool `send` posts", "send", "send_slack_message"),
        ("Call slack-send-message now.", "slack-send-message", "send_slack_message"),
        ("```\nslack_send_message(text='hi')\n```", "slack_send_message", "send_slack_message"),
        ('{"name": "slack_send_message", "arguments": {}}', "slack_send_message", "send_slack_message"),
        ("Call the function slack_send_message with a text.", "slack_send_message", "send_slack_message"),
        ("**weather_get** and <tool>get_weather</tool>", "weather_get", "get_weather"),
        ("Invoke weather_get, then add.", "weather_get", "get_weather"),
    ],
)
def test_slips_are_found_with_what_is_meant(text, name, tool):
    assert found(text) == [(name, tool)]


@pytest.mark.parametrize(
    "text",
    [
        "Please add the numbers, and then ad more.",
        "Weather and Slack: send the message, get weather.",
        "Search GitHub for it, or use GitHub with the GitHub tool.",
        "Add(s) and max(es)",
        "Use send_slack_message, `get_weather`, add(1, 2) and listFiles().",
        "Use client.send_slack_message(text) or `client.get_weather`.",
        "*_add_* and __send_slack_message__ in bold",
        "See https://example.com/slack_send_message?get_wether=1",
        "f(x) = g(x) + `a`",
        "Ends with send_slack_message.Then go on.",
        "well-known state-of-the-art",
        "use get_time and the_user",
        "",
    ],
)
def test_prose_and_right_names_do_not_fire(text):
    assert found(text) == [] == found(text, ["get_weather", "set_user_id", *TOOLS])


@pytest.mark.parametrize(
    "text",
    [
        "In Node, fs.readFile(path, callback) never calls back when the path is empty. Fix it.",
        "Replace ioutil.ReadFile by os.ReadFile in main.go.",
        "`runTest()` of our JUnit runner is flaky.",
        "def file_read(self): returns bytes, should return str.",
        "Read the `research` notes",
        "for path in read_files(paths): print(path.read())",
        "def get_users(db): return db.all()",
        "Write in Python(3.11), or in `Python`",
        "def run_test(name): pass",
        "func RunTests(t *testing.T) {}\nclass ReadFile: pass",
        "src/file_read.py and tests/tests_run.py are slow, READ_FILE=1 or --run-tests is set",
        "file_read.close(); $read_File; sql_query = connection.sql_query()",
        "getUserById(id), getUsers(), setUser(u), get_username, user_list, fileSearch",
        "search_results = searchIndex(query); file_path = os.path.join(root, file_name)",
        "Use list_models and create_user, call read() or use .run(); the handle calls read_files and run_test.",
        "self.tools = list(tools); row['tools'] = read(tool.file); class ListFiles(Base): return ReadFile(x)",
        "Click the `Search` button, then `Files`",
        "class UserCreate(BaseModel): id: int\nUserGet = UserCreate; ListFiles | RunTest",
        "A file-read of the tests-run, a user-get; with open(p) as f: f.read()",
        "export default function getUser(id) {}\nfunction readFile(path) {}",
        "GET /users?get_user=1&run_test=2 and USER_GET or `READ_FILES`",
        "Use read_files, `searched` and search_index; a file tool, the tool search; call get_user_by_id.",
        "useGetUser(), onReadFile, file_reader, reading_file, str_user, sql_queries, mysql_query",
    ],
)
def test_code_is_left_alone(text):
    assert found(text, CODERS) == []


def test_a_name_is_found_once_where_it_is_meant():
    texts = ["my_app.readFile(x)", "`readFile` and `readFile`", "call `readFile`"]
    mentions = list(find_mentions(texts, ["read_file"]))
    assert [(m.name, m.text, m.reordered) for m in mentions] == [("readFile", texts[1], False)]


def test_names_with_hyphens_and_dots_are_whole_where_tools_have_them():
    assert found("call slack-send(x), a well-known way", ["send_slack"]) == []
    assert found("call slack-send(x), a well-known way", ["send-slack"]) == [("slack-send", "send-slack")]
    assert found("use slack.send and github.search", ["slack.send", "search.github"]) == [
        ("github.search", "search.github")
    ]


def test_a_tool_spelled_otherwise_is_no_other_tool_with_its_words():
    for tools in (["read_file", "file_read"], ["file_read", "read_file"]):
        assert [(m.tool, m.reordered) for m in find_mentions(["call readFile"], tools)] == [("read_file", False)]


def test_known_identifiers_are_not_tools():
    assert found("the column `weather_get`") == [("weather_get", "get_weather")]
    assert found("the column `weather_get`", known=["weather_get"]) == []


def test_tool_columns_name_only_tools():
    check_tool_columns(["add", "max"], TOOLS)
    with pytest.raises(ToolNameError, match="`weather`, which does not exist; did you mean `get_weather`"):
        check_tool_columns(["add", "weather"], TOOLS)
    with pytest.raises(ToolNameError, match="did you mean `send_slack_message`"):
        check_tool_columns(["message_slack_send"], TOOLS)
    with pytest.raises(ToolNameError, match="The tools are: `add`"):
        check_tool_columns(["zzzz"], ["add"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.permutations(["send", "slack", "message"]), st.sampled_from(["_", "camel"]))
def test_every_order_and_spelling_is_caught(words, joint):
    name = "_".join(words) if joint == "_" else words[0] + "".join(word.title() for word in words[1:])
    mentions = [(m.name, m.reordered) for m in find_mentions([f"Then {name} does it."], TOOLS)]
    right = words == ["send", "slack", "message"]
    assert mentions == ([] if name == "send_slack_message" else [(name, not right)])


def test_thousands_of_prompts_are_quick():
    rng = random.Random(0)
    letters = "bcdfgjklm"
    words = ["".join(rng.choices(letters, k=5)) for _ in range(500)]
    texts = [
        " ".join(rng.choices(words, k=150)) + f" use get_weather and {rng.choice(words)}_{rng.choice(words)}"
        for _ in range(5000)
    ]
    tools = [f"tool_{'aeiou'[i % 5] * 6}_{i}" for i in range(100)] + TOOLS
    start = time.thread_time()
    assert list(find_mentions(texts, tools)) == []
    assert time.thread_time() - start < 2.0


# At construction


def send_slack_message(text: str) -> str:
    """Send.

    Args:
        text: what.
    """
    return text


def asked(role, text, more=()):
    go = "Go." if isinstance(text, str) else [{"type": "text", "text": "Go."}]
    return Dataset.from_list([{"prompt": [{"role": role, "content": text}, {"role": "user", "content": go}, *more]}])


def construct(tokenizer, tmp_path, data, check="auto", tools=(send_slack_message, add), evaluation=None):
    return ToolGRPOTrainer(
        tiny_model(tokenizer), lambda completions, **kwargs: [0.0] * len(completions),
        config(tmp_path, tool_mention_check=check, num_generations_eval=2, per_device_eval_batch_size=2), data,
        eval_dataset=evaluation, processing_class=tokenizer, tools=list(tools),
    )  # fmt: skip


REORDERED, RESPELLED = "Use slack_send_message to post it.", "Use sendSlackMessage to post it."


@pytest.mark.parametrize(
    ("check", "role", "text", "outcome"),
    [
        ("auto", "system", REORDERED, "error"),
        ("auto", "system", RESPELLED, "warning"),
        ("auto", "user", REORDERED, "warning"),
        ("auto", "assistant", REORDERED, "warning"),
        ("error", "user", RESPELLED, "error"),
        ("warn", "system", REORDERED, "warning"),
        ("off", "system", REORDERED, None),
    ],
)
def test_a_slip_is_an_error_or_a_warning_by_option(tokenizer, tmp_path, caplog, check, role, text, outcome):
    if outcome == "error":
        with pytest.raises(ToolNameError, match=rf"`train_dataset`, row 0: a {role} message .*tool_mention_check"):
            construct(tokenizer, tmp_path, asked(role, text), check)
        return
    with caplog.at_level(logging.WARNING, "trl_toolgrpo"):
        construct(tokenizer, tmp_path, asked(role, text), check, evaluation=asked(role, text))
    said = [record.getMessage() for record in caplog.records if "did you mean" in record.getMessage()]
    assert len(said) == (outcome == "warning") and all("`send_slack_message`? It says: " in line for line in said)


def test_a_stream_and_parts_of_a_content_are_searched(tokenizer, tmp_path):
    parts = [{"type": "text", "text": REORDERED}]
    for data in (asked("system", parts), IterableDataset.from_generator(lambda: iter(asked("system", REORDERED)))):
        with pytest.raises(ToolNameError, match="names the tool `slack_send_message`, which does not exist"):
            construct(tokenizer, tmp_path, data)


@pytest.mark.parametrize("check", ["auto", "error", "warn", "off"])
def test_calls_and_columns_are_errors_whatever_the_option(tokenizer, tmp_path, check):
    call = {"type": "function", "function": {"name": "slack_send_message", "arguments": {"text": "hi"}}}
    history = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(ToolNameError, match="did you mean `send_slack_message`"):
        construct(tokenizer, tmp_path, asked("user", "Hello.", history), check)
    with pytest.raises(ToolNameError, match="did you mean `send_slack_message`"):
        construct(tokenizer, tmp_path, prompts(1).add_column("tools", [["slack_send_message"]]), check)


def test_warnings_are_few_and_name_the_rest(tokenizer, tmp_path, caplog):
    words = ["send", "slack", "message", "now"]
    tool = Tool("_".join(words), "Sends.", {"type": "object", "properties": {}}, lambda: "")
    rng, names = random.Random(0), set()
    while len(names) < 20:
        names.add("_".join(rng.sample(words, 4)))
    names.discard(tool.name)
    rows = [{"prompt": [{"role": "user", "content": f"{name} or {name}"}]} for name in sorted(names) * 3]
    with caplog.at_level(logging.WARNING, "trl_toolgrpo"):
        construct(tokenizer, tmp_path, Dataset.from_list(rows), tools=[tool])
    said = [record.getMessage() for record in caplog.records if "tool_mention_check" in record.getMessage()]
    assert len(said) == 6 and f"Prompts name {len(names) - 5} more identifiers that resemble tools: " in said[-1]


def test_values_and_inner_properties_of_tools_are_no_slips(tokenizer, tmp_path):
    value = {"type": "string", "enum": ["slack_message_send"]}
    inner = {"type": "object", "properties": {"message_slack_send": value}}
    schema = {"type": "object", "properties": {"what": inner}}
    tool = Tool("send_slack_message", "Sends.", schema, lambda what: "")
    construct(tokenizer, tmp_path, asked("system", "message_slack_send or slack_message_send"), "error", [tool])


def test_the_option_is_one_of_four(tmp_path):
    with pytest.raises(ConfigError, match="Choose one of auto, error, warn, off"):
        config(tmp_path, tool_mention_check="ask")

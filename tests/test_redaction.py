"""Secrets out of texts, data and log records."""

import dataclasses
import json
import logging
import urllib.parse

import pytest
from conftest import config

from trl_toolgrpo import ToolGRPOConfig, ToolResult
from trl_toolgrpo.redaction import (
    SECRET,
    Redactor,
    argument_secrets,
    config_secrets,
    is_secret_name,
    masked,
    masked_arguments,
    masked_url,
    redact_logs,
    secret_values,
    secret_variables,
)
from trl_toolgrpo.tools.results import result_text, without_secrets


@pytest.mark.parametrize("spell", [str, json.dumps, repr, urllib.parse.quote, urllib.parse.quote_plus])
@pytest.mark.parametrize("secret", ["hunter2-hunter2", 'with "quotes" and \\', "Passwört & Co/x", "two\nlines"])
def test_a_secret_is_found_however_it_is_spelled(secret, spell):
    text = Redactor([secret]).text(f"before {spell(secret)} after")
    assert SECRET in text and text.startswith("before ") and text.endswith(" after")
    for part in (secret, spell(secret).strip("'\"")):
        assert part not in text


def test_each_line_of_a_secret_is_hidden():
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\n-----END KEY-----"
    assert Redactor([key]).text("it has MIIEvQIBADANBgkq in it") == f"it has {SECRET} in it"


def test_the_longest_secret_goes_first():
    assert Redactor(["abcdef", "abcdefghij"]).text("abcdefghij abcdef") == f"{SECRET} {SECRET}"


def test_nested_data_is_redacted_keys_included():
    found = Redactor(["sesame-open"]).data({"a": ["sesame-open", 1, None, {"x sesame-open": 2.5}], "b": True})
    assert found == {"a": [SECRET, 1, None, {f"x {SECRET}": 2.5}], "b": True}


def test_without_secrets_nothing_changes():
    data = {"a": ["b"]}
    assert Redactor().text("a b") == "a b" and Redactor().data(data) is data


def test_secret_values_of_a_server_configuration():
    env = {"API_KEY": "k-123456", "TZ": "Europe/Paris", "PATH": "/usr/local/bin", "LC_ALL": "de_DE.UTF-8"}
    env |= {"SHORT": "12345", "MODE": "Production", "path": "/usr/local/bin"}
    assert secret_values(env, {}, None) == ["k-123456"]
    headers = {"Authorization": "Bearer abcdefgh", "Accept": "application/json", "X-Key": "zyxwvut"}
    assert secret_values({}, headers, None) == ["Bearer abcdefgh", "abcdefgh", "zyxwvut"]
    url = "https://someone:password1@host.example:8443/mcp?token=tok-en-1&page=1"
    assert secret_values({}, {}, url) == ["someone", "password1", "tok-en-1"]
    assert masked_url(url) == "https://...@host.example:8443/mcp?token=...&page=..."
    assert masked_url("http://127.0.0.1:8000/mcp") == "http://127.0.0.1:8000/mcp"


def test_log_records_of_a_library_are_redacted(caplog):
    redactor = Redactor(["sesame-open"])
    redact_logs(["a_library"], redactor)
    redact_logs(["a_library"], redactor)
    logger = logging.getLogger("a_library")
    assert len(logger.filters) == 1
    with caplog.at_level(logging.DEBUG):
        logger.warning("the key is %s", "sesame-open")
        try:
            raise ValueError("no sesame-open here")
        except ValueError:
            logger.exception("failed with %(key)s", {"key": "sesame-open"})
    assert "sesame-open" not in caplog.text
    assert f"the key is {SECRET}" in caplog.text and f"ValueError: no {SECRET} here" in caplog.text
    del redactor
    with caplog.at_level(logging.DEBUG):
        logger.warning("sesame-open again")
    assert "sesame-open again" in caplog.text, "a filter lives no longer than what it is for"


@pytest.mark.parametrize("secret", ["100000", "nabcdef", 'a"b\\c\nd', "\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9"])
def test_json_stays_json_whatever_the_secret(secret):
    """A number is no text, and an escape is one character."""
    value = {"n": [100000, 1.5e300], f"key {secret}": f"\n{secret}\n", "line": "\nabcdef", "half": "\ud83d"}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        found = json.loads(Redactor([secret]).json(text))
        assert found == Redactor([secret]).data(value) and secret not in str(found["key [secret]"])
    assert Redactor([secret]).json(deep := "[" * 100_000 + json.dumps(secret)) != deep


SECRET_NAMES = (
    "PGPASSWORD DB_PASSWD OPENAI_API_KEY_2 OPENAI_API_KEY2 HF_TOKEN_WRITE HF_TOKEN HF_NEW_TOKEN AWS_SECRET_ACCESS_KEY "
    "AWS_ACCESS_KEY_ID SMTP_PASS DB_PASS_2 apiKey openaiApiKey accessToken hfToken HFToken X-Api-Key Authorization "
    "Proxy-Authorization Ocp-Apim-Subscription-Key hub_token NGROK_AUTHTOKEN API_KEYS GITHUB_PAT MYSQL_PWD TOKEN KEY "
    "KEY_OPENAI OPENAI_KEY_TEAM ANTHROPIC_API_KEY_PROD db.password SECRET_KEY_BASE JWT SESSION_COOKIE X-Signature "
    "client_secret APIKEY1 PASSWORD2 GPG_PASSPHRASE AZURE_STORAGE_CONNECTION_STRING SLACK_WEBHOOK_URL --api-key "
    "DBPASS SMTPPASS SSHPASS DB_PASS OPENAIAPIKEY AWS_CREDS PASSCODE DB_PW DISCORD_WEBHOOK masterkey ADMIN_PASSCODE "
    "SENTRY_AUTH_TOKEN GOOGLE_APPLICATION_CREDENTIALS_JSON PRIVATE_KEY X-Auth"
)
PUBLIC_NAMES = (
    "PATH PWD OLDPWD KEYBOARD MONKEY KEYMAP TOKENIZERS_PARALLELISM tokenizer tokenizer_name max_tokens num_tokens "
    "pad_token pad_token_id eos_token eos_token_id per_token_logps max_tool_output_tokens metric_key_prefix sort_key "
    "key_padding_mask num_key_value_heads SSH_AUTH_SOCK SSH_ASKPASS TOKEN_LIMIT TOKEN_FILE DB_PASSWORD_FILE author "
    "secretary pass_rate pass_at_1 token_ratio surpass overpass hotkey turkey sacred trespass keyword_rate "
    "bypass compass passes GIT_AUTHOR_NAME LS_COLORS top_k XAUTHORITY mask_truncated_completions PUBLIC_KEY"
)


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_secret_names(name):
    """The one rule: for variables, options, configurations and headers alike."""
    assert is_secret_name(name)
    assert secret_variables({name: "abc-123456"}) == [name]
    assert config_secrets({"deep": [{name: "abc-123456"}]}) == ["abc-123456"] * 2
    assert masked({name: "abc-123456"}) == {name: SECRET}
    assert masked_arguments([f"{name}=abc-123456"]) == [f"{name}={SECRET}"]


@pytest.mark.parametrize("name", PUBLIC_NAMES.split())
def test_names_that_tell_no_secret(name):
    assert not is_secret_name(name)
    assert secret_variables({name: "abc-123456"}) == [] == config_secrets({name: "abc-123456"})


def test_no_option_of_the_configuration_is_taken_for_a_secret():
    named = {field.name for field in dataclasses.fields(ToolGRPOConfig) if is_secret_name(field.name)}
    assert named == {"hub_token"}


def test_secrets_within_values_of_variables_are_found():
    """Plain words, and a user without a password, are none: what tools return is searched for secrets."""
    assert secret_variables({"URL": "postgres://postgres@localhost/db", "DB_PASSWORD": "postgres"}) == []
    assert secret_variables({"URL": "https://ghp-0123456@github.com/x", "A": '{"apiKey": "abc-1234"}'}) == ["A", "URL"]
    key = {"GOOGLE_CREDENTIALS_JSON": '{"type": "service", "private_key": "abc-1234"}'}
    assert "abc-1234" in config_secrets(key) and "service" not in config_secrets(key)


def test_secrets_of_a_command_line():
    given = ["train.py", "--judge_key", "abc-123456", "--hub-token=def-123456", "--max_tokens", "100000"]
    assert argument_secrets(given) == ["abc-123456", "abc-123456", "def-123456", "def-123456"]


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("X-Api-Key: abc-123456", "X-Api-Key: [secret]"),
        ("Authorization: Bearer abc-123456", "Authorization: [secret]"),
        ("+judge.api_key=abc-123456", "+judge.api_key=[secret]"),
        ("Server=db;Password=abc-123456;User=me", "Server=db;Password=[secret];User=me"),
        ("host=db password='abc-123456' user=me", "host=db password=[secret] user=me"),
        ("-Djdbc.password=abc-123456", "-Djdbc.password=[secret]"),
        ("mysql://me@h/a,mysql://me:abc-123456@h/b", "mysql://...@h/a,mysql://...@h/b"),
        ("https://h/cb#access_token=abc-123456", "https://h/cb"),
    ],
)
@pytest.mark.parametrize("place", ["argument", "variable", "configuration"])
def test_a_secret_within_a_text_is_masked(argument, shown, place):
    if place == "argument":
        assert masked_arguments(["train.py", "--to", argument]) == ["train.py", "--to", shown]
        assert "abc-123456" in argument_secrets(["train.py", argument])
    elif place == "variable":
        assert secret_variables({"OPTIONS": argument}) == ["OPTIONS"]
    else:
        assert masked({"options": [argument]}) == {"options": [shown]}
        assert "abc-123456" in config_secrets({"options": [argument]})


@pytest.mark.parametrize(
    "text",
    ["key=abc-123456", "a=b", "max_tokens=123456", "Say the password: please. Then go.", "rs=0:di=01;34", "x" * 10**6],
)
def test_a_text_without_a_secret_is_unchanged(text):
    assert masked({"text": text}) == {"text": text} and config_secrets({"text": text}) == []


def test_options_that_take_several_secrets():
    given = ["train.py", "--api_keys", "abc-123456", "def-123456", "--hub-token", "ghi-123456", "run.yaml"]
    assert masked_arguments(given) == [
        "train.py", "--api_keys", SECRET, SECRET, "--hub-token", SECRET, "run.yaml"
    ]  # fmt: skip


def test_the_configuration_that_trackers_get_holds_no_secret(tmp_path):
    given = {"model_init_kwargs": {"token": "abc-123456", "dtype": "float32"}, "hub_token": "def-123456"}
    args = config(tmp_path, vllm_server_base_url="http://me:ghi-123456@host:8000", **given)
    for shown in (args.to_dict(), args.to_sanitized_dict(), args.to_json_string()):
        assert not [word for word in ("abc-123456", "def-123456", "ghi-123456") if word in str(shown)]
    assert args.to_dict()["model_init_kwargs"] == {"token": SECRET, "dtype": "float32"}
    assert args.model_init_kwargs["token"] == "abc-123456" and args.hub_token == "def-123456"


@pytest.mark.parametrize("content", ["a hush-hush b", {"hush-hush": [1, {"x": "hush-hush"}]}, ["hush-hush", 2.5]])
def test_a_result_repeats_no_secret(content):
    result = without_secrets(ToolResult(content, is_error=True, reward=0.5), Redactor(["hush-hush"]))
    assert "hush" not in result_text(result) and SECRET in result_text(result)
    assert result.is_error and result.reward == 0.5
    plain = ToolResult({"a": (1, 2)})
    assert without_secrets(plain, Redactor()) is plain


def test_a_result_that_is_nested_too_deep_repeats_no_secret():
    content = "hush-hush"
    for _ in range(3000):
        content = [content]
    assert "hush-hush" not in result_text(without_secrets(ToolResult(content), Redactor(["hush-hush"])))

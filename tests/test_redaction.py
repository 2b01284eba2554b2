"""Secrets out of texts, data and log records."""

import json
import logging
import urllib.parse

import pytest

from trl_toolgrpo.redaction import SECRET, Redactor, masked_url, redact_logs, secret_values


@pytest.mark.parametrize("spell", [str, json.dumps, repr, urllib.parse.quote, urllib.parse.quote_plus])
@pytest.mark.parametrize("secret", ["hunter2-hunter2", 'with "quotes" and \\', "Passwört & Co/x", "two\nlines"])
def test_a_secret_is_found_however_it_is_spelled(secret, spell):
    text = Redactor([secret]).text(f"before {spell(secret)} after")
    assert SECRET in text and text.startswith("before ") and text.endswith(" after")
    for part in (secret, spell(secret).strip("'\"")):
        assert part not in text


def test_a_line_of_a_secret_is_one():
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\n-----END KEY-----"
    assert Redactor([key]).text("it has MIIEvQIBADANBgkq in it") == f"it has {SECRET} in it"


def test_the_longest_secret_goes_first():
    assert Redactor(["abcdef", "abcdefghij"]).text("abcdefghij abcdef") == f"{SECRET} {SECRET}"


def test_data_is_searched_to_its_depths():
    found = Redactor(["sesame-open"]).data({"a": ["sesame-open", 1, None, {"x sesame-open": 2.5}], "b": True})
    assert found == {"a": [SECRET, 1, None, {f"x {SECRET}": 2.5}], "b": True}


def test_without_secrets_nothing_changes():
    data = {"a": ["b"]}
    assert Redactor().text("a b") == "a b" and Redactor().data(data) is data


def test_what_counts_as_a_secret():
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

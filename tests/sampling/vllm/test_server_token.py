"""Who may use a rollout server: those who show its token, and nobody else, over real HTTP."""

import asyncio
import logging
import sys
import urllib.error
import urllib.request

import pytest
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig
from rollout_server import ServerProcess

from trl_toolgrpo import ConfigError, RolloutServerError, ToolGRPOTrainer
from trl_toolgrpo import serve as command
from trl_toolgrpo.sampling.vllm import server, server_token
from trl_toolgrpo.sampling.vllm.client import ServedEngine, model_shape
from trl_toolgrpo.sampling.vllm.policy_weights import PolicyFile, write_policy
from trl_toolgrpo.sampling.vllm.sampler import TokenRequest
from trl_toolgrpo.sampling.vllm.server_token import VARIABLE, is_loopback, is_shown


TOKEN = "a-token-that-nobody-guesses"


def ask(url, method, path, header=None, body=None):
    """Return the status of the answer to a request."""
    headers = {} if header is None else {"Authorization": header}
    request = urllib.request.Request(f"{url}{path}", data=body, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def guarded():
    with ServerProcess(token=TOKEN) as running:
        running.about()
        yield running


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Bearer {TOKEN.upper()}", TOKEN,
        f"Basic {TOKEN}", f"bearer  {TOKEN}", "Bearer \u00e9\u00e9", f"Bearer {TOKEN} {TOKEN}",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/rollouts"), ("POST", "/rollouts"), ("PUT", "/policy"), ("GET", "/elsewhere"), ("HEAD", "/rollouts")],
)
def test_a_request_without_the_token_is_refused(guarded, header, method, path):
    body = b"x" * 2**21 if method == "PUT" else b"{}" if method == "POST" else None
    assert ask(guarded.url, method, path, header, body) == 401


def test_refused_requests_load_nothing(guarded):
    assert guarded.about()["policy"] is None
    assert ask(guarded.url, "GET", "/rollouts", f"Bearer {TOKEN}") == 200
    assert ask(guarded.url, "GET", "/elsewhere", f"Bearer {TOKEN}") == 404


def test_a_run_with_the_token_trains(tmp_path, tokenizer, monkeypatch, caplog, capfd):
    monkeypatch.setenv(VARIABLE, f" {TOKEN}\n")
    with ServerProcess(token=TOKEN) as running, caplog.at_level(logging.DEBUG):
        running.about()
        trainer = ToolGRPOTrainer(
            tiny_model(tokenizer), lambda completions, **kwargs: [0.0, 1.0, 2.0, 3.0],
            config(
                tmp_path, rollout_backend="vllm", vllm_mode="server", vllm_server_base_url=running.url, max_steps=2,
                vllm_server_timeout=30.0,
            ),
            prompts(), processing_class=tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        about = running.about()
    assert about["version"] == 1 and trainer.state.global_step == 2
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = capfd.readouterr()
    assert TOKEN.encode() not in written and TOKEN not in caplog.text + said.out + said.err


def connect(url, token=None):
    async def run():
        shape = model_shape(tiny_model(chat_tokenizer()).config)
        engine = await ServedEngine.start(url, 20.0, "tiny", shape, token)
        await engine.close()

    asyncio.run(run())


def test_a_run_without_the_servers_token_ends_at_once_and_says_what_to_do(guarded, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RolloutServerError, match=f"requires a token, and this run has none. Set .*{VARIABLE}"):
        connect(guarded.url)
    with pytest.raises(RolloutServerError, match="requires a different token from this run's") as caught:
        connect(guarded.url, "not-the-token")
    assert "not-the-token" not in str(caught.value) and TOKEN not in str(caught.value)
    connect(guarded.url, TOKEN)
    monkeypatch.setenv(VARIABLE, TOKEN)
    connect(guarded.url)


@pytest.mark.parametrize("while_it", ["samples", "sends weights"])
def test_a_server_that_comes_back_with_another_token_is_not_waited_for(tmp_path, while_it):
    write_policy(tiny_model(chat_tokenizer()), tmp_path)

    async def run(running):
        shape = model_shape(tiny_model(chat_tokenizer()).config)
        engine = await ServedEngine.start(running.url, 60.0, "tiny", shape, TOKEN)
        try:
            await engine.load(PolicyFile("one", 0, tmp_path, adapter=False))
            running.kill()
            running.token = "another-one"
            running.start()
            await asyncio.to_thread(running.about)
            if while_it == "samples":
                await engine.generate(TokenRequest([1, 2], 2, [0], 1.0))
            else:
                await engine.load(PolicyFile("two", 1, tmp_path, adapter=False))
        finally:
            await engine.close()

    with ServerProcess(token=TOKEN) as running:
        running.about()
        with pytest.raises(RolloutServerError, match="requires a different token from this run's"):
            asyncio.run(asyncio.wait_for(run(running), 120))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_a_local_server_needs_no_token(host, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert is_loopback(host)
    server.check_address(host, None)
    assert "every user of this machine can load weights" in capsys.readouterr().out
    server.check_address(host, TOKEN)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "192.168.0.7", "my-host", "8.8.8.8", "fe80::1"])
def test_a_server_for_other_machines_needs_a_token(host, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    began = []

    async def start():
        began.append(True)

    with pytest.raises(ConfigError, match=f"no token: whoever reaches the port.*{VARIABLE}.*secrets.token_urlsafe"):
        server.serve(start, {}, host, 0)
    monkeypatch.setattr(sys, "argv", ["serve", "--model", "m", "--host", host])
    with pytest.raises(ConfigError, match="no token"):
        command.main()
    assert not began
    server.check_address(host, TOKEN)


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "sm\u00f6rg\u00e5s", "tab\there"])
def test_a_token_that_cannot_be_sent_is_refused(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match="cannot be sent") as caught:
        connect("http://127.0.0.1:9")
    assert value not in str(caught.value)


def test_a_token_and_a_user_name_in_the_url_are_refused():
    with pytest.raises(ConfigError, match="can show only one of them") as caught:
        connect("http://me:secret@127.0.0.1:9", TOKEN)
    assert "secret" not in str(caught.value) and TOKEN not in str(caught.value)


def test_tokens_are_compared_in_constant_time(monkeypatch):
    """With the function of the standard library for that."""
    compared = []
    real = server_token.hmac.compare_digest
    monkeypatch.setattr(server_token.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    assert is_shown(TOKEN, f"Bearer {TOKEN}") and not is_shown(TOKEN, "Bearer x") and not is_shown(TOKEN, None)
    assert len(compared) == 3


def test_an_empty_variable_is_no_token(monkeypatch):
    for value in ("", "  ", "\n"):
        monkeypatch.setenv(VARIABLE, value)
        assert server_token.server_token() is None

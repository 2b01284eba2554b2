"""The Hub: what is pushed, when, that it loads, and what is left on disk when the Hub or the disk refuses."""

import os
import pickle
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import hf_xet
import huggingface_hub
import pytest
import torch
import transformers
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import add, chat_tokenizer, config, prompts, tiny_model
from hub_server import TOKEN, USER, _Handler, hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM, TrainerCallback

from trl_toolgrpo import CheckpointSaveError, HubPushError, MCPServer, ToolGRPOTrainer, ValueHead, ValueHeadError
from trl_toolgrpo.config.fields import changed_fields
from trl_toolgrpo.hub.model_card import bars, curves, launcher, machines
from trl_toolgrpo.redaction import SECRET, config_secrets, masked, masked_arguments


NAME = "run"
HTTP = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]  # the client's HTTP library
FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json", "value_head.safetensors",
}  # fmt: skip


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub on loopback, for the real client."""
    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=running.url))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.utils.close_session()
        yield running
        huggingface_hub.utils.close_session()


def length_reward(completion_ids, **kwargs):
    """Rewards what differs within a group."""
    return [float(sum(ids) % 11) for ids in completion_ids]


@pytest.fixture
def base(tmp_path):
    """Folder of a base model with its tokenizer."""
    tokenizer = chat_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def start(base, folder, **changes):
    """A run with an adapter, a value head, and a reference adapter that follows it."""
    options = {
        "push_to_hub": True, "max_steps": 2, "advantage_estimator": "gae", "beta": 0.1, "sync_ref_model": True,
        "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1, "hub_token": TOKEN,
        "model_init_kwargs": {"dtype": "float32"}, **changes,
    }  # fmt: skip
    mcp = options.pop("mcp_servers", None)
    return ToolGRPOTrainer(
        str(base),
        length_reward,
        config(folder, **options),
        prompts(8),
        tools=[add],
        mcp_servers=mcp,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


def everything(server, name):
    return b"\n".join(server.repos[name].values())


def test_a_pushed_run_loads_anywhere(server, base, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", "--learning_rate", "1e-3", "--hub_token", TOKEN])
    trainer = start(base, tmp_path / NAME, save_strategy="steps", save_steps=1, learning_rate=1e-2, hub_strategy="end")
    trainer.train()
    assert server.commits == []
    (tmp_path / NAME / "secrets.txt").write_text("not to be published")
    commit = trainer.push_to_hub(dataset_name="someone/questions")
    name = f"{USER}/{NAME}"
    assert commit.oid and server.commits == [(name, "End of training")]
    assert set(server.repos[name]) == FILES  # no "ref" adapter, no optimizer, no pickle
    assert {path.name for path in (tmp_path / NAME / "hub").iterdir()} == FILES
    assert TOKEN.encode() not in everything(server, name)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), name)
    for (one, tensor), (other, loaded) in zip(
        sorted((n, p) for n, p in trainer.model.named_parameters() if "lora_" in n and ".default." in n),
        sorted((n, p) for n, p in model.named_parameters() if "lora_" in n),
        strict=True,
    ):
        assert one == other and torch.equal(tensor, loaded)
    assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)
    assert list(model.peft_config) == ["default"]
    head = ValueHead.from_pretrained(name)
    for key, tensor in trainer.critic.head.state_dict().items():
        assert torch.equal(head.state_dict()[key], tensor)
    assert bool(head.output.weight.any())
    with pytest.raises(ValueHeadError, match="could not be downloaded"):
        ValueHead.from_pretrained(f"{USER}/another")
    tokenizer = AutoTokenizer.from_pretrained(name)
    assert tokenizer.chat_template == trainer.processing_class.chat_template


def test_the_pushed_card_describes_the_run_without_secrets(server, base, tmp_path, monkeypatch):
    secret = "value of a secret variable"
    monkeypatch.setenv("WEATHER_API_KEY", secret)
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", "--note", f"{secret}|", "--wandb_api_key", "short"])
    program = Path(__file__).parents[1].joinpath("mcp_plain_server.py")
    servers = {"weather": {"command": sys.executable, "args": [str(program)], "env": {"PASS": "what-nobody-may-know"}}}
    trainer = start(base, tmp_path / NAME, mcp_servers={"mcpServers": servers}, save_strategy="no")
    trainer.train()
    trainer.push_to_hub(dataset_name="someone/questions")
    trainer.end()
    card = server.repos[f"{USER}/{NAME}"]["README.md"].decode()
    for part in (
        "library_name: peft", "datasets: someone/questions", "# run\n",
        'PeftModel.from_pretrained(base, "someone/run")',
        'ValueHead.from_pretrained("someone/run")', "8 prompts of `someone/questions` (columns `prompt`)",
        "| `add` | `a` (integer), `b` (integer) | Add two numbers. |",
        "| `length_reward` | 1 | Rewards what differs within a group. |", "Optimizer steps 1 to 2.", "| `reward` |",
        "advantage_estimator: gae", "- trl_toolgrpo: 0.1.0", "- TRL: 1.16", "- PEFT: ", "@software{vonwerra2020trl",
        "python recipes/train.py --note '[secret]|' --wandb_api_key '[secret]'",
    ):  # fmt: skip
        assert part in card, part
    for hidden in (TOKEN, secret, "short", "what-nobody-may-know", "time machine", "hub_token", str(tmp_path)):
        assert hidden not in card, hidden
    assert MCPServer(**servers["weather"]).redactor.text("what-nobody-may-know") == "[secret]"


def test_secrets_of_the_configuration_are_not_pushed(server, base, tmp_path, monkeypatch):
    """Neither with the card nor with a checkpoint; the run goes on with it."""
    token, password = "hf_of_the_configuration", "passw0rd"
    given = {"dtype": torch.float32, "token": token}
    options = [f'{{"token": "{token}", "dtype": "float32"}}', "--where", f"http://user:{password}@host:8000"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--model_init_kwargs", *options, '--more={"api_key": "sh0rt"}'])
    address = f"http://user:{password}@host:8000/v1"
    trainer = start(
        base, tmp_path / NAME, model_init_kwargs=given, vllm_server_base_url=address, save_strategy="steps",
        save_steps=1, max_steps=1, hub_strategy="checkpoint",
    )  # fmt: skip
    trainer.reward_funcs[0] = named = lambda **kwargs: length_reward(**kwargs)
    named.__doc__ = f"Asks with {token}."
    trainer.train()
    name = f"{USER}/{NAME}"
    assert "last-checkpoint/training_args.bin" in server.repos[name]
    for hidden in (token, password, "sh0rt", "user:"):
        assert hidden.encode() not in everything(server, name), hidden
    card = server.repos[name]["README.md"].decode()
    for part in (
        "  token: '[secret]'", "  dtype: float32", "vllm_server_base_url: http://...@host:8000/v1\n",
        "| Asks with [secret]. |",
        """train.py --model_init_kwargs '{"token": "[secret]", "dtype": "float32"}' --where http://...@host:8000 """,
        """'--more={"api_key": "[secret]"}'""",
    ):  # fmt: skip
        assert part in card, part
    assert trainer.args.model_init_kwargs["token"] == token and trainer.args.vllm_server_base_url == address


def test_every_save_is_pushed_in_the_background(server, base, tmp_path):
    trainer = start(
        base, tmp_path / NAME, save_strategy="steps", save_steps=1, hub_strategy="checkpoint", hub_always_push=True
    )
    trainer.train()
    name = f"{USER}/{NAME}"
    assert [message for _, message in server.commits] == [
        f"Training in progress, step {step}{part}" for step in (1, 2) for part in ("", ", checkpoint")
    ]
    files = {path for path in server.repos[name] if "/" not in path}
    assert files == FILES
    kept = {path.removeprefix("last-checkpoint/") for path in server.repos[name] if "/" in path}
    assert {"optimizer.pt", "manifest.json", "reference.safetensors", "training_args.bin"} <= kept
    assert TOKEN.encode() not in everything(server, name)
    assert trainer.args.hub_token == TOKEN


def hold(monkeypatch):
    """Keep each upload from its start until an event is set."""
    route, event = _Handler._route, threading.Event()

    def held(self, path, body):
        assert "/preupload/" not in path or event.wait(60)
        return route(self, path, body)

    monkeypatch.setattr(_Handler, "_route", held)
    return event


class Watch(TrainerCallback):
    """Calls a function after each save."""

    def __init__(self, look):
        self.look = look

    def on_save(self, args, state, control, **kwargs):
        self.look(state.global_step)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_that_are_being_uploaded_are_known(server, base, tmp_path, strategy, monkeypatch):
    arrived, seen = hold(monkeypatch), []
    trainer = start(base, tmp_path / NAME, save_strategy="steps", save_steps=1, hub_strategy=strategy)

    def look(step):
        seen.append({path.name for path in trainer.hub.uploading})
        if step == 2:
            arrived.set()

    trainer.add_callback(Watch(look))
    assert trainer.hub.uploading == set()
    trainer.train()
    assert seen == [{"checkpoint-1"}, {"checkpoint-1"}] and trainer.hub.uploading == set()
    messages = [message for _, message in server.commits]
    assert messages == ["Training in progress, step 1", "Training in progress, step 1, checkpoint"]


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_save_total_limit_waits_for_uploads(server, base, tmp_path, strategy, monkeypatch, caplog):
    """The first is still being uploaded when the second and third are saved and the limit would remove it."""
    arrived = hold(monkeypatch)
    options = {"save_total_limit": 1, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = start(base, tmp_path / NAME, hub_strategy=strategy, **options)
    trainer.add_callback(Watch(lambda step: arrived.set() if step == 3 else None))
    trainer.train()
    assert "Training in progress, step 1, checkpoint" in [message for _, message in server.commits]
    assert "failed" not in caplog.text
    place = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-1"
    assert f"{place}/manifest.json" in server.repos[f"{USER}/{NAME}"]


def test_training_ends_after_the_upload(server, base, tmp_path, monkeypatch):
    """The checkpoints that TRL then removes, all but the best, are on the Hub."""
    arrived, seen = hold(monkeypatch), []
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "hub_strategy": "checkpoint"}
    trainer = start(base, tmp_path / NAME, **options)
    trainer.add_callback(Watch(lambda step: threading.Timer(1, arrived.set).start()))
    monkeypatch.setattr(
        transformers.trainer, "sort_checkpoints", lambda **kwargs: seen.append(trainer.hub.uploading) or []
    )
    trainer.train()
    assert seen == [set()] and len(server.commits) == 2


@pytest.mark.parametrize("gone", [False, True])
def test_a_failed_background_push_names_only_an_existing_folder(server, base, tmp_path, gone, monkeypatch, caplog):
    trainer = start(base, tmp_path / NAME, save_strategy="no", hub_strategy="checkpoint", max_steps=1)
    folder = tmp_path / NAME / "checkpoint-1"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "file.txt").write_text("some")
    ready = hold(monkeypatch)
    server.drop = ["POST .*/commit/", 2]  # that of the adapter, that of the checkpoint
    trainer._push_from_checkpoint(str(folder))
    if gone:
        shutil.rmtree(folder)
    ready.set()
    trainer._finish_current_push()
    deadline = time.monotonic() + 5  # it is logged by the thread that pushed
    while "checkpoint-1" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    told = next(record.getMessage() for record in caplog.records if "checkpoint-1" in record.getMessage())
    if gone:
        assert f"{folder}, which was to be pushed, is no longer there" in told and "hf upload" not in told
    else:
        assert the_command_of(told) == ["hf", "upload", f"{USER}/{NAME}", str(folder), "last-checkpoint"]


def test_a_push_waits_for_the_one_before_to_read_the_folder(server, base, tmp_path, monkeypatch):
    trainer = start(base, tmp_path / NAME, save_strategy="no")
    arrived = hold(monkeypatch)
    threading.Timer(1, arrived.set).start()
    first = trainer.push_to_hub(blocking=False)
    trainer.push_to_hub("second")
    assert first.exception() is None
    assert [message for _, message in server.commits] == ["End of training", "second"]


def test_a_whole_model_is_pushed_too(server, tmp_path):
    tokenizer = chat_tokenizer()
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer), length_reward, config(tmp_path / NAME, push_to_hub=True, hub_private_repo=True),
        prompts(), processing_class=tokenizer,
    )  # fmt: skip
    trainer.save_model()
    assert [message for _, message in server.commits] == ["Model save"]
    loaded = Qwen3ForCausalLM.from_pretrained(f"{USER}/{NAME}")
    assert all(torch.equal(p, loaded.state_dict()[n]) for n, p in trainer.model.state_dict().items())
    assert "training_args.bin" not in server.repos[f"{USER}/{NAME}"]
    assert (tmp_path / NAME / "model.safetensors").is_file()


def the_command_of(text):
    """The command that a message gives."""
    return shlex.split(re.search(r"`(hf upload [^`]+)`", text)[1])


def test_a_refused_token_leaves_all_on_disk_and_says_how_to_push(server, base, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_no_longer_valid")
    trainer = start(base, tmp_path / NAME, hub_token="hf_no_longer_valid", save_strategy="steps", save_steps=1)
    assert "The run goes on" in caplog.text and "401" in caplog.text and "hf_no_longer" not in caplog.text
    trainer.train()  # pushes that come along with checkpoints are logged
    assert trainer.state.global_step == 2 and server.commits == []
    caplog.clear()
    trainer.save_model()
    assert "The run goes on" in caplog.text
    with pytest.raises(HubPushError, match="401") as refused:
        trainer.push_to_hub()
    assert "hf_no_longer" not in str(refused.value) and isinstance(refused.value, ConnectionError)
    words = the_command_of(str(refused.value))
    assert {path.name for path in Path(words[3]).iterdir()} == FILES
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    command_line = [str(Path(sys.executable).with_name("hf")), *words[1:]]
    subprocess.run(command_line, env=environment, check=True, capture_output=True)
    assert set(server.repos[f"{USER}/{NAME}"]) == FILES


def test_a_cut_connection_is_tried_again_or_reported(server, base, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    trainer = start(base, tmp_path / NAME, save_strategy="no")
    server.drop = ["PUT /large/", 1]
    trainer.push_to_hub()
    uploads = [path for method, path in server.requests if method == "PUT"]
    assert len(uploads) == 3 and len(set(uploads)) == 2  # the adapter and the value head, one of them twice
    server.drop = ["POST .*/commit/", 1]
    with pytest.raises(HubPushError, match="disconnected"):
        trainer.push_to_hub()
    assert len(server.commits) == 1
    server.drop = ["POST .*/commit/", 1]
    trainer.push_to_hub(blocking=False).exception()
    deadline = time.monotonic() + 5  # it is logged by the thread that pushed
    while "A push in the background failed" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "A push in the background failed" in caplog.text
    trainer.push_to_hub()
    assert len(server.commits) == 2


def test_without_a_network_the_run_goes_on(server, base, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.close_session()
    trainer = start(base, tmp_path / NAME, save_strategy="no", hub_model_id="team/model", hub_revision="next")
    trainer.train()
    assert "offline" in caplog.text.lower()
    with pytest.raises(HubPushError, match="hf auth login") as refused:
        trainer.push_to_hub()
    folder = str(tmp_path / NAME / "hub")
    assert the_command_of(str(refused.value)) == ["hf", "upload", "team/model", folder, ".", "--revision", "next"]
    assert {path.name for path in Path(folder).iterdir()} == FILES
    assert server.requests == []


def let_pushes_fail(monkeypatch, error):
    """Have the client raise an error."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(HfApi, "create_repo", fail)


@pytest.mark.parametrize(
    "error",
    [
        HTTP.ConnectError("no route"), HTTP.ReadTimeout("slow"), ConnectionResetError("cut"), TimeoutError("slow"),
        OfflineModeIsEnabled("offline"), LocalTokenNotFoundError("no token"), socket.gaierror(-2, "no such host"),
        ssl.SSLError("certificate"), OSError(28, "No space left on device"), hf_xet.XetAuthenticationError("refused"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_network_and_disk_errors_raise_hub_push_error(base, tmp_path, monkeypatch, caplog, error):
    trainer = start(base, tmp_path / NAME, push_to_hub=False, save_strategy="no")
    let_pushes_fail(monkeypatch, error)
    trainer.init_hf_repo()
    assert "The Hub did not take the repository" in caplog.text
    with pytest.raises(HubPushError, match=type(error).__name__):
        trainer.push_to_hub()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"), FileNotFoundError(2, "a bug"), PermissionError(13, "a bug"), OSError("a bug"),
        KeyError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_bugs_propagate_unchanged_from_a_push(base, tmp_path, monkeypatch, caplog, error):
    trainer = start(base, tmp_path / NAME, push_to_hub=False, save_strategy="no")
    let_pushes_fail(monkeypatch, error)
    for push in (trainer.init_hf_repo, trainer.push_to_hub):
        with pytest.raises(type(error), match="a bug"):
            push()
    assert "The Hub did not take" not in caplog.text


def test_an_error_of_the_hubs_storage_raises_hub_push_error(server, base, tmp_path, monkeypatch):
    """The client raises it as a plain `RuntimeError`."""
    trainer = start(base, tmp_path / NAME, save_strategy="no")

    def refuse(*args, **kwargs):
        raise ValueError("the storage is closed")

    monkeypatch.setattr("huggingface_hub._commit_api.lfs_upload", refuse)
    with pytest.raises(HubPushError, match=r"RuntimeError: Error while uploading .* to the Hub\. \(ValueError"):
        trainer.push_to_hub()


def full(folder):
    """Make a disk that is full for everything below a folder."""

    def refuse(function):
        def write(*args, **kwargs):
            if any(isinstance(target, (str, Path)) and str(folder) in str(target) for target in args):
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return write

    return refuse


def test_a_full_disk_does_not_lose_the_model(server, base, tmp_path, monkeypatch):
    folder = tmp_path / NAME
    trainer = start(base, folder, save_strategy="steps", save_steps=1, hub_strategy="end")
    trainer.train()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    refuse = full(folder)
    for name in ("os.makedirs", "torch.save"):
        module, _, function = name.rpartition(".")
        monkeypatch.setattr(name, refuse(getattr({"os": os, "torch": torch}[module], function)))
    with pytest.raises(CheckpointSaveError, match="Nothing is lost") as refused:
        trainer.save_model()
    kept = Path(the_command_of(str(refused.value))[3])
    assert kept.parents[1] == tmp_path / "elsewhere" and (kept / "adapter_model.safetensors").is_file()
    assert set(server.repos[f"{USER}/{NAME}"]) == FILES  # what was written elsewhere was pushed
    monkeypatch.setattr("tempfile.tempdir", str(folder / "no"))
    with pytest.raises(CheckpointSaveError, match="Neither") as refused:
        trainer.push_to_hub()
    words = the_command_of(str(refused.value))
    assert words[3] == str(folder / "checkpoint-2") and "--include" in words


def test_pickled_arguments_hold_no_token(base, tmp_path):
    trainer = start(base, tmp_path / NAME, push_to_hub=False)
    trainer.save_model()
    kept = torch.load(tmp_path / NAME / "training_args.bin", weights_only=False)
    assert kept.hub_token is None and trainer.args.hub_token == TOKEN
    assert TOKEN.encode() not in pickle.dumps(kept)


# Texts


def test_bars_and_curves():
    assert bars([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert bars([3.0, 3.0]) == "▁▁" and len(bars([float(i) for i in range(1000)])) == 30
    log = [{"step": 1, "reward": 0.0, "loss": 1.5, "learning_rate": 1.0}, {"step": 5, "reward": 2.0, "eval_reward": 3}]
    assert curves(log) == [
        ["`eval_reward`", "3", "3", "3", "3", "▁"],
        ["`loss`", "1.5", "1.5", "1.5", "1.5", "▁"],
        ["`reward`", "0", "2", "0", "2", "▁█"],
    ]
    assert curves([{"train_runtime": 3.0, "step": 2}, {"step": 3, "loss": float("nan")}]) == []


def test_option_values_that_are_secret_are_masked():
    given = ["a.py", "--hub_token=x", "--api_key", "y", "--steps", "3", "--secret", "--flag", "a b"]
    shown = "a.py '--hub_token=[secret]' --api_key '[secret]' --steps 3 --secret --flag 'a b'"
    assert shlex.join(masked_arguments(given)) == shown


def test_a_command_line_is_shown_without_secrets():
    given = ["a.py", "--url=https://me:pw@x.org/d?sig=abcdefg", '{"a": [{"password": 5}]}', "HF_TOKEN=xyz", "http://["]
    shown = ["a.py", "--url=https://...@x.org/d?sig=...", '{"a": [{"password": "[secret]"}]}', f"HF_TOKEN={SECRET}"]
    assert masked_arguments(given) == [*shown, "http://["]
    plain = ["--max_tokens", "5", "--tokenizer=x", "--eos_token", "<|im_end|>", '{"a":1}', "https://x.org/#part"]
    assert masked_arguments(plain) == plain


def test_a_configuration_is_shown_without_secrets():
    given = {
        "model": {"token": "hf_abcdef", "use_auth_token": True, "revision": None, "secret_key": ""},
        "headers": {"Authorization": "Bearer zyxwvut", "Accept": "text"},
        "list": [{"apiKey": "k-123456"}, ("https://abcdef@h", 1)],
        "credentials": {"user": "someone", "ports": [1, 2]},
        "vocabulary": {"pad_token": "<pad>", "pad_token_id": 3},
        "json": '{"password": "hunter2-x"}',
    }
    shown = masked(given)
    assert shown == {
        "model": {**given["model"], "token": SECRET},
        "headers": {"Authorization": SECRET, "Accept": "text"},
        "list": [{"apiKey": SECRET}, ("https://...@h", 1)],
        "credentials": SECRET,
        "vocabulary": given["vocabulary"],
        "json": '{"password": "[secret]"}',
    }
    assert masked(shown) == shown
    found = {"hf_abcdef", "Bearer zyxwvut", "zyxwvut", "k-123456", "abcdef", "someone", "hunter2-x"}
    assert set(config_secrets(given)) == found
    assert set(config_secrets("https://me%40x:p%40ss-word@h?token=tok-en-1&page=100000")) == {
        "me%40x:p%40ss-word", "p%40ss-word", "p@ss-word", "tok-en-1",
    }  # fmt: skip


def test_paths_and_tuples_of_the_configuration_become_plain_values(tmp_path):
    shown = changed_fields(config(tmp_path, model_init_kwargs={"where": Path("x"), "ends": (1, 2)}))
    assert shown["model_init_kwargs"] == {"where": "x", "ends": [1, 2]}


def launched(words, monkeypatch):
    """The variables of a process that `accelerate launch` starts, as they are set here."""
    assert words[:2] == ["accelerate", "launch"]
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    filled = ["1" if word == "MACHINE_RANK" else word for word in words[2:]]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*filled, "train.py"]))
    arguments.deepspeed_fields_from_accelerate_config = ""
    made = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    found = {name: value for name, value in made.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
    return arguments, found


def words_of(options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    "options",
    [
        {"fsdp_version": "2", "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
        {"fsdp_version": "2", "fsdp_reshard_after_forward": "false", "fsdp_offload_params": "true"},
        {"fsdp_version": "2", "fsdp_activation_checkpointing": "true", "fsdp_state_dict_type": "FULL_STATE_DICT"},
        {"fsdp_version": "1", "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP", "fsdp_min_num_params": "7"},
        {
            "fsdp_version": "2", "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "A,B",
        },
    ],
)  # fmt: skip
def test_the_command_restores_the_fsdp_options(options, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    begin = ["accelerate", "launch", "--num_processes", "4", "--use_fsdp"]
    _, first = launched([*begin, *words_of(options)], monkeypatch)
    words = launcher(4, "fsdp")
    assert words[:5] == begin
    for name, value in options.items():
        assert f"--{name} {value}" in " ".join(words) or value == launch_command_parser().get_default(name)
    assert launched(words, monkeypatch)[1] == first


@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": "1"},
        {"zero_stage": "2", "offload_optimizer_device": "cpu"},
        {"zero_stage": "3", "zero3_save_16bit_model": "true", "offload_param_device": "cpu"},
        {"zero_stage": "3", "zero3_init_flag": "false"},
        {"deepspeed_config_file": "ds.json"},
    ],
)
def test_the_command_restores_the_deepspeed_options(options, monkeypatch):
    several = ["--num_machines", "2", "--machine_rank", "MACHINE_RANK", "--main_process_ip", "FIRST_MACHINE"]
    standard = ["--use_deepspeed", "--deepspeed_multinode_launcher", "standard"]
    begin = ["accelerate", "launch", "--num_processes", "16", *several, *standard]
    _, first = launched([*begin, *words_of(options)], monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    words = launcher(16, "deepspeed")
    assert words[: len(begin)] == begin
    for name, value in options.items():
        assert f"--{name} {value}" in " ".join(words)
    arguments, again = launched(words, monkeypatch)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert again == first


def test_the_command_names_the_number_of_machines(server, base, tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert machines(16) == 1 and launcher(1) == ["python"]
    assert launcher(2) == ["torchrun", "--nproc_per_node", "2"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert machines(16) == 2 and machines(8) == 1
    nodes = ["--nnodes", "2", "--node_rank", "MACHINE_RANK", "--master_addr", "FIRST_MACHINE"]
    assert launcher(16) == ["torchrun", *nodes, "--nproc_per_node", "8"]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    trainer = start(base, tmp_path / NAME, push_to_hub=False)
    for count in (1, 2):
        monkeypatch.setattr("trl_toolgrpo.hub.model_card.machines", lambda processes, count=count: count)
        trainer.create_model_card()
        card = (tmp_path / NAME / "README.md").read_text(encoding="utf-8")
        assert ("On each of 2 machines, with its number" in card) == (count == 2)

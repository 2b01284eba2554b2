"""No file that a run leaves holds a secret of it: not its logs, checkpoints, tokens, report, card or trackers."""

import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import chat_tokenizer, prompts, scripted_model_sampler, tiny_model, tool_call
from synthetic_run import rollouts_of
from trl import TrlParser

from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer, ToolResult
from trl_toolgrpo.report import build_report


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")

# Words that no file may hold, by where the run knows them from
SECRETS = {
    "PGPASSWORD": "pg-4f0c9a17",
    "DB_PASSWD": "db-77c1e0b2",
    "OPENAI_API_KEY_2": "sk-second-5d1f",
    "HF_TOKEN_WRITE": "hf_write_91ab",
    "SMTP_PASS": 'with "quotes" 3c4d',
    "DATABASE_URL": "url-pass-8e21",
    "server": "mcp-key-60fe",
    "header": "header-2b9d",
    "hub": "hf_hub_c0ffee1",
    "option": "nested-77aa01",
    "command": "cmd-key-10ef5",
    "yaml": "yaml-key-31c6",
}


def tell() -> dict:
    """Tell all that a process knows."""
    known = {name: os.environ[name] for name in os.environ if name in SECRETS}
    return {"environment": known, SECRETS["PGPASSWORD"]: [SECRETS["hub"], (SECRETS["command"],)]}


def repeat(text: str) -> ToolResult:
    """
    Repeat a configuration.

    Args:
        text: Ignored.
    """
    return ToolResult("\n".join(SECRETS.values()), is_error=text == "e", reward=0.5)


def crash() -> str:
    """Fail."""
    raise RuntimeError(f"cannot log in with {SECRETS['OPENAI_API_KEY_2']} as {SECRETS['option']}")


class World:
    """An environment that shows what it was configured with."""

    def reset(self, **kwargs):
        return f"Logged in with {SECRETS['HF_TOKEN_WRITE']}."

    def look(self) -> str:
        """Look."""
        return f"A note: {SECRETS['DB_PASSWD']}"


CALLS = [
    ("tell", {}), ("repeat", {"text": "x"}), ("repeat", {"text": "e"}), ("crash", {}),
    ("look", {}), ("pid", {}), ("unknown", {}), ("tell", {"x": 1}),
]  # fmt: skip
SCRIPT = [[tool_call(name, **arguments) + "<|im_end|>", "done<|im_end|>"] for name, arguments in CALLS]


def reward(completions, log_extra, **kwargs):
    """Rewards by place."""
    log_extra("configuration", [dict(SECRETS)] * len(completions))
    return [float(row) for row in range(len(completions))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every kind of secret, and every kind of file; its folder, and the tracker's."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("secrets")
    patch = pytest.MonkeyPatch()
    for name in ("PGPASSWORD", "DB_PASSWD", "OPENAI_API_KEY_2", "HF_TOKEN_WRITE", "SMTP_PASS"):
        patch.setenv(name, SECRETS[name])
    patch.setenv("DATABASE_URL", f"postgres://admin:{SECRETS['DATABASE_URL']}@db.example/main")
    patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "out" / "board"))
    patch.setattr(sys, "argv", ["train.py", "--judge_key", SECRETS["command"], "--config", "run.yaml"])
    plain = Path(__file__).parents[1].joinpath("mcp_plain_server.py").read_text()
    server = folder / "server.py"
    server.write_text(plain.replace("str(os.getpid())", '" ".join([os.environ["SERVER_LOGIN"], sys.argv[1]])'))
    file = folder / "run.yaml"
    settings = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 4, "num_generations": 8, "max_steps": 2,
        "max_completion_length": 20_000, "logging_steps": 1, "report_to": ["tensorboard", "trackio"],
        "save_strategy": "steps", "save_steps": 1, "bf16": False, "use_cpu": True, "disable_tqdm": True,
        "gradient_checkpointing": False, "log_completions": True, "hub_token": SECRETS["hub"], "project": "secrets",
        "model_init_kwargs": {"token": SECRETS["option"]}, "run_name": "tiny", "trackio_space_id": None,
        "vllm_server_base_url": f"http://user:{SECRETS['yaml']}@host:8000", "max_tool_output_tokens": 4000,
        "steps_per_generation": 2, "seed": 1,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(settings))
    (args,) = TrlParser([ToolGRPOConfig]).parse_args_and_config(args=["--config", str(file)])
    servers = {
        "plain": {
            "command": sys.executable, "args": [str(server), SECRETS["header"]], "tools": ["pid"],
            "env": {"SERVER_LOGIN": SECRETS["server"], "AUTHORIZATION": f"Bearer {SECRETS['header']}"},
        }
    }  # fmt: skip
    scripted_model_sampler(patch, TOKENIZER, SCRIPT)
    random.seed(0)
    torch.manual_seed(0)
    trainer = ToolGRPOTrainer(
        tiny_model(TOKENIZER, max_position_embeddings=65_536), reward, args, prompts(), processing_class=TOKENIZER,
        tools=[tell, repeat, crash], environment_factory=World, mcp_servers=servers,
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card()
    trainer.save_model()
    report = build_report([folder / "out"])
    (folder / "out" / "report.html").write_text(report.html)
    shutil.copytree(os.environ["TRACKIO_DIR"], folder / "trackio")
    patch.undo()
    return trainer, folder


def hidden_in(text):
    """Secrets in a text, or in the words that JSON and Python have for them."""
    found = [name for name, secret in SECRETS.items() if secret in text]
    return found + ["SMTP_PASS"] * (r"with \"quotes\" 3c4d" in text)


def test_the_run_has_used_every_secret(run):
    """What is looked for was there: the tools told it, and the policy has read `[secret]` in its place."""
    trainer, folder = run
    assert trainer.state.global_step == 2
    rows = pq.read_table(folder / "out" / "rollouts" / "000000-000.parquet").to_pylist()
    assert len(rows) == 8 and all("[secret]" in TOKENIZER.decode(row["prompt_ids"]) for row in rows)
    told = [TOKENIZER.decode(row["completion_ids"]).count("[secret]") for row in rows]
    assert told[0] >= 8 and told[1] >= 8 and told[2] >= 8 and told[3] == 2 and told[4] == 1 and told[5] == 2
    assert told[6:] == [0, 0]
    assert trainer.args.hub_token == SECRETS["hub"] and trainer.args.model_init_kwargs["token"] == SECRETS["option"]


def test_no_file_holds_a_secret(run):
    _, folder = run
    kinds = set()
    for path in (path for path in folder.rglob("*") if path.is_file() and path.parent != folder):
        kinds.add(path.name if path.suffix in (".json", ".md", ".jsonl", ".bin") else path.suffix)
        assert hidden_in(path.read_bytes().decode("latin-1")) == [], path
    expected = {"run.json", "README.md", "metrics.jsonl", "training_args.bin", "trainer_state.json"}
    assert expected | {".parquet", ".html"} <= kinds and any(suffix.startswith(".db") for suffix in kinds)
    assert list((folder / "out" / "board").rglob("events.out.*"))


def test_no_table_holds_a_secret_in_texts_or_tokens(run):
    _, folder = run
    tables = sorted((folder / "out").rglob("*.parquet"))
    assert len({path.parent.name for path in tables}) >= 2 and len(tables) >= 3
    for path in tables:
        table = pq.read_table(path)
        for name in table.column_names:
            values = table[name].to_pylist()
            assert hidden_in(repr(values)) == [], (path, name)
            if name.endswith("_ids"):
                assert not [found for ids in values if (found := hidden_in(TOKENIZER.decode(ids)))], (path, name)
            if name == "tensors":
                for entry in (entry for row in values for entry in row):
                    ids = np.frombuffer(entry["data"], np.int64) if len(entry["data"]) % 8 == 0 else np.zeros(0, int)
                    fits = [int(id) for id in ids if 0 <= id < len(TOKENIZER)]
                    assert hidden_in(TOKENIZER.decode(fits)) == [], (path, entry["name"])


def test_the_report_holds_no_secret_in_its_rollouts(run):
    _, folder = run
    html = (folder / "out" / "report.html").read_text()
    rollouts = rollouts_of(html)
    assert rollouts and all(row["whole"] and hidden_in(repr(row)) == [] for row in rollouts)


def test_pickled_arguments_and_logs_of_a_resumed_run_hold_no_secret(run):
    _, folder = run
    args = torch.load(folder / "out" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert hidden_in(repr(vars(args))) == [] and args.hub_token is None

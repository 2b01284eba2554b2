"""Environments on threads of their own: what the training thread sees, and what tools see."""

import asyncio
import sqlite3
import threading
import time

import pytest
from conftest import ScriptedSampler, chat_tokenizer, config, prompts, tiny_model
from datasets import Dataset

from trl_toolgrpo import ConfigError, Tool, ToolCall, ToolGRPOTrainer, ToolTimeoutError
from trl_toolgrpo.rollout import engine
from trl_toolgrpo.tools.from_callable import environment_tools
from trl_toolgrpo.tools.runtime.environments import on_own_thread
from trl_toolgrpo.tools.runtime.executor import ToolExecutor


class Ledger:
    """An account in a database that only the thread that opened it may use."""

    def __init__(self):
        self.threads = {threading.get_ident()}

    def reset(self, start: int = 0, **row):
        self.threads.add(threading.get_ident())
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("CREATE TABLE account (amount INTEGER)")
        self.connection.execute("INSERT INTO account VALUES (?)", (start,))

    def deposit(self, amount: int) -> int:
        """
        Add to the account.

        Args:
            amount: How much.
        """
        self.threads.add(threading.get_ident())
        self.connection.execute("UPDATE account SET amount = amount + ?", (amount,))
        return self.balance

    @property
    def balance(self) -> int:
        return self.connection.execute("SELECT amount FROM account").fetchone()[0]

    def get_reward(self) -> float:
        return float(self.balance)


def deposit(executor, environment, amount):
    tool = next(tool for tool in environment_tools(environment) if tool.name == "deposit")
    return executor.submit(ToolCall("call", "deposit", {"amount": amount}), tool, owner=environment)


def test_an_environment_is_made_called_and_read_on_one_thread():
    executor = ToolExecutor()
    environment = on_own_thread(Ledger, executor)()
    environment.reset(start=5)
    assert deposit(executor, environment, 2).result().content == 7
    assert environment.get_reward() == 7.0
    assert len(environment.threads) == 1 and threading.get_ident() not in environment.threads


def test_properties_and_connections_can_be_used_from_the_training_thread():
    executor = ToolExecutor()
    environment = on_own_thread(Ledger, executor)()
    environment.reset(start=3)
    assert environment.balance == 3
    rows = environment.connection.execute("SELECT amount FROM account")
    assert [row[0] for row in rows] == [3]
    with environment.connection as connection:
        connection.execute("UPDATE account SET amount = 11")
    assert environment.connection.execute("SELECT amount FROM account").fetchall() == [(11,)]
    with pytest.raises(sqlite3.OperationalError):
        environment.connection.execute("SELECT nothing FROM nowhere")


def test_columns_of_any_name_reach_reset():
    class Keeps:
        def reset(self, **row):
            self.row = row

    executor = ToolExecutor()
    environment = on_own_thread(Keeps, executor)()
    environment.reset(owner="ada", function="{}", args=[1], kwargs={"a": 1}, executor=2)
    assert environment.row == {"owner": "ada", "function": "{}", "args": [1], "kwargs": {"a": 1}, "executor": 2}


def test_instances_keep_their_class_and_share_one():
    executor = ToolExecutor()
    make = on_own_thread(Ledger, executor)
    first, second = make(), make()
    assert isinstance(first, Ledger) and type(first).__name__ == "Ledger"
    assert type(first) is type(second), "TRL scores an environment by its exact class"


def test_a_factory_that_cannot_be_called_is_refused():
    with pytest.raises(ConfigError, match="cannot be called"):
        on_own_thread("Ledger", ToolExecutor())


def test_a_dict_of_factories_is_wrapped_by_name():
    made = on_own_thread({"a": Ledger, "b": Ledger}, ToolExecutor())
    assert set(made) == {"a", "b"}
    assert isinstance(made["a"](), Ledger)


def test_a_hung_environment_is_unscored_and_not_reused(tmp_path, monkeypatch):
    class Stuck(Ledger):
        def deposit(self, amount: int) -> int:
            """
            Hang.

            Args:
                amount: How much.
            """
            time.sleep(2.0)
            return amount

    tokenizer = chat_tokenizer()
    call = '<tool_call>\n{"name": "deposit", "arguments": {"amount": 1}}\n</tool_call><|im_end|>'
    script = [[call, "done<|im_end|>"], ["no<|im_end|>"]]
    sampler = ScriptedSampler(tokenizer, script, [tokenizer.eos_token_id])
    monkeypatch.setattr(engine, "make_sampler", lambda *args, **kwargs: sampler)
    seen, said = [], []

    def balance(environment):
        try:
            return float(environment.connection.execute("SELECT amount FROM account").fetchone()[0])
        except ToolTimeoutError as error:
            said.append(str(error))

    def count(completions, environments, **kwargs):
        seen.append(list(environments))
        return [balance(environment) for environment in environments]

    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        count,
        config(tmp_path, tool_timeout=0.2, logprob_check="off", max_completion_length=256),
        prompts(),
        processing_class=tokenizer,
        environment_factory=Stuck,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["tools/deposit/timeouts"] == 2.0
    assert log["rewards/Stuck/mean"] == 0.0  # of the two that were not stuck; the others were not scored
    assert log["rewards/count/mean"] == 0.0 and len(said) == 2
    assert "on the environment Stuck did not return within its time limit" in said[0] and "Connection" in said[0]
    pool = trainer._environment_pool[None]
    assert len(seen[0]) == 4 and len(pool) == 2
    assert all(environment in (seen[0][1], seen[0][3]) for environment in pool)


def test_tools_an_environment_brings_at_reset_are_rendered_and_called(tmp_path, monkeypatch):
    class Bring:
        def __init__(self):
            self.tools = []
            self.called = []

        def reset(self, prompt, **row):
            name = "tool_" + prompt[-1]["content"].split()[-1]
            schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
            self.tools = [Tool(name, "A tool of this row.", schema, lambda x: self.called.append(x) or "noted")]

    tokenizer = chat_tokenizer()
    call = '<tool_call>\n{"name": "tool_0", "arguments": {"x": 4}}\n</tool_call><|im_end|>'
    script = [[call, "done<|im_end|>"]]
    sampler = ScriptedSampler(tokenizer, script, [tokenizer.eos_token_id])
    monkeypatch.setattr(engine, "make_sampler", lambda *args, **kwargs: sampler)
    seen = {}

    def reward(prompts, completions, environments, trajectories, **kwargs):
        seen.update(called=[e.called for e in environments], trajectories=trajectories, completions=completions)
        return [0.0] * len(completions)

    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        reward,
        config(tmp_path, logprob_check="off", max_completion_length=256, shuffle_dataset=False),
        prompts(2),
        processing_class=tokenizer,
        environment_factory=Bring,
    )
    trainer.train()
    assert seen["called"] == [[4]] * 4
    rendered = tokenizer.decode(seen["trajectories"][0].prompt_ids)
    assert '"name": "tool_0"' in rendered and '"tool_1"' not in rendered
    assert seen["completions"][0][1]["content"] == "noted"


class AsyncLedger:
    def reset(self, start: int = 0, **row):
        self.amount = start

    async def get_reward(self) -> float:
        return float(self.amount)


@pytest.mark.parametrize("kind", [Ledger, AsyncLedger])
def test_names_that_share_a_class_share_its_reward(tmp_path, monkeypatch, kind):
    class Plain:
        def reset(self, **row):
            pass

        def look(self) -> str:
            """Look."""
            return "nothing"

    tokenizer = chat_tokenizer()
    script = [["done<|im_end|>"]]
    sampler = ScriptedSampler(tokenizer, script, [tokenizer.eos_token_id])
    monkeypatch.setattr(engine, "make_sampler", lambda *args, **kwargs: sampler)
    rows = [{**prompts()[0], "environment": name, "start": 3} for name in ("first", "second", "plain")]
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        args=config(tmp_path, per_device_train_batch_size=6, num_generations=2, logprob_check="off"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory={"first": kind, "second": kind, "plain": Plain},
    )
    assert trainer.reward_func_names == [kind.__name__] and trainer.reward_weights.tolist() == [1.0]
    trainer.train()
    assert trainer.state.log_history[0][f"rewards/{kind.__name__}/mean"] == 3.0
    assert trainer.state.log_history[0]["reward"] == 3.0  # of the rollouts that are scored at all


@pytest.mark.parametrize("kind", [Ledger, AsyncLedger])
def test_the_reward_of_a_class_scores_an_environment_made_by_hand(tmp_path, kind):
    tokenizer = chat_tokenizer()
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        args=config(tmp_path),
        train_dataset=prompts(),
        processing_class=tokenizer,
        environment_factory=kind,
    )
    environment = kind()
    environment.reset(start=2)
    rewards = trainer.reward_funcs[-1](environments=[environment, object()])
    assert (asyncio.run(rewards) if kind is AsyncLedger else rewards) == [2.0, None]

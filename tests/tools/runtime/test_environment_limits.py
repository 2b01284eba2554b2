"""Environments that hang, fail or are asynchronous: the rollout fails, the run goes on, and many in a row stop it."""

import asyncio
import ctypes
import dataclasses
import functools
import itertools
import math
import re
import sqlite3
import threading
import time
import typing
from pathlib import Path

import pytest
from conftest import MAKE_SAMPLER, ScriptedSampler, chat_tokenizer, config, prompts, tiny_model
from datasets import Dataset

from trl_toolgrpo import (
    ConfigError,
    EnvironmentTimeoutError,
    RewardError,
    Tool,
    ToolGRPOConfig,
    ToolGRPOTrainer,
    ToolRuntimeError,
    ToolTimeoutError,
    TransientToolError,
)
from trl_toolgrpo.tools.runtime.environments import on_own_thread
from trl_toolgrpo.tools.runtime.executor import ToolExecutor


LIMIT = 0.4
PATHS = [pytest.param(True, id="recording"), pytest.param(False, id="TRL's own path")]


def hang():
    time.sleep(3600)


def hang_in_c():
    ctypes.CDLL(None).sleep(3600)


async def hang_later():
    await asyncio.sleep(3600)


class Lab:
    """An environment whose second of four instances or rollouts can misbehave."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.number = type(self).made
        self.resets = 0

    def reset(self, **row):
        self.resets += 1

    def look(self) -> str:
        """Look."""
        return "nothing"

    def get_reward(self) -> float:
        return float(self.number % 2)


def lab(**members):
    return type("Lab", (Lab,), {"made": 0, **members})


def train(tmp_path, monkeypatch, kind, reward=None, recording=True, **changes):
    """Train; what was logged, and the environments that reward functions saw at each step."""
    tokenizer = chat_tokenizer()
    sampler = ScriptedSampler(tokenizer, [["done<|im_end|>"]] * 4, [tokenizer.eos_token_id])
    monkeypatch.setattr(MAKE_SAMPLER, lambda *args, **kwargs: sampler)
    seen = []

    def watch(completions, environments, **kwargs):
        assert len(completions) == len(environments) == len(kwargs["prompts"]) == len(kwargs["completion_ids"])
        seen.append(list(environments))
        return [0.0] * len(environments)

    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        [watch, *([reward] if reward is not None else [])],
        config(
            tmp_path,
            record_sample_logprobs=recording,
            environment_timeout=LIMIT,
            logprob_check="off",
            health_checks="off",
            **changes,
        ),
        prompts(),
        prompts(),
        processing_class=tokenizer,
        environment_factory=kind,
    )
    trainer.train()
    return trainer, trainer.state.log_history, seen


def second_time(act):
    """A method that misbehaves on the second instance that there is, and on no other."""

    def method(self, **row):
        self.resets += 1
        return act() if self.number == 2 else None

    return method


async def _reset_late(self, **row):
    return await hang_later() if self.number == 2 else None


def raiser(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize("recording", PATHS)
@pytest.mark.parametrize(
    "reset",
    [
        second_time(hang),
        second_time(hang_in_c),
        second_time(hang_later),  # gives a coroutine, and is no coroutine function
        _reset_late,
        second_time(raiser(TimeoutError("the server is silent"))),
        second_time(raiser(TransientToolError("try again"))),
    ],
    ids=["sleeps", "sleeps in C", "gives a coroutine", "async", "TimeoutError", "TransientToolError"],
)
def test_a_reset_that_fails_costs_its_rollout_alone(tmp_path, monkeypatch, caplog, recording, reset):
    _, log, seen = train(tmp_path, monkeypatch, lab(reset=reset), recording=recording, max_steps=2)
    assert [entry["environments/failures"] for entry in log[:2]] == [1.0, 0.0]
    assert [[e.number for e in found] for found in seen] == [[1, 3, 4], [1, 3, 4, 5]]
    assert log[0]["rewards/Lab/mean"] == pytest.approx(2 / 3)
    assert log[0]["reward"] == pytest.approx(2 / 3) and not math.isnan(log[0]["loss"])
    assert "`reset` of the environment Lab" in caplog.text
    if recording:
        assert log[0]["rollout/stop/environment"] == 0.25 and log[1]["rollout/stop/environment"] == 0.0


@pytest.mark.parametrize("recording", PATHS)
def test_a_constructor_that_hangs_in_one_of_many_costs_its_rollout_alone(tmp_path, monkeypatch, recording):
    class Slow(Lab):
        def __init__(self):
            super().__init__()
            if self.number == 3:
                hang()

    Slow.made = 0
    _, log, seen = train(tmp_path, monkeypatch, Slow, recording=recording, max_steps=2)
    assert [entry["environments/failures"] for entry in log[:2]] == [1.0, 0.0]
    assert [[e.number for e in found] for found in seen] == [[1, 2, 4], [1, 2, 4, 5]]


@pytest.mark.parametrize("recording", PATHS)
@pytest.mark.parametrize("kind", ["hangs", "async hangs", "raises"])
def test_a_get_reward_that_fails_leaves_its_rollout_unscored(tmp_path, monkeypatch, caplog, recording, kind):
    def reward(self):
        if self.number == 2:
            hang()
        return float(self.number)

    async def reward_async(self):
        if self.number == 2:
            await hang_later()
        return float(self.number)

    def reward_raising(self):
        if self.number == 2:
            raise TimeoutError("the judge is silent")
        return float(self.number)

    chosen = {"hangs": reward, "async hangs": reward_async, "raises": reward_raising}[kind]
    _, log, seen = train(tmp_path, monkeypatch, lab(get_reward=chosen), recording=recording, max_steps=2)
    assert [entry["environments/failures"] for entry in log[:2]] == [1.0, 0.0]
    assert log[0]["rewards/Lab/mean"] == pytest.approx((1 + 3 + 4) / 3)  # TRL asks each in turn
    assert log[0]["rewards/watch/mean"] == 0.0
    assert [e.number for e in seen[1]] == [1, 3, 4, 5]
    assert "All reward functions returned None" not in caplog.text


@pytest.mark.parametrize("recording", PATHS)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("way", ["property", "__getattr__", "method"])
def test_a_property_that_hangs_in_a_reward_function_costs_its_rollout_alone(
    tmp_path, monkeypatch, recording, asynchronous, way
):
    def value(self):
        if self.number == 2:
            hang()
        return float(self.number)

    def missing(self, name):
        if name != "value":
            raise AttributeError(name)
        return value(self)

    kind = lab(**{"property": {"value": property(value)}, "__getattr__": {"__getattr__": missing}}.get(way, {}))
    if way == "method":
        kind.value = lambda self: value(self)
        kind._value = kind.__dict__["value"]
        del kind.value
    calls = []

    def read(environments, log_extra, log_metric, **kwargs):
        calls.append(len(environments))
        log_metric("asked", 1.0)
        values = [e._value() if way == "method" else e.value for e in environments]
        log_extra("value", values)
        return values

    async def read_async(environments, **kwargs):
        return read(environments, **kwargs)

    chosen = read_async if asynchronous else read
    trainer, log, _ = train(tmp_path, monkeypatch, kind, chosen, recording=recording)
    assert calls == [4, 3] and log[0]["environments/failures"] == 1.0
    assert log[0][f"rewards/{chosen.__name__}/mean"] == pytest.approx((1 + 3 + 4) / 3)
    assert log[0]["asked"] == 1.0 and list(trainer._logs["extra"]["value"]) == [1.0, None, 3.0, 4.0]
    assert [math.isnan(value) for value in trainer._logs["rewards"]["Lab"]] == [False, True, False, False]


@pytest.mark.parametrize("recording", PATHS)
@pytest.mark.parametrize("which", ["reset", "get_reward"])
def test_many_failures_in_a_row_stop_the_run(tmp_path, monkeypatch, recording, which):
    def never(self, **row):
        hang()

    with pytest.raises(ToolRuntimeError, match=f"8 environments in a row .*`{which}` of the environment Lab"):
        train(tmp_path, monkeypatch, lab(**{which: never}), recording=recording, max_steps=4)


def test_an_evaluation_has_the_same_limit(tmp_path, monkeypatch):
    def reset(self, **row):
        if self.number == 2:
            hang()

    kind = lab(reset=reset)
    trainer, log, _ = train(tmp_path, monkeypatch, kind, eval_strategy="steps", eval_steps=1)
    assert next(entry for entry in log if "eval_reward" in entry)["eval_environments/failures"] == 0.0
    kind.reset = lambda self, **row: hang() if self.number == 3 else None
    figures = trainer.evaluate(prompts(1))
    assert figures["eval_environments/failures"] == 1.0 and not math.isnan(figures["eval_reward"])


def test_each_environment_of_several_has_the_limit_and_the_trainer_goes_on(tmp_path, monkeypatch):
    quick, slow = lab(), lab(reset=lambda self, **row: hang() if self.number == 2 else None)
    rows = [{**prompts()[0], "environment": name} for name in ("quick", "slow")]
    tokenizer = chat_tokenizer()
    sampler = ScriptedSampler(tokenizer, [["done<|im_end|>"]] * 4, [tokenizer.eos_token_id])
    monkeypatch.setattr(MAKE_SAMPLER, lambda *args, **kwargs: sampler)
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        args=config(tmp_path, num_generations=2, environment_timeout=LIMIT, logprob_check="off"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory={"quick": quick, "slow": slow},
    )
    trainer.train()
    assert trainer.state.log_history[0]["environments/failures"] == 1.0


def test_tools_of_an_environment_that_decides_them_at_reset(tmp_path, monkeypatch):
    class Deciding(Lab):
        def reset(self, **row):
            super().reset()

        @property
        def tools(self):
            if self.resets and self.number == 2:
                hang()
            return [self.look]

    Deciding.made = 0
    _, log, seen = train(tmp_path, monkeypatch, Deciding)
    assert log[0]["environments/failures"] == 1.0 and [e.number for e in seen[0]] == [1, 3, 4]


@pytest.mark.parametrize("recording", PATHS)
def test_a_reset_that_is_a_coroutine_function_is_awaited(tmp_path, monkeypatch, recording):
    class Client(Lab):
        async def reset(self, **row):
            await asyncio.sleep(0)
            return " Observed."

        async def get_reward(self) -> float:
            await asyncio.sleep(0)
            return 2.0

    Client.made = 0
    trainer, log, _ = train(tmp_path, monkeypatch, Client, recording=recording)
    assert log[0]["rewards/Client/mean"] == 2.0
    assert all(prompt[-1]["content"].endswith(" Observed.") for prompt in trainer._logs["prompt"])


def test_a_factory_that_is_a_coroutine_function_is_awaited():
    async def make():
        await asyncio.sleep(0)
        return Lab()

    assert isinstance(on_own_thread(make, ToolExecutor())(), Lab)

    async def never():
        await hang_later()

    with pytest.raises(EnvironmentTimeoutError, match="constructor of the environment never"):
        on_own_thread(never, ToolExecutor(environment_timeout=LIMIT))()


def test_a_constructor_that_hangs_at_once_is_an_error_of_construction(tmp_path):
    class Never(Lab):
        def __init__(self):
            hang()

    tokenizer = chat_tokenizer()
    started = time.monotonic()
    with pytest.raises(ToolTimeoutError, match="constructor of the environment Never"):
        ToolGRPOTrainer(
            tiny_model(tokenizer),
            args=config(tmp_path, environment_timeout=LIMIT),
            train_dataset=prompts(),
            processing_class=tokenizer,
            environment_factory=Never,
        )
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("error", [ValueError("no such row"), RuntimeError("boom"), KeyError("start")])
@pytest.mark.parametrize("place", ["reset", "get_reward", "__init__"])
def test_other_errors_of_an_environment_end_the_run_as_they_are(tmp_path, monkeypatch, place, error):
    def act(self, **row):
        if place == "__init__":
            Lab.__init__(self)
        if place != "__init__" or self.number == 2:
            raise error

    kind = lab(**{place: act})
    with pytest.raises(type(error)) as found:
        train(tmp_path, monkeypatch, kind)
    assert found.value is error


def _yielding(self, **row):
    yield "text"


async def _yielding_later(self, **row):
    yield "text"


@pytest.mark.parametrize("name", ["reset", "get_reward"])
@pytest.mark.parametrize("function", [_yielding, _yielding_later])
def test_generators_are_refused_at_construction(name, function):
    with pytest.raises(ConfigError, match=f"`{name}` of the environment Lab is a generator function"):
        on_own_thread(lab(**{name: function}), ToolExecutor())()


@pytest.mark.parametrize("observation", [("text", {}), {"text": 1}, 5, b"text"])
def test_an_observation_that_cannot_be_shown_is_named(observation):
    environment = on_own_thread(lab(reset=lambda self, **row: observation), ToolExecutor())()
    with pytest.raises(ToolRuntimeError, match=r"`reset` of the environment Lab returned .* of type "):
        environment.reset()


@pytest.mark.parametrize("observation", [None, "", "text", [{"type": "text", "text": "seen"}]])
def test_an_observation_that_can_be_shown_is_passed_on(observation):
    environment = on_own_thread(lab(reset=lambda self, **row: observation), ToolExecutor())()
    assert environment.reset() == observation


class Store(Lab):
    """An environment with a database that only the thread that opened it may use."""

    def reset(self, **row):
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("CREATE TABLE kept (n INTEGER)")
        self.connection.execute("INSERT INTO kept VALUES (7)")

    @property
    def kept(self):
        return self.connection.execute("SELECT n FROM kept").fetchone()[0]

    async def ask(self) -> int:
        """Ask."""
        await asyncio.sleep(0)
        return threading.get_ident()


@pytest.mark.parametrize("recording", PATHS)
@pytest.mark.parametrize("way", ["plain", "gather", "to_thread", "partial", "object"])
def test_an_async_reward_function_can_use_a_connection(tmp_path, monkeypatch, recording, way):
    async def score(environment):
        await environment.ask()
        rows = environment.connection.execute("SELECT n FROM kept").fetchall()
        return float(rows[0][0] + environment.kept)

    async def reward(environments, **kwargs):
        if way == "gather":
            return await asyncio.gather(*map(score, environments))
        if way == "to_thread":
            return [float(await asyncio.to_thread(lambda e=e: e.kept + e.kept)) for e in environments]
        return [await score(environment) for environment in environments]

    class Scorer:
        async def __call__(self, environments, **kwargs):
            return await reward(environments)

    chosen = {"partial": functools.partial(reward, extra=1), "object": Scorer()}.get(way, reward)
    _, log, _ = train(tmp_path, monkeypatch, type("Store", (Store,), {"made": 0}), chosen, recording=recording)
    name = {"object": "Scorer"}.get(way, "reward")
    assert log[0][f"rewards/{name}/mean"] == 14.0


def test_a_reward_function_that_does_not_catch_a_hung_tool_is_called_without_its_rollout(tmp_path, monkeypatch):
    class Stuck(Store):
        def look(self) -> str:
            """Look."""
            hang()

    tokenizer = chat_tokenizer()
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>'
    script = [[call, "done<|im_end|>"], *[["done<|im_end|>"]] * 3]
    monkeypatch.setattr(MAKE_SAMPLER, lambda *a, **k: ScriptedSampler(tokenizer, script, [tokenizer.eos_token_id]))
    sizes = []

    def reward(environments, **kwargs):
        sizes.append(len(environments))
        return [float(e.connection.execute("SELECT n FROM kept").fetchone()[0]) for e in environments]

    Stuck.made = 0
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        reward,
        config(tmp_path, tool_timeout=LIMIT, logprob_check="off", max_completion_length=256),
        prompts(),
        processing_class=tokenizer,
        environment_factory=Stuck,
    )
    trainer.train()
    assert sizes == [4, 3] and trainer.state.log_history[0]["rewards/reward/mean"] == 7.0


@pytest.mark.parametrize("wrong", [0, -1.0, math.inf, "soon"])
def test_a_limit_that_is_none_is_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match="environment_timeout"):
        config(tmp_path, environment_timeout=wrong)


def test_without_a_limit_an_environment_may_take_its_time(tmp_path, monkeypatch):
    def reset(self, **row):
        time.sleep(2 * LIMIT)

    environment = on_own_thread(lab(reset=reset), ToolExecutor(environment_timeout=None))()
    assert environment.reset() is None and environment.get_reward() == 1.0


@dataclasses.dataclass
class Record:
    """An environment that is shown by its fields."""

    number: int = 0
    made: typing.ClassVar = itertools.count(1)

    def __post_init__(self):
        self.number = next(self.made)

    def reset(self, **row):
        if self.number == 2:
            hang()

    def get_reward(self) -> float:
        return float(self.number)


@dataclasses.dataclass(slots=True)
class Slotted(Record):
    """One without a dict."""


class Shown(Record):
    """One with words of its own."""

    def __repr__(self):
        return f"Shown({self.number}, {self.view})"

    @property
    def view(self):
        return hang() if self.number == 2 else "fine"


@pytest.mark.parametrize("recording", PATHS)
@pytest.mark.parametrize("kind", [Record, Slotted, Shown])
def test_an_environment_that_failed_can_be_shown_and_blames_no_reward(tmp_path, monkeypatch, caplog, recording, kind):
    monkeypatch.setattr(Record, "made", itertools.count(1))
    _, log, seen = train(tmp_path, monkeypatch, kind, recording=recording)
    assert log[0]["environments/failures"] == 1.0 and [e.number for e in seen[0]] == [1, 3, 4]
    assert log[0]["reward"] == pytest.approx((1 + 3 + 4) / 3)
    assert "All reward functions returned None" not in caplog.text


def test_an_environment_whose_attributes_hang_has_a_text():
    environment = on_own_thread(Shown, ToolExecutor(environment_timeout=LIMIT))()
    environment.number = 1
    assert repr(environment) == "Shown(1, fine)"
    environment.number = 2
    assert "Shown object at" in repr(environment)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """An environment whose attributes cannot be set."""

    state: dict = dataclasses.field(default_factory=dict)

    def reset(self, **row):
        self.state["thread"] = threading.get_ident()
        self.state["connection"] = sqlite3.connect(":memory:")

    def answer(self) -> int:
        return self.state["connection"].execute("SELECT 7").fetchone()[0]


class Keeper(Frozen):
    """One that keeps elsewhere what is set."""

    def __init__(self):
        object.__setattr__(self, "state", {})

    def __setattr__(self, name, value):
        self.state[name] = value


@pytest.mark.parametrize("kind", [Frozen, Keeper])
def test_a_class_that_does_not_let_attributes_be_set_lives_on_its_thread(kind):
    environment = on_own_thread(kind, ToolExecutor())()
    environment.reset()
    assert environment.state["thread"] != threading.get_ident() and environment.answer() == 7
    assert "__class__" not in environment.state


CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>'


def rewarded(tmp_path, monkeypatch, kind, reward=None, turns=("done<|im_end|>",), **changes):
    """Train with the reward of the environment alone, or that of a function; what was logged."""
    tokenizer = chat_tokenizer()
    script = [list(turns)] * 4
    monkeypatch.setattr(MAKE_SAMPLER, lambda *a, **k: ScriptedSampler(tokenizer, script, [tokenizer.eos_token_id]))
    changes = {"logprob_check": "off", "health_checks": "off", "max_completion_length": 256, **changes}
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        reward,
        config(tmp_path, environment_timeout=LIMIT, tool_timeout=LIMIT, **changes),
        prompts(),
        processing_class=tokenizer,
        environment_factory=kind,
    )
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("fault", ["reset", "get_reward", "look"])
def test_a_first_batch_whose_environments_all_fail_is_no_fault_of_the_rewards(tmp_path, monkeypatch, fault):
    def get_reward(self):
        return hang() if self.number <= 4 else 1.0

    def reset(self, **row):
        if self.number <= 4:
            hang()

    def look(self) -> str:
        """Look."""
        return hang() if self.number <= 4 else "nothing"

    method = {"reset": reset, "get_reward": get_reward, "look": look}[fault]
    turns = (CALL, "done<|im_end|>") if fault == "look" else ("done<|im_end|>",)
    log = rewarded(tmp_path, monkeypatch, lab(**{fault: method}), turns=turns, max_steps=2)
    assert log[0]["environments/failures"] == (0.0 if fault == "look" else 4.0)
    assert log[0]["rewards/Lab/mean"] is None and log[0]["loss"] == 0.0
    assert log[1]["environments/failures"] == 0.0 and log[1]["rewards/Lab/mean"] > 0.0


def test_a_reward_function_that_scores_none_of_those_that_are_left_is_named(tmp_path, monkeypatch):
    def unsure(environments, **kwargs):
        return [None] * len(environments)

    class Bare(Record):
        get_reward = None

    monkeypatch.setattr(Record, "made", itertools.count(1))
    with pytest.raises(RewardError, match="`unsure` gave None or NaN for all 3,"):
        rewarded(tmp_path, monkeypatch, Bare, unsure)


class Later(Lab):
    """An environment with a tool that is a coroutine function, and calls others of its methods."""

    async def look(self) -> str:
        """Look."""
        await asyncio.sleep(0)
        return f"{await self._seen()} {self._said()}"

    async def _seen(self):
        return self.number

    def _said(self):
        return "seen"


class LaterStatic(Lab):
    @staticmethod
    async def look() -> str:
        """Look."""
        await asyncio.sleep(0)
        return "seen"


class LaterListed(Later):
    """One whose tool is in a list that `reset` makes."""

    look = None
    tools: typing.ClassVar = []

    def reset(self, **row):
        self.tools = [Tool("look", "Look.", {"type": "object", "properties": {}}, self._look)]

    async def _look(self):
        return f"{await self._seen()} {self._said()}"


class LaterAwaited(Later):
    """One whose tool is a function that gives a coroutine."""

    def look(self) -> str:
        """Look."""
        return Later.look(self)


class LaterPartial(Later):
    """One whose tool is a partial method."""

    async def _call(self, words: str) -> str:
        """
        Look.

        Args:
            words: What for.
        """
        return f"{words} {await self._seen()} {self._said()}"

    look = functools.partialmethod(_call, words="for")


@pytest.mark.parametrize("recording", PATHS)
@pytest.mark.parametrize("kind", [Later, LaterStatic, LaterListed, LaterAwaited, LaterPartial])
def test_tools_of_an_environment_may_be_coroutine_functions(tmp_path, monkeypatch, recording, kind):
    if not recording and kind in (LaterListed, LaterAwaited, LaterPartial):
        pytest.skip("TRL has no such tools")
    said = []

    def reward(completions, **kwargs):
        said.extend(m["content"] for messages in completions for m in messages if m["role"] == "tool")
        return [0.0] * len(completions)

    own = type("Lab", (kind,), {"made": 0})
    turns = (CALL, "done<|im_end|>")
    if recording:
        log = rewarded(tmp_path, monkeypatch, own, reward, turns)
        assert log[0]["tools/call_frequency"] == 1.0 and log[0]["tools/failure_frequency"] == 0.0
        assert len(said) == 4 and all("seen" in text for text in said)
    else:
        executor = ToolExecutor(environment_timeout=LIMIT)
        look = on_own_thread(own, executor, limits_tools=False)().look
        assert "seen" in asyncio.run(look())


def test_the_example_of_the_guide_runs(tmp_path):
    """With a tiny model and two short steps in place of Qwen3's."""
    guide = (Path(__file__).parents[3] / "recipes" / "GUIDE.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S) if "environment_timeout" in b)
    tokenizer = chat_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"max_steps": 2, "max_completion_length": 16, "use_cpu": True, "num_generations": 4, "report_to": "none",
             "per_device_train_batch_size": 4, "logging_steps": 1, "output_dir": str(tmp_path / "run")}  # fmt: skip
    questions = prompts(8).add_column("city", ["Riga"] * 8)
    known = {"ToolGRPOConfig": lambda **given: ToolGRPOConfig(**{**given, **sizes}), "questions": questions}
    text = block.replace("Qwen/Qwen3-0.6B", str(tmp_path / "model"))
    exec(text.replace("import ToolGRPOConfig, ToolGRPOTrainer", "import ToolGRPOTrainer"), known)
    trainer = known["trainer"]
    assert trainer.args.environment_timeout == 30.0 and trainer.state.global_step == 2
    environment = known["Orders"]()
    assert "orders" in environment.reset(city="Riga") and environment.query("select sum(amount) from orders") == [(7,)]
    scored = known["reward"]([environment] * 2, [[{"content": "It is 7."}], [{"content": "It is 8."}]])
    assert scored == [1.0, 0.0]

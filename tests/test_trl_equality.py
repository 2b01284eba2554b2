"""Over the same sampled tokens, the trainer gives the same rollouts, rewards, losses and gradients as TRL's own."""

import copy
import random

import pytest
import torch
from conftest import (
    chat_tokenizer,
    config,
    prompts,
    run_script,
    script_trl,
    scripted_model_sampler,
    telling_reward,
    tiny_model,
    tool_call,
)
from loss_options import LOSS_OPTIONS, LOSS_TYPES, run
from peft import LoraConfig, PeftModel, get_peft_model
from trl import GRPOConfig, GRPOTrainer

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.update.scoring import Scores, Scoring


END = "<|im_end|>"


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First number.
        b: Second number.
    """
    return a + b


def shout(text: str) -> str:
    """
    Write in capitals.

    Args:
        text: What to write.
    """
    return text.upper()


async def search(query: str) -> str:
    """
    Look something up.

    Args:
        query: What to look up.
    """
    return f"three results for {query}"


async def weather(city: str) -> str:
    """
    Tell the weather.

    Args:
        city: Where.
    """
    return f"rain in {city}"


class Counter:
    """An environment that counts, and scores by its count."""

    def reset(self, start: int = 0, **kwargs) -> str:
        self.count = start
        return f" Count from {start}."

    def increment(self, by: int) -> str:
        """
        Count on.

        Args:
            by: How far.
        """
        self.count += by
        return f"now {self.count}"

    def get_reward(self) -> float:
        return float(self.count)


class Notebook:
    """An environment that keeps notes."""

    def reset(self, **kwargs) -> None:
        self.notes = []

    def write(self, note: str) -> str:
        """
        Keep a note.

        Args:
            note: What to keep.
        """
        self.notes.append(note)
        return f"kept {len(self.notes)}"

    async def read(self, number: int) -> str:
        """
        Read a note.

        Args:
            number: Which one.
        """
        return self.notes[number]

    def get_reward(self) -> float:
        return 0.5 * len(self.notes)


def run_both(monkeypatch, path, script, **options):
    """Run the same rows, sampled as `script` says, through our trainer and through TRL's."""
    options = {"max_completion_length": 600, "logprob_check": "off", **options}
    return [run_script(kind, monkeypatch, path, script, **options) for kind in (ToolGRPOTrainer, GRPOTrainer)]


def without_ids(completion):
    """Return a completion as TRL writes it: no identifiers on calls and tool messages."""
    if isinstance(completion, str):
        return completion
    completion = copy.deepcopy(completion)
    for message in completion:
        message.pop("tool_call_id", None)
        for call in message.get("tool_calls", []):
            call.pop("id", None)
    return completion


def assert_equal(ours, trl, mode="train"):
    added = {"old_per_token_logps", "sampling_per_token_logps", *(["rollout"] if mode == "train" else [])}
    assert ours.batch.keys() - trl.batch.keys() == added
    assert trl.batch.keys() <= ours.batch.keys()
    for name, value in trl.batch.items():
        assert torch.equal(ours.batch[name], value), name
    for mine, theirs in zip(ours.seen, trl.seen, strict=True):
        assert mine["prompt"] == theirs["prompt"]
        assert mine["ids"] == theirs["ids"]
        assert without_ids(mine["completion"]) == theirs["completion"]
    assert trl.trainer._metrics[mode]
    assert ours.trainer._metrics[mode].keys() >= trl.trainer._metrics[mode].keys()
    for name, values in trl.trainer._metrics[mode].items():
        assert ours.trainer._metrics[mode][name] == pytest.approx(values, nan_ok=True), name
    for name in ("advantages", "prompt"):
        assert ours.trainer._logs[name] == trl.trainer._logs[name], name
    assert ours.trainer._logs["rewards"].keys() == trl.trainer._logs["rewards"].keys()
    for name, values in trl.trainer._logs["rewards"].items():
        assert list(ours.trainer._logs["rewards"][name]) == pytest.approx(list(values), nan_ok=True), name


CALL = tool_call("add", a=3, b=4)
SHOUT = tool_call("shout", text="hey")

SCRIPTS = {
    "one call then answer": [[CALL + END, f"It is 7.{END}"]],
    "two calls in sequence": [[CALL + END, SHOUT + END, f"HEY 7{END}"]],
    "parallel calls": [[f"{CALL}\n{SHOUT}\n{CALL}{END}", f"done{END}"]],
    "no call": [[f"no tool{END}"], [f"none at all{END}"]],
    "text then call": [[f"Let me see.\n{CALL}{END}", f"seven{END}"]],
    "thinking then call": [[f"<think>\nhm\n</think>\n\n{CALL}{END}", f"<think>\nah\n</think>\n\nseven{END}"]],
    "truncated in the first turn": [["far too long " * 60], [f"short{END}"]],
    "truncated after a tool result": [[CALL + END, "far too long " * 60], [f"short{END}"]],
    "different lengths": [[CALL + END, f"7{END}"], [f"no{END}"], [SHOUT + END, CALL + END, f"HEY{END}"], [f"7{END}"]],
}


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_function_tools(monkeypatch, tmp_path, name, mask_truncated):
    both = run_both(
        monkeypatch, tmp_path, SCRIPTS[name], tools=[add, shout], mask_truncated_completions=mask_truncated
    )
    assert_equal(*both)


def test_truncated_rollouts_are_masked(monkeypatch, tmp_path):
    """By known answer: a truncated rollout has no trained token, the others have all of theirs."""
    script = [["x" * 700], [CALL + END, f"7{END}"]]
    ours, _ = run_both(monkeypatch, tmp_path, script, tools=[add], mask_truncated_completions=True)
    tokens = len(chat_tokenizer()(CALL + END + f"7{END}", add_special_tokens=False)["input_ids"])
    assert ours.batch["completion_mask"].any(dim=1).tolist() == [False, True, False, True]
    assert ours.batch["num_items_in_batch"] == 2 * tokens


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_truncated_inside_a_call(monkeypatch, tmp_path, mask_truncated):
    both = run_both(
        monkeypatch,
        tmp_path,
        [[tool_call("shout", text="x" * 700) + END], [f"short{END}"]],
        tools=[add, shout],
        mask_truncated_completions=mask_truncated,
    )
    assert_equal(*both)


def test_last_allowed_call_is_answered(monkeypatch, tmp_path):
    script = [[CALL + END, SHOUT + END, f"final{END}"], [f"no call{END}"]]
    both = run_both(monkeypatch, tmp_path, script, tools=[add, shout], max_tool_calling_iterations=2)
    assert_equal(*both)
    assert both[0].completions[0][-1]["content"] == "final"


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_result_that_nearly_fills_the_token_budget(monkeypatch, tmp_path, room):
    """A result that fits stays, even if it leaves the policy few tokens to answer with, or none."""
    opening = f"\n<|im_start|>user\n<tool_response>\n7\n</tool_response>{END}\n<|im_start|>assistant\n"
    length = len(chat_tokenizer()(CALL + END + opening, add_special_tokens=False)["input_ids"]) + room
    script = [[CALL + END, f"seven{END}"], [f"no{END}"]]
    ours, trl = run_both(monkeypatch, tmp_path, script, tools=[add], max_completion_length=length)
    assert_equal(ours, trl)
    assert [t.stop_reason for t in ours.trajectories] == ["length", "stop"] * 2
    assert len(ours.seen[0]["ids"]) == length


@pytest.mark.parametrize("tools", [None, [add]])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_a_turn_that_ends_on_the_last_token_of_the_budget(monkeypatch, tmp_path, tools, mask_truncated):
    """The stop token may be the last token of the budget; one character more is truncation."""
    script = [[f"abc{END}"], [f"abcd{END}"], [END]]
    options = {"max_completion_length": 4, "mask_truncated_completions": mask_truncated}
    ours, trl = run_both(monkeypatch, tmp_path, script, tools=tools, **options)
    assert_equal(ours, trl)
    assert [t.stop_reason for t in ours.trajectories] == ["stop", "length", "stop", "stop"]


def test_results_beyond_the_context_of_the_model(monkeypatch, tmp_path):
    """TRL drops a result that would not fit the model's positions; wrongly, it counts that as a regular end."""
    script = [[CALL + END, f"seven{END}"], [f"no{END}"]]
    short = run_both(monkeypatch, tmp_path, script, tools=[add])[0]
    positions = short.batch["prompt_ids"].shape[1] + len(chat_tokenizer()(CALL + END)["input_ids"]) + 5
    options = {"tools": [add], "model_options": {"max_position_embeddings": positions}}
    ours, trl = run_both(monkeypatch, tmp_path, script, **options)
    assert [row["ids"] for row in ours.seen] == [row["ids"] for row in trl.seen]
    assert [without_ids(completion) for completion in ours.completions] == trl.completions
    assert [t.stop_reason for t in ours.trajectories] == ["tool_overflow", "stop"] * 2


def test_evaluation_is_trls(monkeypatch, tmp_path):
    script = SCRIPTS["different lengths"]
    options = {"num_generations_eval": 2, "tools": [add, shout], "training": False}
    assert_equal(*run_both(monkeypatch, tmp_path, script, **options), mode="eval")


def test_masking_out_broken_records_changes_nothing_for_sound_ones(monkeypatch, tmp_path):
    script = SCRIPTS["different lengths"]
    assert_equal(*run_both(monkeypatch, tmp_path, script, tools=[add, shout], strict_trajectories=False))


def test_async_tools(monkeypatch, tmp_path):
    one, two = tool_call("search", query="trees"), tool_call("weather", city="Rome")
    script = [[f"{one}\n{two}{END}", one + END, f"ok{END}"], [two + END, f"rain{END}"]]
    assert_equal(*run_both(monkeypatch, tmp_path, script, tools=[search, weather]))


def test_failing_and_unknown_tools_are_counted_alike(monkeypatch, tmp_path):
    script = [[tool_call("nothing", a=1) + END, f"sorry{END}"], [tool_call("add", a=1) + END, f"sorry{END}"]]
    ours, trl = run_both(monkeypatch, tmp_path, script, tools=[add])
    for name in ("tools/call_frequency", "tools/failure_frequency"):
        assert ours.trainer._metrics["train"][name] == trl.trainer._metrics["train"][name] == [1.0]


@pytest.mark.parametrize("conversational", [True, False])
def test_rollouts_without_tools(monkeypatch, tmp_path, conversational):
    prompt = [{"role": "user", "content": "hello"}] if conversational else "hello"
    script = [[f"hi{END}"], [f"good day{END}"], ["endless " * 200], [f"yes{END}"]]
    assert_equal(*run_both(monkeypatch, tmp_path, script, rows=[{"prompt": prompt}] * 4))


def test_rollouts_with_one_environment(monkeypatch, tmp_path):
    step = tool_call("increment", by=2)
    rows = [{"prompt": [{"role": "user", "content": "count"}], "start": start} for start in (1, 1, 5, 5)]
    two = [f"{step}\n{step}{END}", f"five{END}"]
    script = [[step + END, f"three{END}"], two, [f"no{END}"], two]
    both = run_both(monkeypatch, tmp_path, script, rows=rows, environment_factory=Counter, num_generations=2)
    assert_equal(*both)
    assert list(both[0].trainer._logs["rewards"]["Counter"]) == [3.0, 5.0, 5.0, 9.0]


def test_an_environment_in_addition_to_functions(monkeypatch, tmp_path):
    script = [[f"{tool_call('increment', by=2)}\n{CALL}{END}", f"ok{END}"], [CALL + END, f"ok{END}"]]
    assert_equal(*run_both(monkeypatch, tmp_path, script, tools=[add], environment_factory=Counter))


def test_rollouts_with_two_environments(monkeypatch, tmp_path):
    user = [{"role": "user", "content": "go"}]
    rows = [{"prompt": user, "environment": name} for name in ("counter", "counter", "notebook", "notebook")]
    step, write = tool_call("increment", by=2), tool_call("write", note="milk")
    script = [
        [step + END, f"two{END}"],
        [f"{step}\n{step}{END}", f"four{END}"],
        [write + END, tool_call("read", number=0) + END, f"milk{END}"],
        [f"nothing{END}"],
    ]
    factories = {"counter": Counter, "notebook": Notebook}
    both = run_both(monkeypatch, tmp_path, script, rows=rows, environment_factory=factories, num_generations=2)
    assert_equal(*both)
    assert both[0].completions[2][3] == {
        "role": "tool",
        "name": "read",
        "content": "milk",
        "tool_call_id": both[0].completions[2][2]["tool_calls"][0]["id"],
    }


def test_environments_are_reset_between_batches(monkeypatch, tmp_path):
    step = tool_call("increment", by=2)
    script = [[step + END, f"three{END}"]]
    ours, trl = run_both(monkeypatch, tmp_path, script, environment_factory=Counter)
    rows = [{"prompt": [{"role": "user", "content": "again"}], "start": 10}] * 4
    for result in (ours, trl):
        result.seen.clear()
        result.batch = result.trainer._generate_and_score_completions(copy.deepcopy(rows))
    assert_equal(ours, trl)
    assert list(trl.trainer._logs["rewards"]["Counter"]) == [12.0] * 4


def random_script(seed):
    """Return four rollouts of up to three calling turns, of parts that both trainers handle."""
    rng = random.Random(seed)
    words = ["tree", "42", "the name is", "naïve", "日本", "a\nb", "{}", '"quoted"', "  spaces  "]

    def call():
        if rng.random() < 0.5:
            return tool_call("add", a=rng.randint(-9, 99), b=rng.randint(0, 9))
        return tool_call("shout", text=rng.choice(words))

    def turn():
        text = rng.choice(["", "", f"{rng.choice(words)}\n", "<think>\nhm\n</think>\n\n"])
        return text + "\n".join(call() for _ in range(rng.choice([1, 1, 1, 2, 3]))) + END

    def answer():
        return rng.choice(words) + END if rng.random() < 0.8 else "on and on " * 300

    return [[turn() for _ in range(rng.randint(0, 3))] + [answer()] for _ in range(4)]


@pytest.mark.parametrize("seed", range(16))
def test_random_conversations(monkeypatch, tmp_path, seed):
    changes = {
        "mask_truncated_completions": seed % 2 == 0,
        "num_generations": 2 + 2 * (seed % 3 == 0),
        "scale_rewards": ["group", "batch", "none"][seed % 3],
        "loss_type": ["dapo", "grpo"][seed % 2],
        "max_completion_length": 2000,
        "pad_to_multiple_of": [None, 32][seed % 4 == 0],
    }
    assert_equal(*run_both(monkeypatch, tmp_path, random_script(seed), tools=[add, shout], **changes))


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_instruct_2507", "llama3_2"])
def test_other_templates_render_and_parse_alike(monkeypatch, tmp_path, template):
    end = chat_tokenizer(template).eos_token
    call = '{"name": "add", "parameters": {"a": 3, "b": 4}}' if template == "llama3_2" else CALL
    script = [[call + end, f"seven{end}"], [f"no{end}"]]
    both = run_both(monkeypatch, tmp_path, script, tools=[add], template=template)
    assert_equal(*both)
    assert both[0].completions[0][1]["content"] == "7"


# Updates


FOUR_TURNS = [
    [CALL + END, SHOUT + END, CALL + END, f"7{END}"],
    [f"{CALL}\n{SHOUT}{END}", f"HEY 7{END}"],
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return a batch with log-probs that the default sampler recorded through tool calls, and its model."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        tokenizer = chat_tokenizer()
        scripted_model_sampler(monkeypatch, tokenizer, FOUR_TURNS)
        path = tmp_path_factory.mktemp("recorded")
        options = {"temperature": 0.7, "per_device_train_batch_size": 2, "num_generations": 2}
        trainer = make_trainer(ToolGRPOTrainer, path, tokenizer, tools=[add, shout], **options)
        trainer.model.train()
        return trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "hello"}]}] * 2)


def make_trainer(kind, path, tokenizer, model=None, peft_config=None, tools=None, **changes):
    options = {"max_completion_length": 1000, "learning_rate": 1e-2, **changes}
    return kind(
        model if model is not None else tiny_model(tokenizer),
        telling_reward([]),
        config(path, **options),
        prompts(8),
        processing_class=tokenizer,
        tools=tools,
        peft_config=peft_config,
    )


def test_recorded_logprobs_are_the_trainers(recorded, tmp_path):
    trainer = make_trainer(GRPOTrainer, tmp_path, chat_tokenizer(), temperature=0.7)
    trainer.model.eval()
    ids = torch.cat([recorded["prompt_ids"], recorded["completion_ids"]], dim=1)
    mask = torch.cat([recorded["prompt_mask"], recorded["completion_mask"]], dim=1)
    width = recorded["completion_ids"].shape[1]
    with torch.no_grad():
        expected, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
    sampled = (recorded["completion_mask"] * recorded["tool_mask"]).bool()
    assert sampled.sum(dim=1).min() > 10
    gap = (recorded["old_per_token_logps"] - expected)[sampled].abs().max()
    assert gap < 1e-4
    assert torch.equal(recorded["old_per_token_logps"], recorded["sampling_per_token_logps"])
    assert not recorded["old_per_token_logps"][~sampled].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_are_trls(recorded, tmp_path, loss_type):
    """One step's loss with the recorded old log-probs, and TRL's, which takes its own log-probs for the old ones."""
    level = "sequence" if loss_type == "luspo" else "token"
    tokenizer = chat_tokenizer()
    losses, gradients = [], []
    for kind in (ToolGRPOTrainer, GRPOTrainer):
        options = {"temperature": 0.7, "loss_type": loss_type, "importance_sampling_level": level}
        if loss_type == "cispo":  # at TRL's default of 0.2 every ratio is clamped, and none of them matters
            options["epsilon_high"] = 5.0
        trainer = make_trainer(kind, tmp_path, tokenizer, **options)
        batch = dict(recorded)
        if kind is GRPOTrainer:
            del batch["old_per_token_logps"], batch["sampling_per_token_logps"]
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert gradients[1].abs().max() > 1e-4  # something to compare
    # VESPO weighs a rollout by exp of its summed log ratio, so that the rounding of every token adds up
    rounding = recorded["completion_ids"].shape[1] * 1e-7 if loss_type == "vespo" else 1e-6
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=rounding)
    # Of the whole gradient, since LUSPO multiplies it by the length of a rollout
    gap = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert gap <= (5 * rounding if loss_type == "vespo" else 1e-5)


def a_batch_of_rollouts():
    """Return sixteen rollouts that differ in length, calls and how they end."""
    rng = random.Random(4)
    words = ["tree", "forty-two", "the name of the employee", "naive", "so it is"]

    def turns():
        calls = [[], [CALL + END], [f"{CALL}\n{SHOUT}{END}"], [SHOUT + END, CALL + END]][rng.randrange(4)]
        return [*calls, rng.choice(words) * rng.randint(1, 3) + (END if rng.random() < 0.8 else " and on" * 200)]

    return [turns() for _ in range(16)]


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_every_optimizer_step_is_trls(monkeypatch, tmp_path, name):
    """
    Whole training steps over the same rollouts: gradients and logged losses are TRL's for every option of its loss.
    Sampling and the shuffle after it draw different numbers in the two, so that the seed is set in between.
    """
    script = a_batch_of_rollouts()
    options = {"max_completion_length": 160, **LOSS_OPTIONS[name]}

    def prepare(trainer, tokenizer):
        generate = trainer._generate_and_score_completions

        def seeded(rows):
            batch = generate(rows)
            torch.manual_seed(trainer._step)
            return batch

        trainer._generate_and_score_completions = seeded
        if isinstance(trainer, ToolGRPOTrainer):
            scripted_model_sampler(monkeypatch, tokenizer, script)
        else:
            script_trl(trainer, tokenizer, script)

    runs = [
        run(kind, tmp_path / kind.__name__, options, telling_reward([]), [add, shout], prepare, stops=())
        for kind in (ToolGRPOTrainer, GRPOTrainer)
    ]
    (ours, found), (trl, expected) = runs
    assert len(found) == len(expected) == options.get("max_steps", 1)
    # VESPO weighs a rollout by exp of its summed log ratio, so that the rounding of every token adds up
    rounding = 2e-3 if options.get("loss_type") == "vespo" else 2e-4
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 0 and (mine - theirs).norm() <= rounding * theirs.norm()
    logged = {"loss", "reward", "entropy_coef", "aux_loss", "policy_loss", "completions/mean_length", "num_tokens"}
    for mine, theirs in zip(ours.state.log_history[:-1], trl.state.log_history[:-1], strict=True):
        for figure in logged & theirs.keys():
            assert mine[figure] == pytest.approx(theirs[figure], rel=rounding, abs=1e-6), figure


@pytest.mark.parametrize("tools", [None, [add]])
def test_not_recording_is_trls_path(tmp_path, tools):
    """The same seed draws the same tokens and ends in the same parameters, bit for bit."""
    found = []
    for kind, changes in ((ToolGRPOTrainer, {"record_sample_logprobs": False}), (GRPOTrainer, {})):
        tokenizer = chat_tokenizer()
        options = {"max_steps": 2, "max_completion_length": 8, **changes}
        trainer = make_trainer(kind, tmp_path, tokenizer, tools=tools, **options)
        trainer.train()
        figures = [
            {k: v for k, v in step.items() if "time" not in k and "second" not in k}
            for step in trainer.state.log_history
        ]
        found.append((list(trainer._logs["completion"]), figures, trainer.model.state_dict()))
    (completions, figures, parameters), (expected_completions, expected_figures, expected) = found
    assert completions == expected_completions
    assert figures == expected_figures
    start = tiny_model(chat_tokenizer()).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())
    for name, value in expected.items():
        assert torch.equal(parameters[name], value), name


def test_recording_with_trls_config_class(tmp_path):
    """A script that passes TRL's own configuration keeps working, and records."""
    tokenizer = chat_tokenizer()
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = ToolGRPOTrainer(tiny_model(tokenizer), telling_reward([]), args, prompts(4), processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-4)


# No scoring pass


def count_scoring(monkeypatch):
    """Count the passes that score completions, with the model each of them runs."""
    passes = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self, model, *args, **kwargs):
        passes.append(model)
        return original(self, model, *args, **kwargs)

    packed = Scoring._pass

    def counted_packed(self, model, *args):
        passes.append(model)
        return packed(self, model, *args)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    monkeypatch.setattr(Scoring, "_pass", counted_packed)
    joined = Scores.joined

    def counted_once(parts):
        del passes[len(passes) - len(parts) + 1 :]  # the chunks of a batch count as one pass, as in TRL
        return joined(parts)

    monkeypatch.setattr(Scores, "joined", counted_once)
    return passes


TRIAL = 3
"""Number of extra passes in the first batch: without shared prompts, with them, and with other texts."""


NOT_ALIGNED = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 4}


@pytest.mark.parametrize(("beta", "lora"), [(0.0, False), (0.1, False), (0.1, True)])
def test_old_log_probs_need_no_scoring_pass(monkeypatch, tmp_path, beta, lora):
    """Four updates on one rollout batch take a pass each, the reference one for the batch, and there is no other."""
    passes = count_scoring(monkeypatch)
    counts = []
    for kind, changes in ((ToolGRPOTrainer, {"logprob_check": "off"}), (GRPOTrainer, {})):
        tokenizer = chat_tokenizer()
        options = {"max_completion_length": 6, "beta": beta, **NOT_ALIGNED, **changes}
        peft = LoraConfig(target_modules=["q_proj", "v_proj"], r=2) if lora else None
        model = tiny_model(tokenizer)
        model.save_pretrained(tmp_path / "model")  # the reference is loaded from where the model came from
        model.config._name_or_path = str(tmp_path / "model")
        trainer = make_trainer(kind, tmp_path, tokenizer, model, peft_config=peft, **options)
        passes.clear()
        trainer.train()
        counts.append(len(passes))
    references = int(beta > 0)
    assert counts == [4 + references + TRIAL, 4 + references + 1]


def test_self_check_costs_one_pass(monkeypatch, tmp_path):
    passes = count_scoring(monkeypatch)
    for check, extra in (("first", 1), ("always", 2)):  # two rollout batches of two updates
        options = {**NOT_ALIGNED, "num_iterations": 1, "logprob_check": check, "max_completion_length": 6}
        trainer = make_trainer(ToolGRPOTrainer, tmp_path, chat_tokenizer(), **options)
        passes.clear()
        trainer.train()
        assert len(passes) == 4 + extra + TRIAL


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("reference", ["adapters disabled", "first adapter"])
def test_reference_log_probs_of_a_lora_run_are_trls(tmp_path, aligned, reference):
    """The reference is the model without its adapter, or the adapter training started from, on either schedule."""
    tokenizer = chat_tokenizer()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(1)
    model = tiny_model(tokenizer)
    first = get_peft_model(copy.deepcopy(model), lora) if reference == "first adapter" else None
    trainer = make_trainer(
        ToolGRPOTrainer,
        tmp_path,
        tokenizer,
        model=copy.deepcopy(first) if first is not None else model,
        peft_config=None if first is not None else lora,
        beta=0.1,
        max_completion_length=6,
        **({"max_steps": 1} if aligned else NOT_ALIGNED),
    )
    policy = trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(policy, PeftModel)
    with torch.no_grad():  # as after a few updates
        for name, parameter in policy.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(torch.randn_like(parameter))
    policy.train()
    batch = trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "hello"}]}] * 4)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]

    def score(net):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = net(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -width - 1 : -1]
        return torch.log_softmax(logits, dim=-1).gather(-1, batch["completion_ids"][..., None])[..., 0]

    base = tiny_model(tokenizer).eval() if first is None else first.eval()
    sampled = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["ref_per_token_logps"][sampled], score(base)[sampled], atol=1e-5, rtol=1e-5)
    # and it is not the policy, whose log-probs were recorded
    torch.testing.assert_close(
        batch["old_per_token_logps"][sampled], score(policy.eval())[sampled], atol=1e-4, rtol=1e-4
    )
    assert (batch["old_per_token_logps"] - batch["ref_per_token_logps"])[sampled].abs().max() > 1e-2

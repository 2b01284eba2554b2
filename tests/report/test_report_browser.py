"""The report in a real browser: what it shows, its keyboard and its accessibility."""

import json

import pyarrow.parquet
import pytest
from chromium import chromium, find_chromium
from synthetic_run import write_rollouts, write_run

from trl_toolgrpo.report import build_report


pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_chromium() is None,
        reason="no browser was found; `apt-get install chromium`, or name one with CHROMIUM",
    ),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rollouts of the run that is shown, and the page."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run", rollouts=160, per_file=80, vocabulary=200)
    (folder / "health.jsonl").write_text(
        '{"step": 4, "rule": "kl", "level": "warning", "message": "KL grows. Lower the learning rate."}\n'
    )
    (folder / "report.html").write_text(build_report([folder]).html, encoding="utf-8")
    found = []
    for path in sorted((folder / "rollouts").glob("*.parquet")):
        found += pyarrow.parquet.read_table(path).to_pylist()
    return found, folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser, rows):
    browser.requests.clear()
    browser.show()
    browser.open(rows[1])
    browser.wait_for("document.querySelector('#token b')")
    yield browser
    assert not browser.errors
    assert [url for url in browser.requests if not url.startswith("file:")] == []


def set_filter(page, name, value):
    page.run(
        f"(() => {{ const field = document.forms.filters.elements[{json.dumps(name)}]; "
        f"field.value = {json.dumps(value)}; field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )


def shown_figures(page):
    """What the panel says of the token that is pointed at."""
    spans = page.run("[...document.querySelectorAll('#token > span')].map((span) => span.textContent)")
    return {text.rsplit(" ", 1)[0]: text.rsplit(" ", 1)[1] for text in spans[1:]} | {"who": spans[0]}


def test_verdict_curves_and_tools_are_there(page):
    text = page.run("document.body.innerText")
    assert "Needs a look: 1 warning stands at the end (kl)." in text and "Lower the learning rate." in text
    assert page.run("document.querySelectorAll('.panel svg path').length") >= 8
    assert "find_employee" in page.run("document.querySelector('#tools table').innerText")
    assert page.run("getComputedStyle(document.querySelector('.panel path')).fill") == "none"


def test_only_the_rows_in_view_are_in_the_document(page):
    assert page.run("document.querySelectorAll('.row').length") < 40
    assert page.run("document.querySelector('#rows').offsetHeight") == 160 * page.run("ROW")
    assert page.run("document.querySelector('#count').textContent") == "160 of 160 rollouts"


def test_the_keyboard_alone_reaches_every_token(page, rows):
    page.run("document.querySelector('#list').focus()")
    page.press("ArrowDown")
    page.wait_for("selected === rollouts[1] && rollout.tokens.length === rollouts[1].tokens")
    assert page.run("document.querySelector('#list').getAttribute('aria-activedescendant')") == "row-1"
    assert page.run("document.querySelector('.row[aria-selected=true]').id") == "row-1"
    page.press("Enter")
    assert page.run("document.activeElement.id") == "tokens"
    page.press("ArrowRight")
    row, place = rows[0][1], page.run("current")
    figures = shown_figures(page)
    assert f"token {place + 1} of {len(row['completion_ids'])}" in figures["who"]
    for name, column in (
        ("log-prob", "logprobs"),
        ("ratio", "ratios"),
        ("advantage", "advantages"),
        ("value", "values"),
    ):
        assert float(figures[name]) == pytest.approx(row[column][place], rel=2e-3, abs=1e-5)
    page.press("End")
    assert page.run("current") == len(row["completion_ids"]) - 1
    page.press("Escape")
    assert page.run("document.activeElement.id") == "list"
    page.press("End")
    page.wait_for("selected === rollouts[159] && rollout.tokens.length === rollouts[159].tokens")


def test_every_token_says_who_wrote_it(page, rows):
    with_tools = next(number for number, row in enumerate(rows[0]) if 0 in row["tool_mask"])
    for number in (100, 5, with_tools):
        page.run(f"choose({number})")
        page.wait_for(f"selected === rollouts[{number}] && rollout.tokens.length === rollouts[{number}].tokens")
        page.wait_for(f"document.querySelectorAll('#tokens .t').length === rollouts[{number}].tokens")
        row = rows[0][number]
        kinds = page.run("[...document.querySelectorAll('#tokens .t')].map((token) => token.className.split(' ')[1])")
        expected = [
            "forced" if forced else "sampled" if mine else "tool"
            for mine, forced in zip(row["tool_mask"], row["forced_mask"], strict=True)
        ]
        assert kinds == expected
    page.run(f"point({row['tool_mask'].index(0)})")
    assert "tool output" in shown_figures(page)["who"] and shown_figures(page)["log-prob"] == "\N{EN DASH}"


def test_filters_by_reward_stop_reason_and_tool(page, rows):
    def count():
        return int(page.run("document.querySelector('#count').textContent").split()[0])

    set_filter(page, "least", "1")
    assert count() == sum(row["reward"] >= 1 for row in rows[0])
    set_filter(page, "stop", "=length")
    assert count() == sum(row["reward"] >= 1 and row["stop_reason"] == "length" for row in rows[0])
    set_filter(page, "least", "")
    set_filter(page, "stop", "!stop")
    assert count() == sum(row["stop_reason"] != "stop" for row in rows[0])
    set_filter(page, "stop", "")
    set_filter(page, "tool", "=get_salary")
    assert count() == sum("get_salary" in row["tools"] for row in rows[0])
    set_filter(page, "tool", "!")
    assert count() == sum(not row["tools"] for row in rows[0])
    set_filter(page, "tool", "")
    set_filter(page, "order", "worst")
    assert page.run("listed[0].reward") == min(row["reward"] for row in rows[0])
    set_filter(page, "from", "99")
    assert count() == 0 and page.run("document.querySelectorAll('.row').length") == 0


def test_the_pane_shows_a_rollout_of_the_list_or_none(page, rows):
    def settled(index):
        page.wait_for(f"selected === rollouts[{index}] && rollout && rollout.tokens.length === selected.tokens")

    settled(0)
    page.run("choose(1)")
    set_filter(page, "least", "1")
    wanted = 1 if rows[0][1]["reward"] >= 1 else next(n for n, row in enumerate(rows[0]) if row["reward"] >= 1)
    settled(wanted)
    assert page.run("document.querySelectorAll('.row[aria-selected=true]').length") == 1
    set_filter(page, "from", "99")
    assert "No rollout passes these filters" in page.run("document.querySelector('#facts').innerText")
    for part in ("#tokens", "#token"):
        assert page.run(f"document.querySelector('{part}').textContent") == ""
    assert page.run("document.querySelector('#prompt').hidden && document.querySelector('#legend').hidden")
    page.run("tokens.focus()")
    page.press("ArrowRight")
    page.run("document.querySelector('#filters button[type=reset]').click()")
    page.wait_for("selected === rollouts[0] && rollout && rollout.tokens.length === selected.tokens")
    assert page.run("!document.querySelector('#legend').hidden")


def test_the_legend_follows_the_coloring(page):
    def legend():
        return page.run("document.querySelector('#keys').innerText")

    assert "sampled" in legend() and "by" not in legend()
    page.wait_for("rollout && rollout.tokens.length === selected.tokens")
    for name, said in (("logprob", "log-prob: -4 or less"), ("ratio", "0.67 or less"), ("advantage", "by advantage")):
        page.run(f"color.value = '{name}'; color.dispatchEvent(new Event('change'))")
        assert said in legend() and "forced" in legend() and "tool output" in legend()
        assert "gradient" in page.run("getComputedStyle(document.querySelector('#keys .bar')).backgroundImage")
    largest = page.run(
        "Math.max(...rollout.figures.advantage.filter((x, i) => rollout.kinds[i] === SAMPLED).map(Math.abs))"
    )
    assert f"{float(f'{largest:.3g}'):g}" in legend()
    page.run("color.value = 'kind'; color.dispatchEvent(new Event('change'))")
    assert page.run("document.querySelector('#keys .bar')") is None


def test_no_option_of_a_filter_is_without_a_name(page):
    assert page.run("[...document.querySelectorAll('#filters option')].every((option) => option.text.trim())")


def test_tokens_can_be_colored_by_each_figure(page):
    options = page.run("[...document.querySelector('#color').options].map((option) => option.value)")
    assert options == ["kind", "logprob", "ratio", "advantage", "value"]
    for option in options[1:]:
        page.run(f"color.value = {json.dumps(option)}; color.dispatchEvent(new Event('change'))")
        colors = page.run(
            "[...document.querySelectorAll('#tokens .sampled')].map((t) => getComputedStyle(t).backgroundColor)"
        )
        assert len(set(colors)) > 5, option


def test_values_are_shown_under_the_pointer(page):
    page.run("document.querySelector('.panel').scrollIntoView()")
    left, top, width, height = page.run(
        "(() => { const box = document.querySelector('.panel svg').getBoundingClientRect(); "
        "return [box.left, box.top, box.width, box.height]; })()"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + width - 3, y=top + height / 2)
    said = page.run("document.querySelector('.panel .at').textContent")
    last = page.run("JSON.parse(document.querySelector('.panel').dataset.lines)[0].at(-1)[1]")
    assert said.startswith("step 10: ") and float(said.split(": ")[1]) == pytest.approx(last, rel=1e-3)


CONTRAST = """
(() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = numbers(getComputedStyle(element).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length || element.closest('script, style, .skip')) continue;
    const style = getComputedStyle(element), svg = element.namespaceURI.endsWith('svg');
    const [a, b] = [light(numbers(svg ? style.fill : style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${element.className} ${element.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return poor;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_texts_have_enough_contrast(page, dark):
    page.show(dark=dark)
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(21, 23, 25)") == dark
    assert page.run(CONTRAST) == []


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page, tmp_path):
    page.show(width=390, height=844, phone=True)
    assert page.run("document.documentElement.scrollWidth") <= 390
    page.run("document.querySelectorAll('.row')[2].click()")
    page.wait_for("selected === rollouts[2] && rollout.tokens.length === rollouts[2].tokens")
    for name in ("light", "dark"):
        page.show(width=390, height=844, phone=True, dark=name == "dark")
        page.screenshot(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_screen_readers_get_roles_and_names(page):
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    roles = [role for role, _ in named]
    assert roles.count("listbox") >= 1 and roles.count("option") > 10 and "main" in roles and "navigation" in roles
    assert any(role in ("image", "img") and name.startswith("reward: run ") for role, name in named)
    for role, name in named:
        if role in ("listbox", "textbox", "spinbutton", "combobox", "checkbox", "button", "image", "img", "region"):
            assert name, f"a {role} without a name"


def test_a_rollout_whose_tokens_were_left_out_says_so_and_the_others_open(browser, rows, tmp_path):
    limit = rows[1].stat().st_size / 2e6
    report = build_report([rows[1].parent], max_megabytes=limit)
    assert 10 < report.shown < 150
    (tmp_path / "part.html").write_text(report.html, encoding="utf-8")
    browser.open(tmp_path / "part.html")
    browser.wait_for("document.querySelector('#count').textContent === '160 of 160 rollouts'")
    browser.run("choose(rollouts.findIndex((rollout) => !rollout.whole))")
    assert "left out" in browser.run("document.querySelector('#facts').textContent")
    assert "left out" in browser.run("document.querySelector('.row[aria-selected=true]').textContent")
    assert browser.run("document.querySelectorAll('#tokens .t').length") == 0
    assert browser.run("!document.querySelector('#whole-filter').hidden")
    browser.run("filters.elements.whole.click()")
    assert browser.run("document.querySelector('#count').textContent") == f"{report.shown} of 160 rollouts"
    assert browser.run("document.querySelectorAll('#tokens .t').length === selected.tokens && selected.tokens > 0")


def test_hostile_texts_are_shown_as_texts(browser, tmp_path):
    folder = write_run(tmp_path / "<img src=x onerror=fail()>", rollouts=8)
    hostile = "</script><img src=x onerror=fail()>\u2028<b>"
    message = {"step": 4, "rule": "kl", "level": "warning", "message": hostile}
    (folder / "health.jsonl").write_text(json.dumps(message) + "\n")
    path = next((folder / "rollouts").glob("*.parquet"))
    logged = pyarrow.parquet.read_table(path).to_pylist()
    write_rollouts(path, [row | {"stop_reason": hostile, "tools": [hostile]} for row in logged])
    (folder / "report.html").write_text(build_report([folder]).html, encoding="utf-8")
    browser.requests.clear()
    browser.open(folder / "report.html")
    browser.wait_for("document.querySelectorAll('#tokens .t').length > 0")
    assert browser.run("document.querySelectorAll('img, b:not(#facts b, #token b)').length") == 0
    assert hostile in browser.run("document.querySelector('.rules').textContent")
    assert hostile in browser.run("document.querySelector('.row').textContent")
    assert hostile in browser.run("[...document.querySelector('#filters [name=stop]').options].at(-1).text")
    assert not browser.errors and all(url.startswith("file:") for url in browser.requests)

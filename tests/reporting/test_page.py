"""The page in a real browser: it needs nothing, complains of nothing, runs nothing that is not its own, and can be read
on a phone, in the dark, on paper, without its script, and without eyes."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import spectune.reporting.page.page
from spectune.reporting.plots.style import COLOURS, GRID, INK, MUTED, PAPER
from tests.reporting.chromium import REQUIRED, Page, chromium, find
from tests.reporting.from_content import write_reports
from tests.reporting.sample import ARMS, sample
from tests.reporting.test_reporting import FULL, comparison, invented

STYLE = Path(spectune.reporting.page.page.__file__).with_name("style.css").read_text(encoding="utf-8")
MOST_BYTES = 2_000_000
EXAMPLES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sample")
    write_reports(sample(found), found)
    return found


@pytest.fixture(scope="module")
def url(folder: Path) -> str:
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def source(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find()
    if program is None:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, and there is no Chromium: apt-get install chromium")
        pytest.skip("no Chromium here: apt-get install chromium")
    with chromium(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_it_asks_for_nothing_and_complains_of_nothing(browser: Page, url: str) -> None:
    for script in (True, False):
        browser.open(url, script=script)
        assert browser.requested() == [url]
        assert browser.complaints() == []


def test_hostile_text_is_only_text(browser: Page, url: str) -> None:
    browser.open(url)
    assert browser.evaluate("window.hostile === undefined")
    assert browser.evaluate("[document.scripts.length, document.images.length]") == [1, 0]
    assert browser.evaluate("document.body.textContent.includes(\"onerror='window.hostile=1'\")")
    assert browser.evaluate("document.body.textContent.includes('{{ 7*7 }}')")


def test_the_policy_of_the_page_stops_scripts_that_are_not_its_own(browser: Page, url: str) -> None:
    browser.open(url)
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.stranger = 1'}))"
    )
    assert browser.evaluate("window.stranger === undefined")


def test_it_is_one_small_file_that_names_no_other(source: str) -> None:
    assert len(source.encode()) < MOST_BYTES
    links = re.findall(r'(?:href|src|srcset|action)="([^"]*)"', source)
    assert {link for link in links if not link.startswith("#")} == {"data:,"}
    assert re.findall(r"url\((?!#)[^)]*\)|@import", source) == []
    assert re.findall(r"https?://[^\s\"<]*", source) == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 360, 400, 768, 1280])
def test_the_page_never_scrolls_sideways(browser: Page, url: str, width: int, dark: bool) -> None:
    browser.open(url, width=width, height=800, dark=dark)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_everything_can_be_reached_without_the_script(browser: Page, url: str) -> None:
    browser.open(url, script=False)
    shown = browser.call("Runtime.evaluate", expression=VISIBLE, returnByValue=True)["result"]["value"]
    assert shown["examples"] == EXAMPLES
    assert not shown["picker"]
    assert shown["rows"] == len(ARMS) + 1
    assert not shown["buttons"]


VISIBLE = """({
  examples: [...document.querySelectorAll(".example")].filter((e) => e.checkVisibility()).length,
  picker: document.querySelector(".picker").checkVisibility(),
  rows: document.querySelector("table.sortable").tBodies[0].rows.length,
  buttons: document.querySelector("table.sortable button") !== null,
})"""


def column(browser: Page, title: str) -> list[str]:
    """Click a header of the large table; its column's texts from top to bottom."""
    found = browser.evaluate(
        f"""(() => {{
          const headers = [...document.querySelector("table.sortable").tHead.rows[1].cells];
          const index = headers.findIndex((header) => header.textContent === {title!r});
          headers[index].querySelector("button").click();
          const rows = [...document.querySelector("table.sortable").tBodies[0].rows];
          return rows.map((row) => row.cells[index].textContent);
        }})()"""
    )
    assert isinstance(found, list)
    return found


def test_the_table_sorts_by_number_both_ways_with_the_missing_last(browser: Page, url: str) -> None:
    browser.open(url)
    up, down = column(browser, "Memory"), column(browser, "Memory")
    assert up == ["88.5 MB", "92.5 MB", "99 MB", "99.5 MB", "108 MB", "110 MB", "119 MB", "131 MB", "-"]
    assert down == [*reversed(up[:-1]), "-"]
    sorted_by = "[...document.querySelectorAll('[aria-sort]')].map((h) => [h.textContent, h.getAttribute('aria-sort')])"
    assert browser.evaluate(sorted_by) == [["Memory", "descending"]]
    names = column(browser, "Method")
    assert names == sorted(names, key=str.lower)
    assert browser.evaluate(sorted_by) == [["Method", "ascending"]]


def test_one_example_is_shown_and_the_buttons_go_round(browser: Page, url: str) -> None:
    browser.open(url)
    shown = "[...document.querySelectorAll('.example')].filter((e) => e.checkVisibility()).map((e) => e.id)"
    assert browser.evaluate(shown) == ["example-1"]
    browser.evaluate("document.querySelector('[data-step=\"-1\"]').click()")
    assert browser.evaluate(shown) == [f"example-{EXAMPLES}"]
    browser.evaluate("document.querySelector('[data-step=\"1\"]').click()")
    assert browser.evaluate(shown) == ["example-1"]
    outputs = browser.evaluate("document.querySelectorAll('#example-1 .outputs li').length")
    assert outputs == len(ARMS) + 1  # and the bare base


def test_on_paper_nothing_is_folded_away(browser: Page, url: str) -> None:
    browser.open(url)
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.evaluate("[...document.querySelectorAll('.example')].every((e) => e.checkVisibility())")
    folded = "[...document.querySelectorAll('details td')].filter((e) => !e.checkVisibility())"
    assert browser.evaluate(f"{folded}.length") == 0


def test_structure_for_those_who_cannot_see_it(browser: Page, url: str) -> None:
    browser.open(url)
    problems = browser.evaluate(STRUCTURE)
    assert problems == []


STRUCTURE = """(() => {
  const bad = [];
  const say = (what, found) => { if (found) bad.push(what + ": " + found); };
  if (document.documentElement.lang !== "en") bad.push("lang");
  for (const name of ["header", "main", "nav", "footer", "h1"])
    if (document.querySelectorAll(name).length !== 1) bad.push("not one " + name);
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  say("id twice", ids.find((id, i) => ids.indexOf(id) !== i));
  for (const link of document.querySelectorAll("a"))
    if (!document.getElementById(link.getAttribute("href").slice(1))) bad.push("leads nowhere: " + link.outerHTML);
  for (const attribute of ["aria-labelledby", "for"])
    for (const e of document.querySelectorAll(`[${attribute}]`))
      for (const id of e.getAttribute(attribute).split(" "))
        if (!document.getElementById(id)) bad.push(attribute + " names nothing: " + id);
  for (const e of document.querySelectorAll("svg use"))
    if (!document.getElementById(e.getAttribute("href").slice(1))) bad.push("drawing lost: " + e.getAttribute("href"));
  for (const table of document.querySelectorAll("table")) {
    if (!table.caption || !table.caption.textContent.trim()) bad.push("no caption");
    for (const row of table.tBodies[0].rows)
      if (row.querySelectorAll('th[scope="row"]').length !== 1) bad.push("no row header");
    for (const th of table.tHead.querySelectorAll("th")) if (!th.scope) bad.push("no scope: " + th.textContent);
    const box = table.closest('.scroll[tabindex="0"][role="region"][aria-label]');
    if (!box) bad.push("a table that cannot be scrolled with the keyboard");
  }
  for (const svg of document.querySelectorAll("svg")) {
    if (svg.getAttribute("role") !== "img") bad.push("svg without role");
    if (!svg.querySelector("title").textContent || !svg.querySelector("desc").textContent) bad.push("svg untold");
    if (!svg.closest("figure").querySelector("details table")) bad.push("svg without its numbers");
  }
  let level = 0;
  for (const h of document.querySelectorAll("h1, h2, h3, h4")) {
    const next = Number(h.tagName[1]);
    if (next > level + 1) bad.push("a heading's level is left out: " + h.textContent);
    level = next;
  }
  return bad;
})()"""


def test_the_skip_link_comes_first_and_shows_itself(browser: Page, url: str) -> None:
    browser.open(url)
    press = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
    browser.call("Input.dispatchKeyEvent", type="keyDown", **press)
    assert browser.evaluate("document.activeElement.className") == "skip"
    assert browser.evaluate("document.activeElement.getBoundingClientRect().top >= 0")
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


TEXTS = """[...document.querySelectorAll("figure")].map((figure) => {
  const frame = figure.querySelector("svg").getBoundingClientRect();
  const texts = [...figure.querySelectorAll("svg text")].filter((t) => t.textContent.trim());
  return [figure.id, [frame.left, frame.top, frame.right, frame.bottom], texts.map((text) => {
    const box = text.getBoundingClientRect();
    return [text.textContent, box.left, box.top, box.right, box.bottom];
  })];
})"""


@pytest.mark.parametrize("width", [360, 1280])
def test_in_figures_no_text_is_cut_or_lies_over_another(browser: Page, url: str, width: int) -> None:
    browser.open(url, width=width)
    figures = browser.evaluate(TEXTS)
    assert len(figures) == 8 + len(ARMS)
    problems = []
    for name, frame, texts in figures:
        assert len(texts) > 6
        for number, (text, *box) in enumerate(texts):
            if box[0] < frame[0] - 1 or box[1] < frame[1] - 1 or box[2] > frame[2] + 1 or box[3] > frame[3] + 1:
                problems.append(f"{name}: {text!r} is cut")
            for other, *its in texts[number + 1 :]:
                across, down = min(box[2], its[2]) - max(box[0], its[0]), min(box[3], its[3]) - max(box[1], its[1])
                # the boxes of lines of text are higher than their letters
                if across > 1 and down > 0.35 * min(box[3] - box[1], its[3] - its[1]):
                    problems.append(f"{name}: {text!r} lies over {other!r}")
    assert problems == []


def test_figures_follow_the_page_into_the_dark(browser: Page, url: str) -> None:
    colours = """[
      getComputedStyle(document.querySelector("svg text")).fill,
      getComputedStyle(document.querySelector('svg path[style*="stroke: var(--series-0)"]')).stroke,
    ]"""
    found = []
    for dark in (False, True):
        browser.open(url, dark=dark)
        found.append(browser.evaluate(colours))
    names = ("--ink", "--series-0")
    assert found == [[rgb(palette()[dark][name]) for name in names] for dark in (False, True)]


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def palette() -> tuple[dict[str, str], dict[str, str]]:
    """The colours of the page, by day and by night."""
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    pattern = r"(--[a-z0-9-]+): (#[0-9a-f]{6});"
    day = dict(re.findall(pattern, light))
    return day, {**day, **dict(re.findall(pattern, dark.partition("* {")[0]))}


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("night", [False, True])
def test_contrast(night: bool) -> None:
    found = palette()[night]
    for ink in ("--ink", "--muted", "--link"):
        for ground in ("--paper", "--tint", "--mark"):
            assert contrast(found[ink], found[ground]) >= 4.5, (ink, ground)
    for number in range(len(COLOURS)):
        assert contrast(found[f"--series-{number}"], found["--paper"]) >= 3, number


def test_by_day_the_page_has_the_colours_of_the_figures_files() -> None:
    day, night = palette()
    assert [day[f"--series-{number}"] for number in range(len(COLOURS))] == list(COLOURS)
    assert [day[name] for name in ("--ink", "--muted", "--grid", "--paper")] == [INK, MUTED, GRID, PAPER]
    assert all(night[name] != day[name] for name in day)


def test_pictures_of_it(browser: Page, url: str, tmp_path: Path) -> None:
    """Not blank, dark in the dark. SPECTUNE_SCREENSHOTS=<folder> keeps them to be looked at."""
    kept = Path(os.environ.get("SPECTUNE_SCREENSHOTS") or tmp_path)
    kept.mkdir(parents=True, exist_ok=True)
    brightness = {}
    for name, options in {"light": {}, "dark": {"dark": True}, "phone": {"width": 360, "height": 740}}.items():
        browser.open(url, **options)  # type: ignore[arg-type]
        whole = browser.screenshot(whole=True)
        (kept / f"report-{name}.png").write_bytes(whole)
        pixels = np.asarray(imread(io.BytesIO(whole)))[..., :3]
        colours = (255 * pixels).astype(np.int64) @ (1, 256, 65536)
        assert pixels.shape[0] > 3000
        for part in np.array_split(colours, 6):  # nothing of it is empty, from top to bottom
            assert len(np.unique(part)) > 20
        brightness[name] = float(pixels.mean())
    assert brightness["dark"] < 0.3 < 0.8 < brightness["light"]
    assert brightness["phone"] > 0.8


def test_a_reason_leads_to_its_run(browser: Page, url: str) -> None:
    browser.open(url)
    proof = browser.evaluate(
        """(() => {
          const link = document.querySelector("a[aria-label='LoRA, seed 1']");
          link.click();
          const row = document.getElementById(link.hash.slice(1));
          return [row.cells[0].textContent, row.cells[1].textContent, row.matches(":target")];
        })()"""
    )
    assert proof == ["LoRA", "1", True]


@pytest.mark.parametrize(
    "case",
    [
        comparison(FULL, invented()),
        comparison(invented()),
        comparison(failed=[{"method": "lora", "label": "LoRA", "reason": "out of memory"}]),
    ],
    ids=["old", "one run", "all failed"],
)
def test_results_of_before_and_little_ones(browser: Page, case: dict[str, Any], tmp_path: Path) -> None:
    write_reports(case, tmp_path)
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.complaints() == []
    assert browser.evaluate("document.querySelector('.headline').textContent").startswith("No verdict")
    assert browser.evaluate(STRUCTURE) == []

"""The page on a phone, on paper and by keyboard: what its markup and style sheet promise and, where there is a
browser, what it shows."""

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

import lowmem_npo.report

STYLE = (Path(lowmem_npo.report.__file__).parent / "report.css").read_text(encoding="utf-8")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def blocks(query: str) -> str:
    """The rules of every @media block whose query contains `query`."""
    found = re.findall(rf"@media[^{{]*{re.escape(query)}[^{{]*\{{((?:[^{{}}]*\{{[^{{}}]*\}})*)\s*\}}", STYLE)
    assert found, query
    return "\n".join(found)


@pytest.fixture
def html(run) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_every_cell_of_a_table_of_figures_bears_the_name_of_its_column(html):
    tables = re.findall(r'<table class="figures">(.*?)</table>', html, flags=re.DOTALL)
    assert len(tables) == 2 == html.count("<table") - 1, "the answers and the leak tests; beside them the audit record"
    for table in tables:
        columns = re.findall(r"<th [^>]*>(.*?)</th>", table.partition("</thead>")[0])[1:]
        assert columns[:2] == ["before", "after"]
        lines = [re.findall(r"<td\b([^>]*)>", line) for line in table.partition("</thead>")[2].split("</tr>")]
        assert sum(map(bool, lines)) >= 5
        for cells in filter(None, lines):
            assert [re.findall('data-label="(.*?)"', cell) for cell in cells] == [[column] for column in columns]


def test_nothing_is_hidden(html):
    assert not re.search(r"display:\s*none|visibility:\s*hidden|user-scalable|maximum-scale", STYLE + html)
    phone = blocks("max-width: 41.99rem")
    assert "content: attr(data-label)" in phone
    hidden = [rule.split("{")[0].strip() for rule in re.findall(r"[^{}]+\{[^{}]*overflow: hidden[^{}]*\}", STYLE)]
    assert hidden == [".figures thead"], "whose words stand at each cell"


def test_what_may_scroll_can_be_reached_by_keyboard(html):
    regions = re.findall(r'<div class="wide"([^>]*)>', html)
    assert len(regions) == html.count("<table")
    for attributes in regions:
        assert 'role="region"' in attributes and 'tabindex="0"' in attributes
        assert re.search(r'aria-label="[^"]+"', attributes)
    assert ":focus-visible" in STYLE and not re.search(r"outline:\s*(0|none)", STYLE)
    scrolling = re.findall(r"([^{}]+)\{[^{}]*overflow(?:-x)?: (?:auto|scroll)", STYLE)
    assert [selector.strip() for selector in scrolling] == [".wide"]


def test_headings_do_not_skip_a_level_and_name_their_sections(html):
    levels = [int(level) for level in re.findall(r"<h([1-6])\b", html)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in zip(levels, levels[1:], strict=False))
    identities = set(re.findall(r'<h2 id="(.*?)"', html))
    assert set(re.findall(r'<section aria-labelledby="(.*?)"', html)) == identities


def test_it_prints_its_first_page_by_itself_and_no_cut_tables():
    paper = blocks("print")
    for rule in (".plain { break-after: page; }", ".wide { overflow: visible; }", "display: table-header-group"):
        assert rule in paper


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(scheme):
    """WCAG 2, level AA: 4.5 to 1."""
    colours = dict(re.findall(r"--(\w+): (#\w+)", re.findall(r":root \{([^}]*)\}", STYLE)[scheme]))
    for text in ("ink", "soft", "good", "mixed", "bad", "unknown"):
        for ground in ("paper", "card", "code"):
            light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize("width", [320, 390, 700, 1200])
def test_no_width_cuts_anything_off(html, tmp_path, width):
    """In a real browser: nothing on the page, but the drawings' inside, is further right than the page is wide."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><iframe style="width:{width}px;height:900px;border:0"
        srcdoc="{escape(html)}" onload="
          const page = this.contentDocument, cells = [...page.querySelectorAll('td, h1, h2, p, li, dd, dt, pre')];
          const beyond = cells.filter(cell => cell.getBoundingClientRect().right > {width} + 0.5 ||
            !cell.getBoundingClientRect().width || cell.scrollWidth > cell.clientWidth + 1);
          document.body.append(`cells ${{cells.length}} beyond ${{beyond.length}} ` +
            `wide ${{page.documentElement.scrollWidth}} end ` + beyond.map(cell => cell.outerHTML.slice(0, 80)));
        "></iframe>""",
        encoding="utf-8",
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [BROWSER, *options, "--window-size=1400,1000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=600,
    ).stdout  # fmt: skip
    result = re.search(r"cells (\d+) beyond (\d+) wide (\d+) end(.*)", shown.rpartition("</iframe>")[2])
    assert result, shown[-2000:]
    assert int(result[1]) > 50 and int(result[2]) == 0 and int(result[3]) <= width, result[0]


def test_right_to_left_rows_stand_at_the_right(html):
    assert re.search(r'<dd dir="auto"><bdi>القبطان', html) and re.search(r'<p dir="auto"><bdi>[^<]*من هو', html)
    assert re.search(r"\.example bdi \{[^}]*display: block", STYLE)

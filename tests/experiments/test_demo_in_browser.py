"""The demo's page in headless Chromium: on a desk and on a phone, in light and in dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import browser
from helpers.demo_report import demo_report

from hylora_kernels.experiments.demo import page as demo_page

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None,
    reason=f"no {', '.join(browser.NAMES)} on the PATH (Debian: apt-get install chromium)",
)


@pytest.fixture(scope="module")
def page():
    return demo_page.render(demo_report(), Path("runs/demo"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_can_be_read(page, width, dark, tmp_path):
    found = browser.probe(page, tmp_path, width, dark)
    assert (found["width"], found["dark"], found["errors"]) == (width, dark, [])
    assert found["pageWidth"] <= width and found["tooWide"] == []
    assert [region["columns"] for region in found["regions"]] == [8, 8, 5, 10, 4]
    for region in found["regions"]:
        assert region["hidden"] == [] and region["sticks"], region
    assert found["pictures"] == 6 and found["cutOff"] == []
    assert found["smallestInPictures"] >= 10 and found["smallest"] >= 12
    assert found["pale"] == []


def test_on_a_desk_no_table_scrolls(page, tmp_path):
    wide = page.replace(".scroll { overflow-x: auto;", ".scroll {")
    assert wide != page
    found = browser.probe(wide, tmp_path, 1280)
    assert found["pageWidth"] <= 1280 and found["tooWide"] == []


BROKEN = """<!doctype html><html><head><style>tr > :first-child { position: static }</style></head>
<body style="background: #fff"><p id="wide" style="width: 900px; color: #ccc">wide</p>
<svg viewBox="0 0 100 10" width="300"><text x="98" y="9" font-size="2">letters</text></svg>
<div class="scroll" style="width: 100px; overflow: hidden"><table>
<tr><th>first</th><th style="min-width: 300px">second</th></tr></table></div>
<script>console.error("broken")</script></body></html>"""


def test_the_probe_sees_what_is_broken(tmp_path):
    found = browser.probe(BROKEN, tmp_path, 400)
    assert found["pageWidth"] > 400 and found["tooWide"] == ["P wide"]
    (region,) = found["regions"]
    assert region["hidden"] == ["TH second"] and not region["sticks"]
    assert found["smallestInPictures"] == pytest.approx(6)
    assert found["cutOff"] == ["text letters"]
    assert found["pale"][0].startswith("P wide") and found["errors"] == ["broken"]

"""A page in headless Chromium: the page as the browser lays it out, measured by a script in it.

Debian and Ubuntu: apt-get install chromium. No driver and no Python package is needed.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

ERRORS = """<script>
const errors = [];
const keep = event => errors.push(String(event.message || event.target.outerHTML));
addEventListener("error", keep, true);
for (const level of ["error", "warn"]) console[level] = (...words) => errors.push(words.join(" "));
</script>"""

# Opens all details, scrolls every region to each of its columns, and leaves what it found as JSON
# in <pre id="found"> of the page around it.
PROBE = """<script>
for (const details of document.querySelectorAll("details")) details.open = true;
const shown = [...document.body.querySelectorAll("*")].filter(element => element.checkVisibility());
const box = element => element.getBoundingClientRect();
const words = element => element.tagName + " " + element.textContent.trim().slice(0, 40);
const scrolls = element => element.closest(".scroll, caption");
const hasText = element => [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());

function regions() {
  return [...document.querySelectorAll(".scroll")].map(region => {
    const rows = [...region.querySelectorAll("tr")], first = rows[0].cells[0];
    const hidden = [...rows[0].cells].slice(1).filter(cell => {
      region.scrollLeft = 0;
      region.scrollLeft = box(cell).left - box(first).right;
      return box(cell).left < box(first).right - 1 || box(cell).right > box(region).right + 1;
    }).map(words);
    region.scrollLeft = region.scrollWidth;
    const sticks = rows.every(row => Math.abs(box(row.cells[0]).left - box(region).left) < 3);
    region.scrollLeft = 0;
    return {label: region.ariaLabel, columns: rows[0].cells.length, hidden, sticks};
  });
}

function letters(text) {
  const m = text.getScreenCTM();
  return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(m.a, m.b);
}

function cutOff(text) {
  const inner = box(text), outer = box(text.closest("svg"));
  return inner.left < outer.left - 1 || inner.right > outer.right + 1
    || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
}

function luminance(colour) {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(part => {
    const share = part / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(element) {
  const style = getComputedStyle(element);
  const ink = luminance(element.closest("svg") ? style.fill : style.color);
  let under = element;
  const back = () => getComputedStyle(under).backgroundColor;
  while (under && /, 0\\)$/.test(back())) under = under.parentElement;
  const paper = luminance(under ? back() : "rgb(255, 255, 255)");
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}

const texts = [...document.querySelectorAll("svg text")];
const outside = shown.filter(element => !element.closest("svg"));
const readable = shown.filter(element => hasText(element) && !element.closest("caption, title"));
const size = element => parseFloat(getComputedStyle(element).fontSize);
const beyond = element => !scrolls(element) && box(element).right > innerWidth + 0.5;
const found = {
  width: innerWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  pageWidth: document.documentElement.scrollWidth,
  tooWide: outside.filter(beyond).map(words),
  regions: regions(),
  pictures: document.querySelectorAll("svg").length,
  smallestInPictures: Math.min(...texts.map(letters)),
  smallest: Math.min(...outside.filter(element => readable.includes(element)).map(size)),
  cutOff: texts.filter(cutOff).map(words),
  pale: readable.filter(e => contrast(e) < 4.5).map(e => words(e) + " " + contrast(e).toFixed(2)),
  errors,
};
const pre = parent.document.createElement("pre");
pre.id = "found";
pre.textContent = JSON.stringify(found);
parent.document.body.append(pre);
</script>"""

# A headless window is at least 500 pixels wide; a frame is as wide as it is told to be.
FRAME = """<!doctype html><html style="color-scheme: light dark"><body style="margin: 0">
<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{page}"></iframe>
</body></html>"""


def probe(page: str, folder: Path, width: int, dark: bool = False) -> dict:
    """What PROBE finds in the page, shown `width` pixels wide in light or dark colours."""
    file = folder / "probed.html"
    page = page.replace("<head>", f"<head>{ERRORS}", 1).replace("</body>", f"{PROBE}</body>", 1)
    file.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    dom = _run(folder, max(width, 500), 900, dark, "--dump-dom", file)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))


def screenshot(file: Path, picture: Path, width: int, height: int, dark: bool = False) -> None:
    """The top `height` pixels of an .html file as a .png."""
    _run(picture.parent, width, height, dark, f"--screenshot={picture}", file)


def _run(folder: Path, width: int, height: int, dark: bool, what: str, file: Path) -> str:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",  # as root it starts only so; the page is our own
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={width},{height}",
        what,
        file.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""Checks the reports in Chromium without a window, as a person would see them: `make report-check`.

Run as ``python tests/browser/check_pages.py [RESULTS] [--shots DIR]``. Without RESULTS, slides are drawn and
counted first, and some images are broken, missing or have odd names. At 1280 and 400 pixels, in light and
dark colours: no message in the console, no request beyond the page, nothing wider than the window, contrast,
headings, texts of pictures, and a walk with the keyboard alone. Prints what it measured. Exit 1 if something
is wrong.

Uses the DevTools protocol through a pipe, so Debian's ``chromium`` is the only package that it needs.
"""

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Final

CHROMIUM: Final = ("chromium", "chromium-browser", "google-chrome")
_WIDTHS_PX: Final = (1280, 400)
_PATIENCE_S: Final = 60.0
_TALLEST_PX: Final = 9000  # Chromium makes no larger picture
_OPENS_WITHIN_S: Final = 2.0  # issue 6

# WCAG 2.1, 1.4.3: relative luminance and contrast. Large text may have 3. A background may be a parent's.
_CONTRAST: Final = """
(() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const channel = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("style, title") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const inSvg = element.namespaceURI.endsWith("svg");
    const a = luminance(rgb(inSvg ? style.fill : style.color)), b = luminance(ground(element));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const px = parseFloat(style.fontSize);
    const large = px >= 24 || (px >= 18.66 && parseInt(style.fontWeight) >= 700);
    const key = `${element.tagName}.${element.getAttribute("class") || ""}`;
    const margin = contrast / (large ? 3 : 4.5);
    const text = node.data.trim().slice(0, 40);
    if (!(key in found) || margin < found[key][1]) found[key] = [contrast, margin, text];
  }
  return Object.entries(found).sort((x, y) => x[1][1] - y[1][1]);
})()
"""

_STRUCTURE: Final = """
(() => {
  const wrong = [];
  if (!document.documentElement.lang) wrong.push("no lang");
  if (!document.title) wrong.push("no title");
  if (document.querySelectorAll("h1").length !== 1) wrong.push("not one h1");
  if (document.querySelectorAll("main").length !== 1) wrong.push("not one main");
  let level = 0;
  for (const h of document.querySelectorAll("h1, h2, h3, h4")) {
    const own = Number(h.tagName[1]);
    if (own > level + 1) wrong.push(`heading jumps to ${h.tagName}: ${h.textContent}`);
    level = own;
  }
  for (const img of document.images) if (!img.alt) wrong.push("a picture without alt");
  for (const svg of document.querySelectorAll("svg"))
    if (!svg.getAttribute("aria-hidden") && !svg.getAttribute("aria-label")) wrong.push("svg without text");
  for (const a of document.querySelectorAll('a[href^="#"]'))
    if (!document.getElementById(a.getAttribute("href").slice(1))) wrong.push(`dead link ${a.href}`);
  if (document.scripts.length) wrong.push("a script");
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  if (new Set(ids).size !== ids.length) wrong.push("an id twice");
  for (const img of document.images)
    if (img.complete && !img.naturalWidth) wrong.push(`broken picture ${img.alt}`);
  return wrong;
})()
"""


class Browser:
    """A Chromium without a window. Commands and answers are JSON that ends in NUL, through two pipes."""

    def __init__(self, program: str, profile: Path) -> None:
        command_read, self._commands = os.pipe()
        self._answers, answer_write = os.pipe()
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{command_read} 4>&{answer_write}', "browser", program),
                *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu"),
                *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
                *(f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = ""
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Sends a command and returns its answer. Events before the answer are kept."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if getattr(self, "_session", ""):
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        while not any(e.get("method") == event for e in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """Returns what an expression gives in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def _read(self) -> dict[str, Any]:
        end_s = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end_s - time.monotonic()))
            part = os.read(self._answers, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("chromium does not answer")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    # -- as a person does -----------------------------------------------------------------------------

    def show(self, width_px: int, *, height_px: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=1,
            mobile=width_px < 600,
        )

    def light_up(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])

    def open(self, page: Path, fragment: str = "") -> float:
        """Opens a page. Returns after how many seconds it is loaded and painted."""
        self.events.clear()
        self.call("Page.navigate", url="about:blank")
        self.wait_for("Page.loadEventFired")  # else its event would be taken for the page's
        self.events.clear()
        started_s = time.perf_counter()
        self.call("Page.navigate", url=page.absolute().as_uri() + fragment)
        self.wait_for("Page.loadEventFired")
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        if self.value("location.href.split('#')[0]") != page.absolute().as_uri():
            raise RuntimeError(f"{page}: another page is shown")
        return time.perf_counter() - started_s

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        text = "\r" if key == "Enter" else ""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text=text if kind == "keyDown" else "",
            )

    def shoot(self, file: Path) -> None:
        answer = self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(answer["data"]))

    def shoot_whole(self, file: Path, width_px: int) -> None:
        """Makes the window as tall as the page: what is out of sight is not painted."""
        height_px = min(self.value("document.documentElement.scrollHeight"), _TALLEST_PX)
        self.show(width_px, height_px=height_px)
        time.sleep(0.5)
        self.shoot(file)
        self.show(width_px)

    def print(self, file: Path) -> None:
        answer = self.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        file.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts Chromium. Without Chromium, says so and ends the program."""
    program = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if program is None:
        print("skipped: there is no chromium here (Debian: apt install chromium)")
        raise SystemExit(0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        opened = Browser(program, Path(profile))
        try:
            yield opened
        finally:
            opened.close()


def wrong_with(window: Browser, page: Path, shots: Path) -> list[str]:
    """Checks one page in every way. Prints what was measured, and returns what is wrong."""
    wrong: list[str] = []
    for width_px in _WIDTHS_PX:
        for dark in (False, True):
            where = f"{page.stem}-{width_px}{'-dark' if dark else ''}"
            window.show(width_px)
            window.light_up(dark=dark)
            time_s = window.open(page)
            told = [
                e for e in window.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
            ]
            told += [e for e in window.events if e.get("method") == "Runtime.consoleAPICalled"]
            wrong += [f"{where}: console: {json.dumps(e['params'])[:300]}" for e in told]
            urls = [
                e["params"]["request"]["url"]
                for e in window.events
                if e.get("method") == "Network.requestWillBeSent"
            ]
            wrong += [
                f"{where}: asks for {url[:200]}"
                for url in urls
                if not url.startswith("data:") and url != page.absolute().as_uri()
            ]
            wide = window.value("document.scrollingElement.scrollWidth - innerWidth")
            if wide > 0:
                wrong.append(f"{where}: {wide} px wider than the window")
            contrasts = window.value(_CONTRAST)
            wrong += [
                f"{where}: contrast {c:.2f} of {key}: {text!r}" for key, (c, m, text) in contrasts if m < 1
            ]
            if time_s > _OPENS_WITHIN_S:
                wrong.append(f"{where}: opens in {time_s:.2f} s")
            window.shoot(shots / f"{where}.png")
            window.shoot_whole(shots / f"{where}-whole.png", width_px)
            if window.value("Boolean(document.getElementById('fields'))"):
                window.value("document.getElementById('fields').scrollIntoView()")
                time.sleep(0.3)  # until the pictures that came into sight are painted
                window.shoot(shots / f"{where}-gallery.png")
            least = min((c for _, (c, _, _) in contrasts), default=21.0)
            print(f"{where:40} {time_s:5.2f} s  {len(urls)} requests, least contrast {least:.1f}")
    wrong += [f"{page.stem}: {each}" for each in window.value(_STRUCTURE)]
    window.show(1280)
    window.light_up(dark=False)
    window.open(page)
    wrong += [f"{page.stem}: {each}" for each in _walk(window, shots / f"{page.stem}-open.png")]
    window.print(shots / f"{page.stem}.pdf")
    return wrong


def _walk(window: Browser, shot: Path) -> Iterator[str]:
    """Goes from the top to a picture, opens it, to the next, and closes it: by Tab and Enter alone."""
    has_pictures = window.value("document.querySelectorAll('figure').length")
    focus = "(document.activeElement.closest('figure') || {}).id || ''"
    for _ in range(window.value("document.querySelectorAll('a, summary, [tabindex]').length") + 5):
        window.press("Tab")
        style = window.value(
            "(() => { const s = getComputedStyle(document.activeElement); const r ="
            " document.activeElement.getBoundingClientRect(); return [document.activeElement.tagName,"
            " s.outlineStyle, parseFloat(s.outlineWidth), r.width * r.height] })()"
        )
        if style[0] == "BODY":
            break
        if style[1] == "none" or style[2] < 1:
            yield f"the focus cannot be seen on {style[0]}"
        if window.value(focus):
            break
    if not has_pictures:
        return
    first = window.value(focus)
    if not first:
        yield "no picture is reached by Tab"
        return
    before = window.value(f"document.querySelector('#{first} img').clientWidth")
    window.press("Enter")
    if window.value("location.hash") != f"#{first}":
        yield "Enter does not open the picture"
    after = window.value(f"document.querySelector('#{first} img').clientWidth")
    if not after > before:
        yield f"an opened picture is not larger: {before} px, {after} px"
    window.shoot(shot)
    print(f"{'by keyboard':40} picture {first}: {before} px wide, opened {after} px")
    for word, test in (
        ("Next", f"location.hash !== '#{first}'"),
        ("Close", "!document.querySelector('figure:target')"),
    ):
        for _ in range(6):
            window.press("Tab")
            if window.value("document.activeElement.textContent") == word:
                break
        else:
            if word == "Close" or has_pictures > 1:
                yield f"{word} is not reached by Tab"
            continue
        window.press("Enter")
        if not window.value(test):
            yield f"{word} does nothing"


def draw_results(folder: Path) -> Path:
    """Counts the demo's slides and a few broken and odd files. Returns the results."""
    from rbc_edge.ops.demo import run_demo

    with redirect_stdout(StringIO()):
        run_demo(folder, bundle=None, threads=0, seed=0, json_output=True)
    images = folder / "images"
    odd = images / "<script>alert(1)</script> \u202eodd & \u00fcber, a very long name of a slide " / "deep"
    odd.mkdir(parents=True)
    for number, image in enumerate(sorted((images / "rose").iterdir())):
        shutil.copy(image, odd / f"<b>&\"'{number}{image.suffix}")
    cut = images / "cream" / "field-99.jpg"
    cut.write_bytes((images / "cream" / "field-01.jpg").read_bytes()[:9000])
    (images / "broken").mkdir()
    (images / "broken" / "a.jpg").write_bytes(b"")
    gone = images / "grey" / "field-03.png"
    command = [sys.executable, "-m", "rbc_edge"]
    out = folder / "results"
    subprocess.run([*command, "run", images, "--out", out, "--overlays", "--quiet"], check=False)
    gone.unlink()
    subprocess.run([*command, "report", "--out", out], check=True, stdout=subprocess.DEVNULL)
    return out


def main() -> None:
    """Opens every page of the reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="?", type=Path, help="an output folder with reports/")
    parser.add_argument("--shots", type=Path, help="keep screenshots and prints there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, browser() as window:
        shots = asked.shots or Path(temporary) / "shots"
        shots.mkdir(parents=True, exist_ok=True)
        results = asked.results or draw_results(Path(temporary) / "demo")
        pages = sorted((results / "reports").glob("*.html"))
        if not pages:
            raise SystemExit(f"{results}: no reports/*.html there; run `rbc-edge report --out {results}`")
        wrong: list[str] = []
        for page in pages:
            print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")
            wrong += wrong_with(window, page, shots)
    for each in wrong:
        print(f"WRONG  {each}")
    print(f"{len(pages)} pages, {len(wrong)} wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()

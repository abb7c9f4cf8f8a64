"""Reviews a folder in Chromium without a window, as a technician would: `make review-check`.

Run as ``python tests/browser/check_review.py [--shots DIR]``. The service counts drawn slides with the toy
bundle, and goes on while the page is used. Cells are corrected by mouse and keys, one is added, a field is
excluded, something is undone, the server is killed and started again. The tables have to show all of it. At
1280 and 400 pixels, in light and dark colours: no message in the console, no request to elsewhere, nothing
wider than the window, contrast. Prints what it did. Exit 1 if something is wrong.
"""

import argparse
import csv
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from check_pages import _CONTRAST, Browser, browser

from rbc_edge.ops.synthetic import CREAM, draw_slide

_PATIENCE_S: Final = 240.0
_TOY: Final = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"
_PROGRAM: Final = (sys.executable, "-m", "rbc_edge")


class Page:
    """The review page in a browser."""

    def __init__(self, window: Browser, axe: Path | None) -> None:
        self.window, self.axe = window, axe
        self.wrong: list[str] = []

    def check(self, what: str, holds: bool, shown: object = "") -> None:
        """Prints one check, and keeps it where it fails."""
        print(f"{'ok    ' if holds else 'WRONG '}  {what}{f': {shown}' if shown != '' else ''}", flush=True)
        if not holds:
            self.wrong.append(what)

    def open(self, address: str) -> float:
        """Opens an address, and returns after how many seconds it shows something."""
        self.window.call("Page.navigate", url="about:blank")
        started_s = time.perf_counter()
        self.window.call("Page.navigate", url=address)
        self.until("document.querySelector('h1') && document.querySelector('.list, #counts')")
        return time.perf_counter() - started_s

    def until(self, expression: str) -> Any:
        """Waits until an expression is true in the page."""
        end_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end_s:
            with suppress(RuntimeError):  # between two pages
                if value := self.window.value(f"Boolean({expression})"):
                    return value
            time.sleep(0.05)
        raise RuntimeError(f"never: {expression}; {self.window.value('document.body.innerText')}")

    def value(self, expression: str) -> Any:
        return self.window.value(expression)

    def mouse(self, kind: str, x: float, y: float) -> None:
        buttons = 0 if kind == "mouseReleased" else 1
        self.window.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1
        )

    def click(self, selector: str) -> None:
        """Clicks the middle of an element with the mouse."""
        self.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        x, y = self.value(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def key(self, key: str) -> None:
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        code = {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, ord(key.upper()) if len(key) == 1 else 0)
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if kind == "keyDown" and text else {}
            self.window.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def type(self, text: str) -> None:
        self.window.call("Input.insertText", text=text)

    def shoot(self, shots: Path, name: str) -> None:
        """Takes pictures of a view at two widths, and checks how it looks."""
        for width_px in (1280, 400):
            for dark in (False, True):
                self.window.show(width_px)
                self.window.light_up(dark=dark)
                time.sleep(0.4)
                where = f"{name}-{width_px}{'-dark' if dark else ''}"
                wide = self.value("document.scrollingElement.scrollWidth - innerWidth")
                self.check(f"{where}: not wider than the window", wide <= 0, wide)
                low = [
                    f"{key} {c:.1f}"
                    for key, (c, m, _) in self.value(_CONTRAST)
                    if m < 1 and "cell" not in key
                ]
                self.check(f"{where}: contrast", not low, ", ".join(low))
                self.window.shoot(shots / f"review-{where}.png")
        names = self.value(
            "[...document.querySelectorAll('button, input, select, a')].filter((e) => !(e.textContent.trim()"
            " || e.getAttribute('aria-label') || (e.labels && e.labels.length))).map((e) => e.outerHTML)"
        )
        self.check(f"{name}: everything that can be used has a name", not names, names)
        if self.axe is not None:
            self.value(f"{self.axe.read_text(encoding='utf-8')};0")
            found = self.value("axe.run().then((r) => r.violations.map((v) => `${v.impact} ${v.id}`))")
            self.check(f"{name}: axe-core finds nothing", not found, found)
        self.window.show(1280)
        self.window.light_up(dark=False)


@contextmanager
def process(*arguments: object, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of the program that ends with this one."""
    started = subprocess.Popen([*_PROGRAM, *map(str, arguments)], text=True, **more)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()
        started.wait(timeout=60)


def review(out: Path, *more: str) -> Any:
    """The server of the page, and its address on its standard output."""
    return process("review", "--out", out, "--bundle", _TOY, *more, stdout=subprocess.PIPE)


def address_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    if not address.startswith("http://127.0.0.1:"):
        raise RuntimeError(f"no address: {address!r}")
    return address


def draw(camera: Path, slide: str, n: int, *, seed: int, first: int = 0) -> None:
    """Saves fields as a camera does: each file complete at once."""
    fields = draw_slide(
        np.random.default_rng(seed),
        n,
        width_px=640,
        height_px=480,
        cell_diameter_px=40.0,
        crowding=0.25,
        stain=CREAM,
    )
    (camera / slide).mkdir(parents=True, exist_ok=True)
    for i, field in enumerate(fields, first):
        whole = camera / f".{slide}-{i}.png"
        cv2.imwrite(str(whole), cv2.cvtColor(field.image, cv2.COLOR_RGB2BGR))
        whole.rename(camera / slide / f"field-{i:02}.png")


def table(out: Path, name: str) -> list[dict[str, str]]:
    path = out / name
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def wait(for_it: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + _PATIENCE_S
    while not for_it():
        if time.monotonic() > end_s:
            raise RuntimeError(f"never: {what}")
        time.sleep(0.2)


def correct(page: Page, n: int) -> int:
    """Corrects cells of the field that is shown, each by a click and a key. Returns how many are changed."""
    done = page.value("field.n_corrected")
    page.value("document.getElementById('view').scrollIntoView()")
    # Of cells that lie over each other, the upper one is clicked.
    free = page.value(
        "field.cells.map((c) => c.number).filter((n) => { const e = document.querySelector("
        "`.cell[data-number='${n}'] .shape`), r = e.getBoundingClientRect();"
        " return document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2) === e; })"
    )
    for number in free[:n]:
        label = page.value(f"field.cells[{number - 1}].label")
        key = "wpxo"[number % 4] if label == "rbc_single" else "s"
        page.click(f".cell[data-number='{number}'] .shape")
        page.until(f"chosen === {number}")
        page.key(key)
        done += 1
        page.until(f"field.n_corrected === {done}")
    return n


def use(page: Page, out: Path, camera: Path, shots: Path) -> None:
    """Does what the issue asks for."""
    with review(out) as server:
        address = address_of(server)
        page.window.events.clear()
        time_s = page.open(address)
        page.check("the first page opens in a second", time_s < 1, f"{time_s:.2f} s")
        page.check("the secret is not in the window's address", "token" not in page.value("location.href"))
        page.shoot(shots, "slides")
        page.click(".list a")
        page.until("document.querySelectorAll('#fields a').length === 6")
        page.shoot(shots, "fields")
        page.key("/")
        page.type("-03")
        page.until("document.querySelectorAll('#fields a').length === 1")
        page.value(
            "(() => { const f = document.getElementById('filter'); f.value = '';"
            " f.dispatchEvent(new Event('input')); f.blur(); })()"
        )
        page.key("j")
        page.key("Enter")
        page.until(
            "document.querySelector('#stage img')?.complete"
            " && document.querySelector('#stage img').naturalWidth"
        )
        first = page.value("field.fov")
        page.value(
            "(() => { const n = document.getElementById('near'); n.value = 0.5;"
            " n.dispatchEvent(new Event('input')); })()"
        )
        page.shoot(shots, "field")
        page.key("h")
        page.until("document.querySelector('#cells.plain')")
        page.shoot(shots, "bare")
        page.key("h")

        # Twelve cells, in two fields, while the service counts what arrives.
        draw(camera, "second", 2, seed=5)
        n = correct(page, 7)
        page.key("j")
        page.until(f"field.fov !== {json.dumps(first)} && document.querySelector('#stage img')?.complete")
        second = page.value("field.fov")
        n += correct(page, 5)

        # A cell that was missed: a box, dragged.
        page.key("a")
        page.until("adding")
        frame = page.value(
            "(() => { const r = document.getElementById('view').getBoundingClientRect();"
            " return [r.x + zoom.x, r.y + zoom.y, zoom.k]; })()"
        )
        corners = [
            (frame[0] + x * frame[2], frame[1] + y * frame[2]) for x, y in ((2, 2), (30, 28), (45, 40))
        ]
        n_cells = page.value("field.cells.length")
        page.mouse("mousePressed", *corners[0])
        for corner in corners[1:]:
            page.mouse("mouseMoved", *corner)
        page.mouse("mouseReleased", *corners[-1])
        page.until(f"field.cells.length === {n_cells + 1}")
        n += 1
        page.key("o")
        page.until("field.cells.at(-1).label === 'rbc_overlapping'")
        page.shoot(shots, "corrected")
        page.key("r")
        page.until("field.reviewed")

        # Undo, and a field without its file.
        page.key("k")
        page.until(f"field.fov === {json.dumps(first)}")
        page.key("u")
        page.until("field.n_corrected === 6")
        n -= 1
        gone = next(p for p in sorted((camera / "first").iterdir()) if p.stem not in (first, second))
        gone.unlink()
        page.value(f"(() => {{ location.hash = address('field', 'first', {json.dumps(gone.stem)}); }})()")
        page.until(f"field.fov === {json.dumps(gone.stem)} && document.querySelector('.note')")
        page.check(
            "a field without its file says so",
            "gone" in page.value("document.querySelector('.note').textContent"),
        )
        page.key("e")
        page.until("document.getElementById('why')")
        page.type("file gone")
        page.key("Enter")
        page.until("field.status === 'excluded'")
        page.shoot(shots, "excluded")
        server.send_signal(signal.SIGKILL)
        server.wait()
        told = [
            e["params"]
            for e in page.window.events
            if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
        ]
        page.check("no message in the console", not told, json.dumps(told)[:400])
        urls = {
            e["params"]["request"]["url"]
            for e in page.window.events
            if e.get("method") == "Network.requestWillBeSent"
        }
        origin = address.partition("?")[0]
        page.check("no request to elsewhere", all(u.startswith((origin, "data:", "about:")) for u in urls))

    with review(out) as server:
        page.open(address_of(server))
        page.click(".list a")
        page.until("document.querySelectorAll('#fields a').length === 6")
        page.value(f"(() => {{ location.hash = address('field', 'first', {json.dumps(second)}); }})()")
        page.until(f"field && field.fov === {json.dumps(second)} && document.querySelector('#counts')")
        page.check(
            "a killed server loses nothing",
            page.value("field.n_corrected") == 6,
            page.value("field.n_corrected"),
        )
        page.value("location.reload()")
        page.until("document.querySelector('#n-corrected')")
        page.check("reload shows the same", page.value("field.n_corrected") == 6)
        shown = page.value(
            "[field.n_rbc, field.n_rbc_single, field.n_rbc_overlapping, field.n_wbc, field.n_platelets]"
        )
        wait(
            lambda: sum(int(r["n_corrected"] or 0) for r in table(out, "first.csv")) == n,
            "corrections in the table",
        )
    rows = {row["fov"]: row for row in table(out, "first.csv")}
    names = ("n_rbc", "n_rbc_single", "n_rbc_overlapping", "n_wbc", "n_platelets")
    page.check("the table counts as the page", [int(rows[second][name]) for name in names] == shown, shown)
    page.check("the table says who reviewed", bool(rows[second]["reviewed"]), rows[second]["reviewed"])
    page.check(
        "the table says why",
        (rows[gone.stem]["status"], rows[gone.stem]["reason"]) == ("excluded", "file gone"),
    )
    sums = {row["slide_id"]: row["n_corrected"] for row in table(out, "slides.csv")}
    page.check("slides.csv says how many", sums["first"] == str(n), sums)
    cells = table(out, "cells/first.csv")
    differ = [row for row in cells if row["label"] != row["model_label"]]
    page.check("cells/ has the bundle's own label beside", len(differ) == n, len(differ))
    wait(lambda: len(table(out, "second.csv")) == 2, "the service counts on")
    page.check("the service counted on meanwhile", True)

    with review(out, "--read-only") as server:
        page.open(address_of(server))
        page.value(f"(() => {{ location.hash = address('field', 'first', {json.dumps(second)}); }})()")
        page.until("document.getElementById('undo')")
        page.key("u")
        time.sleep(0.5)
        page.check(
            "read only: nothing changes",
            page.value("field.n_corrected") == 6 and page.value("document.getElementById('undo').disabled"),
        )
        server.terminate()
        page.check("it ends when it is told to", server.wait(timeout=60) in (0, 143, -15), server.returncode)


def main() -> None:
    """Draws, counts and reviews."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shots", type=Path, help="keep screenshots there")
    parser.add_argument("--axe", type=Path, help="axe.min.js of axe-core: look for what is hard to use, too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, browser() as window:
        folder = Path(temporary)
        shots = asked.shots or folder / "shots"
        shots.mkdir(parents=True, exist_ok=True)
        camera, out = folder / "camera", folder / "out"
        draw(camera, "first", 6, seed=3)
        page = Page(window, asked.axe)
        counting = (
            "--bundle",
            _TOY,
            "--cell-diameter",
            40,
            "--cells",
            "--polling",
            "--settle-s",
            0.5,
            "--scan-every-s",
            1,
        )
        with process("watch", camera, "--out", out, *counting, stderr=subprocess.DEVNULL):
            wait(lambda: len(table(out, "first.csv")) == 6, "six fields are counted")
            use(page, out, camera, shots)
    print(f"{len(page.wrong)} wrong")
    raise SystemExit(bool(page.wrong))


if __name__ == "__main__":
    main()

"""The page of a run in headless Chromium: no error on the console, nothing wider than a phone, light and dark, numbers
under the pointer. Skipped where there is no Chromium.

The page is looked at inside a frame of the wanted width, because a window of Chromium cannot be as narrow as a phone.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "observation"))
from run_directory import event, start, steps, write_run  # noqa: E402

from umv2_megatron.observation.page import page  # noqa: E402
from umv2_megatron.observation.run_files import read_run  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

FRAME = """<!doctype html><iframe id="frame" style="width: WIDTHpx; height: 3000px; border: 0"></iframe><pre></pre>
<script>
const frame = document.getElementById("frame");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, plot = page.querySelector(".plot");
  const box = plot.getBoundingClientRect();
  const at = new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 5});
  for (const details of page.querySelectorAll("details")) details.open = true;
  plot.dispatchEvent(at);
  const style = frame.contentWindow.getComputedStyle(page.body);
  const wide = [...page.querySelectorAll("main, main > *, figure, figcaption, .plot, .heat, li, table.settings")];
  document.querySelector("pre").textContent = JSON.stringify({
    wanted: frame.clientWidth, scrolls: root.scrollWidth, ground: style.backgroundColor, ink: style.color,
    widest: Math.max(...wide.map((each) => each.getBoundingClientRect().right)),
    pointed: plot.querySelector("output").textContent, shown: plot.querySelector("output").style.display,
    pictures: [...page.images].map((image) => image.naturalWidth),
    smallest: Math.min(...[...page.querySelectorAll("span, dd, td, p, small")].map(
      (each) => parseFloat(frame.contentWindow.getComputedStyle(each).fontSize))),
  });
};
frame.src = "report.html";
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of a page of a run with all there can be in it, long words among it."""
    folder = tmp_path_factory.mktemp("site")
    long = "a/very/long/path/" * 20 + "x" * 300
    told = [start(0), event("fault", 3, text=long, rank=0, code=1),
            {**start(2, reason=long, changes={"a_setting" * 9: [long, None]}), "host": long, "device": long},
            event("skipped", 4, text=long), event("stop", 5, reason="SIGTERM")]  # fmt: skip
    run = write_run(folder / "run", steps(1, 900, layers=30), told, data_path=long, **{"k" * 200: 1})
    (run / "iter_0000500").mkdir()
    (folder / "report.html").write_text(page(read_run(run), long))
    for width in (390, 1200):
        (folder / f"frame{width}.html").write_text(FRAME.replace("WIDTH", str(width)))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()
    thread.join()


def look(address: str, profile: Path, *, dark: bool) -> tuple[dict[str, Any], list[str]]:
    """What the frame has found, and the lines on the console."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--window-size=1400,1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=20000",
        "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    found = re.search(r"<pre>(.+?)</pre>", done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-4000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line and "favicon.ico" not in line]
    return json.loads(html.unescape(found[1])), console


@pytest.mark.parametrize(
    "width, dark",
    [(390, True), pytest.param(390, False, marks=pytest.mark.slow), pytest.param(1200, True, marks=pytest.mark.slow)],
)
def test_the_page(site: tuple[str, Path], tmp_path: Path, width: int, dark: bool) -> None:
    found, console = look(f"{site[0]}/frame{width}.html", tmp_path, dark=dark)
    assert not console, console
    assert found["wanted"] == width and found["scrolls"] <= width and found["widest"] <= width
    colours = [sum(map(int, re.findall(r"\d+", found[key]))) for key in ("ground", "ink")]
    assert (colours[0] < 150 and colours[1] > 600) if dark else (colours[0] > 700 and colours[1] < 150)
    assert found["shown"] == "block" and re.match(r"iteration 4[45]\d\n", found["pointed"] + "\n")
    assert found["pictures"] and min(found["pictures"]) > 1, "heat maps are shown"
    assert found["smallest"] >= 12, "readable"


@pytest.mark.slow
def test_errors_and_wide_pages_are_noticed(site: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = site
    text = (folder / "report.html").read_text()
    broken = text.replace("<footer>", '<div style="width: 500px">wide</div><script>missing()</script><footer>')
    (folder / "broken.html").write_text(broken)
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", "390").replace("report.html", "broken.html"))
    found, console = look(f"{address}/frame.html", tmp_path, dark=False)
    assert any("missing is not defined" in line for line in console)
    assert found["scrolls"] > 390

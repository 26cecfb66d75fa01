"""The report in a real browser: every image decodes, nothing is said on the console, nothing is asked of a network."""

import json
import re
import shutil
import subprocess

import pytest
from limits import SUBPROCESS_S
from synthetic_run import write_run

from hybridcache.observe.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium binary on PATH")

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
PROBE = """<script>
const images = [...document.images];
document.title = JSON.stringify({
  images: images.length,
  decoded: images.filter(image => image.complete && image.naturalWidth > 600).length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "run"
    return write_report(write_run(folder, budget_bytes=1 << 28, requests=12, workloads=("chat",)))


def open_page(page, folder, width=1300, *flags):
    command = [BROWSER, *QUIET, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2000", *flags]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=SUBPROCESS_S, check=True)


OWN = re.compile(r"(file|data|chrome|about|devtools):|https?://[a-z0-9]+\.(google|googleapis)\.com/")
"""What a browser asks for by itself (its updates); all of it fails here, since no name resolves."""


def requests(page, folder):
    """URLs that opening a page asks for, and what the browser said."""
    log = folder / "net.json"
    done = open_page(page, folder, 1300, f"--log-net-log={log}", "--net-log-capture-mode=Everything")
    assert "</html>" in done.stdout
    events = json.loads(log.read_text())["events"]
    asked = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    return {url for url in asked if not OWN.match(url)}, done.stderr


def test_no_console_message_and_no_request(page, tmp_path):
    asked, said = requests(page, tmp_path)
    assert not asked
    assert "CONSOLE" not in said, said


def test_a_request_and_a_console_message_would_be_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html><img src='http://resource.invalid/x.png'><script>console.error('seen')</script></html>")
    asked, said = requests(page, tmp_path)
    assert asked == {"http://resource.invalid/x.png"}
    assert "seen" in said


@pytest.mark.parametrize("width", [1300, 520])
def test_every_image_decodes_and_the_page_fits_its_window(page, tmp_path, width):
    probe = tmp_path / "probe.html"
    text = page.read_text()
    probe.write_text(text.replace("</body>", PROBE + "</body>"))
    title = re.search(r"<title>(.*?)</title>", open_page(probe, tmp_path, width).stdout, re.DOTALL).group(1)
    found = json.loads(title)
    assert found["images"] == text.count("<img ") > 10
    assert found["decoded"] == found["images"]
    assert found["overflow"] <= 0

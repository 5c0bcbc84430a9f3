"""The page at `/` in headless Chromium, driven over the WebDriver protocol, as a person would use it.

Skipped where chromium and chromedriver (Debian's packages of these names) are not installed.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headstart.serving.server.settings import HttpSettings
from tests.serving.server.tiny_service import Running, wait_until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1100,800"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """A tab of Chromium."""

    def __init__(self, port: int, profile: Path) -> None:
        self.root = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*ARGUMENTS.split(), f"--user-data-dir={profile}"]}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self.root += "/" + self.call("POST", "", {"capabilities": capabilities})["sessionId"]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def script(self, text: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": text, "args": arguments})

    def text(self, identity: str) -> str:
        return str(self.script("return document.getElementById(arguments[0]).innerText", identity))

    def choose(self, path: Path) -> None:
        found = self.call("POST", "/element", {"using": "css selector", "value": "#file"})
        self.call("POST", f"/element/{found[ELEMENT]}/value", {"text": str(path)})

    def complaints(self) -> list[str]:
        return [row["message"] for row in self.call("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        tab = Browser(port, tmp_path_factory.mktemp("profile"))
        yield tab
        tab.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(10)


def test_an_image_is_shown_with_its_probabilities_latency_and_the_card(browser: Browser, tmp_path: Path):
    Image.fromarray(np.full((300, 400, 3), 250, np.uint8)).save(tmp_path / "snow.png")
    with Running(HttpSettings(port=0)) as running:
        browser.call("POST", "/url", {"url": f"http://{running.url}/"})
        wait_until(lambda: "grey" in browser.text("card"))
        browser.choose(tmp_path / "snow.png")
        wait_until(lambda: browser.text("label").startswith("light · 9"))
        assert browser.text("bars").split("\n")[0::2] == ["light", "grey", "dark"]
        assert "ms in the model" in browser.text("latency")
        if folder := os.environ.get("HEADSTART_SCREENSHOTS"):
            browser.screenshot(Path(folder) / "page.png")
        assert not browser.complaints(), "the browser's console says something"


def test_what_the_server_refuses_is_said_on_the_page(browser: Browser, tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    with Running(HttpSettings(port=0)) as running:
        browser.call("POST", "/url", {"url": f"http://{running.url}/"})
        wait_until(lambda: "grey" in browser.text("card"))
        browser.choose(tmp_path / "broken.png")
        wait_until(lambda: "cannot be decoded" in browser.text("error"))
        assert not browser.text("answer").strip()


def test_the_card_of_a_model_that_was_left_again_is_not_shown(browser: Browser):
    leave_it = """
        const model = document.getElementById("model"), here = model.value, asked = window.fetch;
        model.add(new Option("another"));
        model.value = "another";
        window.fetch = () => Promise.resolve(new Response('{"name": "another"}'));
        const late = showCard();
        [model.value, window.fetch] = [here, asked];
        return late;
    """
    with Running(HttpSettings(port=0)) as running:
        browser.call("POST", "/url", {"url": f"http://{running.url}/"})
        wait_until(lambda: "grey" in browser.text("card"))
        browser.script(leave_it)
        assert "grey" in browser.text("card")
        assert "another" not in browser.text("card")


def test_the_page_asks_no_other_host(browser: Browser):
    with Running(HttpSettings(port=0)) as running:
        browser.call("POST", "/url", {"url": f"http://{running.url}/"})
        wait_until(lambda: "grey" in browser.text("card"))
        asked = browser.script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert asked
        assert all(url.startswith(f"http://{running.url}/") for url in asked)

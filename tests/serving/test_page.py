"""The page of the server in a real browser, headless Chromium."""

import base64
import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.serving.servers import running

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("chromedriver") is None, reason="needs Debian's chromium and chromium-driver"
    ),
]
WAIT = 240  # seconds, on a busy machine
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # of the protocol
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,760"]


class Browser:
    """A page in a browser, by the WebDriver protocol."""

    def __init__(self, http: httpx.Client):
        options = {"goog:chromeOptions": dict(args=FLAGS)}
        body = dict(capabilities=dict(alwaysMatch=options))
        found = http.post("/session", json=body).json()["value"]
        self.http, self.session = http, f"/session/{found['sessionId']}"

    def ask(self, path: str, **body):
        answer = self.http.post(self.session + path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def run(self, script: str, *arguments):
        return self.ask("/execute/sync", script=f"return {script}", args=list(arguments))

    def element(self, css: str) -> str:
        return self.ask("/element", using="css selector", value=css)[ELEMENT]

    def click(self, css: str):
        self.ask(f"/element/{self.element(css)}/click")

    def type(self, css: str, text: str):
        self.ask(f"/element/{self.element(css)}/value", text=text)

    def text(self, css: str) -> str:
        return self.run("document.querySelector(arguments[0]).textContent", css)

    def wait(self, script: str, *arguments):
        """Returns what a script gives once that is true."""
        end = time.monotonic() + WAIT
        while not (found := self.run(script, *arguments)):
            said = self.text("#error")
            assert not said and time.monotonic() < end, (script, said)
            time.sleep(0.05)
        return found

    def picture(self, name: str):
        """Keeps a picture where SCREENSHOTS names a directory."""
        if directory := os.environ.get("SCREENSHOTS"):
            found = self.http.get(f"{self.session}/screenshot").json()["value"]
            Path(directory, name).write_bytes(base64.b64decode(found))


@pytest.fixture
def browser():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT) as http:
            for _ in range(500):
                with contextlib.suppress(httpx.TransportError):
                    http.get("/status")
                    break
                time.sleep(0.05)
            found = Browser(http)
            yield found
            http.delete(found.session)
    finally:
        driver.kill()
        driver.communicate()


SET = """(() => {
    const slider = document.querySelector(arguments[0]);
    slider.value = arguments[1];
    slider.dispatchEvent(new Event('input'));
    return true
})()"""
FACTS = "document.querySelector('#facts').textContent"
MORE = f"/in (\\d+) patches/.exec({FACTS})[1] > arguments[0]"


def number_of_patches(browser) -> int:
    return int(re.search(r"in (\d+) patches", browser.text("#facts"))[1])


def test_a_page_types_sees_patches_writes_and_stops(browser):
    with running("demo", "--max_length=4096") as server:
        browser.ask("/url", url=server.url)
        browser.wait(f"/patches/.test({FACTS})")
        assert browser.text("#model") == "demo"
        before = browser.text("#text")
        assert before == browser.run("document.querySelector('#prompt').value")
        browser.type("#prompt", "\n    print(name, value)\n")
        typed = browser.run("document.querySelector('#prompt').value")
        assert typed.startswith(before) and typed.endswith("value)\n")
        shown = "document.querySelector('#text').textContent === arguments[0]"
        browser.wait(shown, typed)
        patches = number_of_patches(browser)
        assert patches == browser.run("document.querySelectorAll('#text b').length") > 5
        assert browser.run("document.querySelector('#curve path').getAttribute('d').length") > 100
        browser.picture("page_patches.png")
        trained = float(browser.run("document.querySelector('#threshold').value"))
        browser.run(SET, "#threshold", "0.01")
        browser.wait(MORE, patches)
        browser.run(SET, "#threshold", str(trained))
        browser.run("document.querySelector('#bytes').value = arguments[0]", 3000)
        browser.click("#write")
        browser.wait("document.querySelectorAll('#text i').length > 2")
        browser.wait("/bytes\\/s/.test(document.querySelector('#work').textContent)")
        assert browser.text("#write") == "Stop"
        browser.click("#write")
        browser.wait("document.querySelector('#write').textContent === 'Write on'")
        written = browser.run("written")
        assert 0 < len(written) < 3000 and not browser.text("#error")
        browser.wait(shown, typed + written)
        browser.picture("page_written.png")
        server.wait_for(lambda: server.metric("bltjax_running") == 0)  # not to its end

"""Servers as real processes, with tiny weights, and what the model in them would say."""

import contextlib
import re
import signal
import subprocess
import sys
import time

import httpx
import openai

from tests import directories, processes

CHAT = dict(
    template="bytes",
    system="<<system>>\n",
    user="<<user>>\n",
    assistant="<<assistant>>\n",
    end="<<end>>\n",
    turns=True,
)


def write_model(directory, **changes):
    """A tiny model of random weights; bltjax_chat=CHAT: one that knows conversations."""
    return directories.hub(directory, "hf_A_1b_like", **changes)


class Running:
    """A server that answers; `url` is its address."""

    def __init__(self, process):
        self.process, self.before = process, []
        for line in process.stdout:
            if found := re.search(r"at (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError((process.wait(), process.stderr.read()))

    def client(self, **options) -> openai.OpenAI:
        options = dict(api_key="none", max_retries=0, timeout=240) | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path, body=None, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=240, **options)

    def get(self, path, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=240, **options)

    def ask(self, method, path, **options) -> httpx.Response:
        return httpx.request(method, self.url + path, timeout=240, **options)

    def metric(self, name) -> float:
        (found,) = re.findall(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").text, re.M)
        return float(found)

    def wait_for(self, condition, seconds=240):
        """Until the condition holds; AssertionError where it does not within the time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)

    def end(self, number=signal.SIGTERM):
        """(exit code, lines of stdout, stderr) after a signal."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self):
        out, err = self.process.communicate(timeout=240)
        return self.process.returncode, out.splitlines(), err


def start(checkpoint, *arguments, code=None, **environment):
    """The process of a server of a checkpoint; code: Python in the place of the command."""
    command = ["-m", "bltjax.serve"] if code is None else ["-c", code]
    quick = ["--port=0", "--warm_up=false"]  # unless arguments say otherwise
    return subprocess.Popen(
        [sys.executable, *command, f"--checkpoint={checkpoint}", *quick, *arguments],
        cwd=processes.ROOT,
        env=processes.environment() | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@contextlib.contextmanager
def running(checkpoint, *arguments, **options):
    """A server that answers, and is killed at the end; arguments are those of `start`."""
    process = start(checkpoint, *arguments, **options)
    try:
        yield Running(process)
    finally:
        process.kill()
        process.communicate()

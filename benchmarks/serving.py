"""A server under load: `python benchmarks/serving.py --checkpoint=demo`.

Starts `bltjax serve` in a process of its own, waits until it has compiled what usual requests need,
and lets 1, 2, 4, ... clients ask it over loopback, each for one text after the other, streamed.
Prompts are pieces of Python's library of 32 to 256 bytes, texts of 16 to 128 bytes, drawn from a
seed. Requests a second, bytes a second, and the time to the first byte (median and 95%) of each
number of clients; `alone` is how many times the bytes a second of one client. Prints a table and,
last, a JSON line; --png draws it.

    python benchmarks/serving.py --checkpoint=demo --png=benchmarks/serving.png
"""

import asyncio
import inspect
import json
import random
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import httpx
import measuring
from absl import app, flags

from bltjax import cli

COLUMNS = {"clients": "", "requests/s": ".2f", "bytes/s": ",.0f", "alone": ".2f"}
COLUMNS |= {"first byte, s": ".2f", "95%, s": ".2f", "refused": ""}


class Answer(NamedTuple):
    first: float  # seconds to the first byte
    new_bytes: int
    refused: bool


def main(_):
    chosen, rows = flags.FLAGS, []
    command = [sys.executable, "-m", "bltjax.serve", f"--checkpoint={chosen.checkpoint}"]
    command += ["--port=0", f"--rows={chosen.rows}", "--max_length=512"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if " at http" not in line:
                cli.fail(f"the server did not start: {line!r}")
            address = line.rsplit(" at ", 1)[1].strip()
            wait_until_warm(address)
            for clients in map(int, chosen.clients):
                rows.append(asyncio.run(measure(address, clients, chosen.each)))
                rows[-1]["alone"] = rows[-1]["bytes/s"] / rows[0]["bytes/s"]
                measuring.print_table(COLUMNS, rows[-1:])
        finally:
            server.terminate()
    print()
    measuring.print_table(COLUMNS, rows)
    if chosen.png:
        draw(rows, chosen.png)
    options = dict(checkpoint=chosen.checkpoint, rows=chosen.rows, each=chosen.each)
    versions = dict(jax=version("jax"), uvicorn=version("uvicorn"))
    measuring.print_result("serving", versions=versions, options=options, rows=rows)


def wait_until_warm(address: str):
    """Returns when the server has compiled what usual requests need."""
    while "warming_up" in (answer := httpx.get(f"{address}/health")).text:
        time.sleep(0.5)
    answer.raise_for_status()


async def measure(address: str, clients: int, each: int) -> dict:
    """Lets clients ask for `each` texts, one after the other; returns a row of the table."""
    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        start = time.perf_counter()
        work = [ask_for_several(http, random.Random(i), each) for i in range(clients)]
        answers = [answer for found in await asyncio.gather(*work) for answer in found]
        seconds = time.perf_counter() - start
    firsts = sorted(answer.first for answer in answers if not answer.refused)
    return {
        "clients": clients,
        "requests/s": len(firsts) / seconds,
        "bytes/s": sum(answer.new_bytes for answer in answers) / seconds,
        "first byte, s": measuring.median(firsts),
        "95%, s": firsts[int(0.95 * (len(firsts) - 1))],
        "refused": sum(answer.refused for answer in answers),
        "seconds": seconds,
    }


async def ask_for_several(http, chance: random.Random, each: int) -> list[Answer]:
    return [await ask(http, chance) for _ in range(each)]


async def ask(http, chance: random.Random) -> Answer:
    text = inspect.getsource(inspect)
    at = chance.randrange(len(text) - 256)
    body = dict(
        prompt=text[at : at + chance.randint(32, 256)],
        max_tokens=chance.randint(16, 128),
        seed=chance.randrange(2**31),
        stream=True,
        stream_options=dict(include_usage=True),
    )
    start, first, new_bytes = time.perf_counter(), None, 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 429:
            return Answer(0.0, 0, True)
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                new_bytes = usage_of(line) or new_bytes
    return Answer(first, new_bytes, False)


def usage_of(line: str) -> int:
    """Returns the bytes that the last piece of a stream counts; 0 for the others."""
    usage = json.loads(line.removeprefix("data: ")).get("usage")
    return usage["completion_tokens"] if usage else 0


def draw(rows: list[dict], target: str):
    """Draws bytes a second and the time to the first byte against the number of clients."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    clients = [row["clients"] for row in rows]
    left.plot(clients, [row["bytes/s"] for row in rows], "o-", color="#1555aa")
    right.plot(clients, [row["first byte, s"] for row in rows], "o-", color="#1555aa")
    right.plot(clients, [row["95%, s"] for row in rows], "o--", color="#cc3333")
    right.legend(["median", "95%"], frameon=False)
    for axes, title in ((left, "bytes a second"), (right, "seconds to the first byte")):
        axes.set(title=title, xlabel="clients", ylim=(0, None), xscale="log")
        axes.set_xticks(clients, map(str, clients))
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(target), dpi=120)


def define_flags():
    flags.DEFINE_string("checkpoint", "demo", "The model.")
    flags.DEFINE_list("clients", ["1", "2", "4", "8", "16", "32"], "Numbers of clients.")
    flags.DEFINE_integer("each", 6, "Texts that each client asks for.", lower_bound=1)
    flags.DEFINE_integer("rows", 8, "Texts that the server writes at once.", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "Cores of each process.", lower_bound=1)
    flags.DEFINE_string("png", None, "File for the picture.")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=measuring.parse)

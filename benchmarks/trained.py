"""What drafts and thresholds do to generation by a trained model: `python benchmarks/trained.py`.

Greedy and drawn text after the beginnings of held-out documents, from the working directory of a
run (--checkpoint, what `make train` leaves). Drafts change no greedy text; told are the share of
drafts that stood, the calls of the global stack that were saved, and the time of whole calls of
`Model.generate` beside those without drafts, in turns. Another threshold than the trained one
changes the text: told are bytes per patch, time, and bits per byte of the documents under it.
Prints two tables and, last, a JSON line.
"""

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import jax
import measuring
from absl import app, flags

import bltjax
from bltjax import cli
from bltjax.data.records.store import Documents, open_store

DRAFTS = {"rows": "", "temperature": ".1f", "drafts": "", "accepted": ".0%", "calls": ""}
DRAFTS |= {"calls saved": ".0%", "bytes/s": ",.0f", "speed": ".2f"}
THRESHOLDS = {"threshold": ".3f", "bytes a patch": ".2f", "calls": "", "bytes/s": ",.0f"}
THRESHOLDS |= {"bits/byte": ".4f"}


def main(argv):
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}: only flags are taken")
    chosen, drafts = flags.FLAGS, []
    model, texts = model_and_texts()
    prompts = [text[: chosen.prompt] for text in texts]
    for rows in map(int, chosen.batches):
        for temperature in (0.0, 0.8):
            drafts += with_drafts(model, prompts, rows, temperature)
    print()
    measuring.print_table(DRAFTS, drafts)
    thresholds = [at_threshold(model, texts, prompts, share) for share in (0.5, 0.75, 1, 1.25, 1.5)]
    print()
    measuring.print_table(THRESHOLDS, thresholds)
    about = measuring.machine(os.cpu_count()) | dict(jax=jax.__version__)
    print(
        json.dumps(dict(benchmark="trained", machine=about, drafts=drafts, thresholds=thresholds))
    )


def model_and_texts():
    """The model of a run, and the longest of its held-out documents."""
    chosen = flags.FLAGS
    try:
        model = bltjax.load(chosen.checkpoint)
        return model, held_out(Path(chosen.checkpoint) / "records", chosen.documents)
    except (OSError, ValueError) as error:
        cli.fail(error)


def held_out(records: Path, number: int) -> list[bytes]:
    """The longest documents, in the order of the records."""
    store = open_store(records)
    texts = [d.data for d in Documents(store.shards(part="validation"), entropies=False)]
    shortest = sorted(map(len, texts))[-number:][0]
    return [text for text in texts if len(text) >= shortest][:number]


def timed(model, prompts, rows: int, **options):
    """(texts, counts, seconds) of a call after the one that compiled."""
    started = time.perf_counter()
    texts, counts = model.generate_and_count(
        prompts, flags.FLAGS.new, batch_size=rows, seed=1, **options
    )
    return texts, counts, time.perf_counter() - started


def with_drafts(model, prompts, rows: int, temperature: float) -> list[dict]:
    numbers = [0, *map(int, flags.FLAGS.drafts)]
    options = dict(rows=rows, temperature=temperature)
    actions = {n: lambda n=n: timed(model, prompts, max_drafts=n, **options) for n in numbers}
    for action in actions.values():
        action()  # compiles
    found = measuring.alternate(actions, flags.FLAGS.repeats)
    plain_texts, plain, _ = found[0][0]
    plain_seconds = measuring.median([run[2] for run in found[0]])
    table = []
    for number in numbers:
        texts, counts, _ = found[number][0]
        if temperature == 0 and texts != plain_texts:
            cli.fail(f"greedy text with {number} drafts is another than without")
        seconds = measuring.median([run[2] for run in found[number]])
        row = options | dict(drafts=number, calls=counts.global_calls)
        row["accepted"] = counts.accepted / counts.drafted if number else None
        # Drawn texts differ, and so do the bytes that a call serves.
        calls_a_byte = counts.global_calls / counts.new_bytes
        row["calls saved"] = 1 - calls_a_byte / (plain.global_calls / plain.new_bytes)
        row["bytes/s"] = counts.new_bytes / seconds
        row["speed"] = row["bytes/s"] / (plain.new_bytes / plain_seconds)
        table.append(row)
    measuring.print_table(DRAFTS, table)
    return table


def at_threshold(model, texts, prompts, share: float) -> dict:
    patching = model.patching
    threshold = share * patching.threshold
    timed(model, prompts, 1, threshold=threshold)  # compiles
    runs = [timed(model, prompts, 1, threshold=threshold) for _ in range(flags.FLAGS.repeats)]
    counts = runs[0][1]
    model.patching = dataclasses.replace(patching, threshold=threshold)
    scores = model.score(texts)
    model.patching = patching
    num_bytes = sum(s.num_bytes for s in scores)
    return {
        "threshold": threshold,
        "bytes a patch": num_bytes / sum(s.num_patches for s in scores),
        "calls": counts.global_calls,
        "bytes/s": counts.new_bytes / measuring.median([run[2] for run in runs]),
        "bits/byte": sum(s.nats for s in scores) / math.log(2) / num_bytes,
    }


def define_flags():
    flags.DEFINE_string("checkpoint", "runs/quickstart", "The working directory of a run.")
    flags.DEFINE_integer("documents", 16, "Held-out documents, the longest.", lower_bound=1)
    flags.DEFINE_integer("prompt", 256, "Bytes of each that are a prompt.", lower_bound=0)
    flags.DEFINE_integer("new", 256, "Bytes to write after each.", lower_bound=1)
    flags.DEFINE_list("batches", ["1", "8"], "Rows at once.")
    flags.DEFINE_list("drafts", ["2", "4", "8"], "Drafts at most, of each run.")
    flags.DEFINE_integer("repeats", 5, "Of each measurement.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=cli.parse)

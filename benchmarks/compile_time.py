"""Does compile time grow with depth? `python benchmarks/compile_time.py`.

Seconds to lower and to compile the training step with 8 and with 48 global layers, each time in a
new process without a cache of compiled programs, in turns. Layers are scanned, so both should take
the same. Prints a table and, last, a JSON line.
"""

import dataclasses
import tempfile
from pathlib import Path

import measuring
import numpy as np
from absl import app, flags

from bltjax import cli


def main(_):
    chosen, versions = flags.FLAGS, {}
    depths = [int(n) for n in chosen.layers]
    (shape,) = map(measuring.parse_shape, chosen.shapes)
    with tempfile.TemporaryDirectory() as scratch:
        batch = Path(scratch) / "batch.npz"
        np.savez(batch, **measuring.draw_batch(*shape))
        try:
            found = measuring.alternate(
                {n: lambda n=n: compile_once(n, batch, versions) for n in depths}, chosen.repeats
            )
        except measuring.WorkerError as error:
            cli.fail(error)
    rows = [
        {"layers": n}
        | {part: measuring.median([t[part] for t in times]) for part in times[0]}
        | {"of each": [t["seconds"] for t in times]}
        for n, times in found.items()
    ]
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    columns = dict(layers="") | dict.fromkeys(("lower", "compile", "seconds", "ratio"), ".2f")
    measuring.print_table(columns, rows)
    options = {n: chosen[n].value for n in ("size", "shapes", "remat", "hash_updates")}
    measuring.print_result("compile_time", versions=versions, options=options, rows=rows)


def compile_once(layers: int, batch: Path, versions: dict) -> dict:
    """Seconds in a process of its own."""
    chosen = flags.FLAGS
    model = measuring.SIZES[chosen.size]
    trunk = dataclasses.replace(model.global_transformer, num_layers=layers)
    model = dataclasses.replace(
        model, global_transformer=trunk, remat=chosen.remat, compute_dtype=chosen.dtype
    )
    with measuring.Worker(measuring.OURS, chosen.threads) as worker:
        versions |= worker.ask("about")
        return worker.ask(
            "compile",
            model=measuring.settings(model),
            batch=str(batch),
            optimizer=measuring.settings(measuring.with_hash_updates(measuring.OPTIMIZER)),
        )


def _define_flags():
    measuring.define_step_flags("small", ["1x1024"])
    flags.DEFINE_list("layers", ["8", "48"], "Numbers of global layers.")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=measuring.parse)

"""A training step with dense and with touched updates of the hash tables: time and memory.

    python benchmarks/hash_tables.py         # --tables=32768x64,100000x256,500002x256
    python benchmarks/hash_tables.py --tables=100x32 --rows=1 --row_bytes=64     # in seconds

Each size is ROWSxFEATURES of a table, of which there are six; the model has the quickstart's
layers, as wide as the tables. The two kinds of update take turns, --turns times, each in a process
of its own, since dense updates of the largest tables want 15 GiB. The text is this Python's
library. Times of a step are medians of all turns; temporary memory is the compiler's, the peak the
process's. Prints a table and, last, a JSON line.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import measuring
import numpy as np
from absl import app, flags

from bltjax import cli
from bltjax.config.training import UPDATES

COLUMNS = {"tables": "", "updates": "", "ms a step": ".1f", "temporary GiB": ".2f"}
COLUMNS |= {"peak GiB": ".2f"}


def library(length: int) -> np.ndarray:
    """So many bytes of the library's files."""
    found = b""
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        found += path.read_bytes()
        if len(found) >= length:
            break
    return np.frombuffer(found[:length], np.uint8)


def make_batch(rows: int, row_bytes: int) -> dict:
    """Rows of text with patches of even length."""
    from bltjax.vocabulary import BYTE_OFFSET

    text = library(rows * (row_bytes + 1)).astype(np.int32).reshape(rows, -1) + BYTE_OFFSET
    patches = round(row_bytes / measuring.PATCH_BYTES)
    lengths = np.diff(np.linspace(0, row_bytes + 1, patches + 1).astype(np.int32))
    return dict(
        tokens=text[:, :-1],
        targets=text[:, 1:],
        document_ids=np.zeros((rows, row_bytes), np.int32),
        loss_mask=np.ones((rows, row_bytes), bool),
        patch_lengths=np.tile(lengths, (rows, 1)),
    )


def make_model(table_rows: int, features: int):
    """The quickstart's layers, as wide as the tables."""
    from bltjax.config import BLTConfig, CrossAttentionConfig, HashConfig, TransformerConfig

    local = TransformerConfig(dim=features, num_layers=1, num_heads=4, window=64)
    return BLTConfig(
        local_encoder=local,
        global_transformer=TransformerConfig(dim=3 * features, num_layers=2, num_heads=4),
        local_decoder=local,
        cross_attention=CrossAttentionConfig(k=2, num_heads=4),
        hash=HashConfig(vocab=table_rows),
    )


def measure(kind: str, size: str) -> dict:
    """Steps in this process: their seconds, and memory in GiB."""
    import jax
    import jax.numpy as jnp

    from bltjax import sharding
    from bltjax.config import MeshConfig, OptimizerConfig, TrainingConfig
    from bltjax.training.optimizer import make_optimizer
    from bltjax.training.state import abstract_state
    from bltjax.training.step import make_train_step

    model = make_model(*map(int, size.split("x")))
    training = TrainingConfig(optimizer=OptimizerConfig(hash_updates=kind))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        optimizer = make_optimizer(training.optimizer, training.steps)
        # Random numbers for all tables would take longer than what is measured.
        state = jax.tree.map(
            lambda x: jnp.full(x.shape, 0 if x.dtype == jnp.int32 else 1e-2, x.dtype),
            abstract_state(model, optimizer),
        )
        batch = sharding.put_batch(make_batch(flags.FLAGS.rows, flags.FLAGS.row_bytes))
        step = make_train_step(model, training, optimizer).lower(state, batch).compile()
        seconds = []
        for _ in range(flags.FLAGS.steps + 1):  # the first one is not counted
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - started)
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss is {metrics['loss']}")
        analysis = step.memory_analysis()
    return dict(
        seconds=seconds[1:],
        temporary=analysis.temp_size_in_bytes / 2**30,
        peak=peak_memory() / 2**30,
        about=dict(jax=jax.__version__, device=jax.devices()[0].device_kind),
    )


def peak_memory() -> int:
    """Most bytes that the device has held, or on CPU this process."""
    import jax

    if stats := jax.devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_turns(size: str, versions: dict) -> list[dict]:
    """A row of the table for each kind of update; adds to `versions`."""
    turns = {kind: [] for kind in UPDATES}
    for _ in range(flags.FLAGS.turns):
        for kind, found in turns.items():
            arguments = [*sys.argv, f"--measure={kind}", f"--tables={size}"]
            done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                cli.fail(f"{kind} updates of --tables={size} ended with {done.returncode}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
            versions |= found[-1]["about"]
    return [
        {
            "tables": size,
            "updates": kind,
            "ms a step": 1e3 * measuring.median(s for turn in found for s in turn["seconds"]),
            "temporary GiB": found[0]["temporary"],
            "peak GiB": measuring.median(turn["peak"] for turn in found),
            "seconds": [turn["seconds"] for turn in found],
        }
        for kind, found in turns.items()
    ]


def main(_):
    chosen, versions, rows = flags.FLAGS, {}, []
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, chosen.tables[0])))
        return
    if hasattr(os, "sched_setaffinity"):  # not on macOS; what turns inherit
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: chosen.threads])
    for size in chosen.tables:
        found = in_turns(size, versions)
        measuring.print_table(COLUMNS, found)
        rows += found
    options = {n: chosen[n].value for n in ("rows", "row_bytes", "steps", "turns")}
    measuring.print_result("hash_tables", versions=versions, options=options, rows=rows)


if __name__ == "__main__":
    flags.DEFINE_list("tables", ["32768x64", "100000x256", "500002x256"], "ROWSxFEATURES, each.")
    flags.DEFINE_integer("rows", 2, "Rows of a batch.", 1)
    flags.DEFINE_integer("row_bytes", 1024, "Bytes of a row.", 64)
    flags.DEFINE_integer("steps", 7, "Steps that are measured in each turn.", 1)
    flags.DEFINE_integer("turns", 3, "Turns of each kind.", 1)
    flags.DEFINE_integer("threads", 2, "CPU cores that each process may use.", 1)
    flags.DEFINE_enum("measure", None, UPDATES, "One kind in this process; what a turn runs.")
    app.run(main, flags_parser=measuring.parse)

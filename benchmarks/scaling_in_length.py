"""Time and memory of a step against the length of a row: `python benchmarks/scaling_in_length.py`.

One row of 4k to 64k bytes in patches as even as can be, each length in a process of its own. Two
programs:

    local   loss and gradients of the local stacks, patches of 4.5 bytes going from the encoder
            straight to the decoder
    step    the training step; its global stack sees all patches, so patches are large by default
            (--step_patch_bytes) and its share is small

An exponent is the n of the best fit c * bytes^n, 1 where the cost of a byte does not grow. That of
memory is of `grown MB`, the peak beyond what the process held before its first step, compilation
included, and of `temp MB`, what the compiler sets aside for everything in between, without any
constant. Prints a table for each program and, last, a JSON line.
"""

import dataclasses
import tempfile
from pathlib import Path

import measuring
import numpy as np
from absl import app, flags

from bltjax import cli

PROGRAMS = {"local": "local", "step": "train"}  # as worker.py calls them
FITTED = ("step s", "grown MB", "temp MB")


def main(_):
    chosen, versions, rows, exponents = flags.FLAGS, {}, [], {}
    lengths = [int(n) for n in chosen.lengths]
    if len(lengths) < 2:
        cli.fail(f"--lengths={','.join(chosen.lengths)} is no line to fit: give two or more")
    columns = {"program": "", "bytes": ",", "patches": ",", "step s": ".3f", "bytes/s": ",.0f"}
    columns |= {"peak MB": ",.0f", "grown MB": ",.0f", "temp MB": ",.0f"}
    for program in chosen.programs:
        try:
            found = [measure(program, length, versions) for length in lengths]
        except measuring.WorkerError as error:
            cli.fail(error)
        exponents[program] = {
            name: measuring.exponent(lengths, [row[name] for row in found]) for name in FITTED
        }
        rows += found
        measuring.print_table(columns, found)
        fits = ", ".join(f"{name} {n:.3f}" for name, n in exponents[program].items())
        print(f"exponents of {program}: {fits}\n")
    options = dict(size=chosen.size, dtype=chosen.dtype, remat=chosen.remat)
    measuring.print_result(
        "scaling_in_length", versions=versions, options=options, rows=rows, exponents=exponents
    )


def measure(program: str, length: int, versions: dict) -> dict:
    """A row of the table, from a process of its own."""
    chosen = flags.FLAGS
    patch_bytes = chosen.step_patch_bytes if program == "step" else measuring.PATCH_BYTES
    batch = measuring.draw_batch(1, length, patch_bytes, even=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        measuring.Worker(measuring.OURS, chosen.threads) as worker,
    ):
        np.savez(Path(scratch) / "batch.npz", **batch)
        worker.ask(
            "build",
            task=PROGRAMS[program],
            model=measuring.settings(model(program)),
            batch=str(Path(scratch) / "batch.npz"),
            optimizer=measuring.settings(measuring.OPTIMIZER),
        )
        before = worker.ask("memory")
        worker.ask("step")
        seconds = [worker.ask("step")["seconds"] for _ in range(chosen.repeats)]
        memory = worker.ask("memory")
        temporary = worker.ask("temporary_bytes")
        versions |= worker.ask("about")
    peak = memory.get("device_peak", memory["peak"])
    held = before.get("device_now", before["now"])
    return {
        "program": program,
        "bytes": length,
        "patches": batch["patch_lengths"].shape[1],
        "step s": measuring.median(seconds),
        "bytes/s": length / measuring.median(seconds),
        "peak MB": peak / 1e6,
        "grown MB": (peak - held) / 1e6,
        "temp MB": temporary / 1e6,
        "seconds": seconds,
    }


def model(program: str):
    """Of --size; the step's has --global_layers, and local stacks hand on what they read."""
    chosen = flags.FLAGS
    found = measuring.SIZES[chosen.size]
    trunk = dataclasses.replace(
        found.global_transformer, num_layers=chosen.global_layers if program == "step" else 1
    )
    return dataclasses.replace(
        found, global_transformer=trunk, remat=chosen.remat, compute_dtype=chosen.dtype
    )


def _define_flags():
    measuring.define_model_flags("small")
    flags.DEFINE_list("lengths", ["4096", "8192", "16384", "32768", "65536"], "Bytes of the row.")
    flags.DEFINE_list("programs", list(PROGRAMS), "What to measure.")
    flags.DEFINE_float("step_patch_bytes", 32, "Bytes of a patch of the step.", 1)
    flags.DEFINE_integer("global_layers", 2, "Of the step's model.", 1)


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=measuring.parse)

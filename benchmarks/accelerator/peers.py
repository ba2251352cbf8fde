"""`transformers` beside bltjax on this device, by the benchmarks that compare the two."""

import json
import subprocess
import sys

from accelerator.notes import Notes
from measuring import ROOT, installed

SPARE = 5  # seconds that are left when a benchmark is stopped

# Two shapes, so that a peer that has no room for the second leaves the first.
LARGE = "--size=large", "--shapes=4x1024,1x8192", "--dtype=bfloat16", "--repeats=5"
# Tables that are no part of the comparison, but would be written and read.
BLT_1B = "--config=configs/blt_1b.py", "--config.blt.hash.vocab=10000", "--remat=full"
BLT_1B += "--shapes=1x8192,8x8192", "--dtype=bfloat16", "--repeats=5"
WHAT = {
    "train": ("train_step.py", *LARGE, "--apart"),
    "train_1b": ("train_step.py", *BLT_1B, "--apart"),
    "generate": ("generate.py", "--batches=1,8", "--lengths=256x128", "--pieces=2", "--repeats=3"),
}
TINY = {
    "train": ("train_step.py", "--size=tiny", "--shapes=1x64", "--repeats=1", "--threads=1"),
    "generate": ("generate.py", "--size=tiny", "--batches=1", "--lengths=16x16", "--pieces=1"),
}
TINY["generate"] += "--repeats=1", "--threads=1"


def measure(notes: Notes, what: str = "train"):
    """Notes the rows of the table that a benchmark prints."""
    if not (installed("torch") and installed("transformers")):
        notes.impossible("torch and transformers are not installed")
        return
    known = TINY if notes.tiny else WHAT
    if what not in known:
        raise ValueError(f"no comparison {what!r}: choose one of {', '.join(known)}")
    script, *options = known[what]
    command = [sys.executable, f"benchmarks/{script}", *options, "--against=transformers"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(notes.left - SPARE, 1)
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}: {done.stderr[-400:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    for row in result["rows"]:
        notes.write(f"peer {what.partition('_')[0]}", **row)

"""What the speed benchmarks share: models, batches, processes that take turns, medians, tables."""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags

from bltjax import cli
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    HashConfig,
    OptimizerConfig,
    TransformerConfig,
    to_dict,
)
from bltjax.config.model import DTYPES, REMAT_MODES
from bltjax.config.training import UPDATES
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET

ROOT = Path(__file__).parents[1]
PATCH_BYTES = 4.5
OURS, THEIRS = "bltjax", "transformers"


def model(local: int, decoder_layers: int, trunk: int, trunk_layers: int, head=64, **more):
    """A BLTConfig with one encoder layer, and cross-attention as transformers has it."""

    def stack(dim, num_layers, window=None):
        return TransformerConfig(dim, num_layers, dim // head, window=window)

    return BLTConfig(
        local_encoder=stack(local, 1, 512),
        global_transformer=stack(trunk, trunk_layers),
        local_decoder=stack(local, decoder_layers, 512),
        cross_attention=CrossAttentionConfig(k=2, num_heads=local // head),
        **dict(hash=HashConfig(vocab=10_000)) | more,
    )


SIZES = {
    "small": model(256, 4, 512, 8),
    "large": model(512, 6, 1024, 8),
    "tiny": model(32, 1, 64, 1, head=16, hash=HashConfig(vocab=100)),  # for tests
}


def define_step_flags(size: str, shapes: list[str]):
    """Flags of the benchmarks that have a batch of several rows."""
    define_model_flags(size)
    flags.DEFINE_list("shapes", shapes, "Rows x bytes of a row, of each batch.")
    flags.DEFINE_enum("hash_updates", "dense", UPDATES, "Rows of hash tables that bltjax updates.")


def define_model_flags(size: str):
    """Flags of all benchmarks of a step."""
    flags.DEFINE_enum("size", size, [*SIZES, "all"], "A model; all: small and large.")
    flags.DEFINE_enum("remat", "dots", REMAT_MODES, "What bltjax computes again going back.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "In which both compute; weights are float32.")
    flags.DEFINE_integer("repeats", 5, "Steps whose median is taken, of each.", 1)
    flags.DEFINE_integer("threads", 2, "CPU cores that each process may use.", 1)


def parse(argv):
    """absl's parser, for scripts that take flags and nothing else."""
    rest = cli.parse(argv)
    if len(rest) > 1:
        cli.fail(f"unexpected argument {rest[1]!r}: only flags are taken")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if flags.FLAGS.threads > available:
        cli.fail(
            f"--threads={flags.FLAGS.threads} is above the {available} cores of this "
            "machine: lower it"
        )
    return rest


def parse_shape(text: str) -> tuple[int, int]:
    """(rows, bytes of a row) of "4x1024"."""
    try:
        rows, length = map(int, text.split("x"))
    except ValueError:
        rows = length = 0
    if rows < 1 or length < 16:
        cli.fail(f"--shapes holds {text!r}: write ROWSxBYTES, at least 1x16")
    return rows, length


def draw_batch(rows: int, length: int, patch_bytes: float = PATCH_BYTES, even: bool = False):
    """Random bytes in random patches, as a batch of the training step (NumPy arrays).

    Patches of a row: their number is that of the mean, their starts are drawn, but for the first
    two, which the published rule forces. even: as even as whole bytes allow.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(BYTE_OFFSET, BYTE_OFFSET + 256, (rows, length + 1), dtype=np.int32)
    ids[:, 0] = BOS_ID
    positions = length + 1  # the byte to come is in a patch too
    count = max(round(positions / patch_bytes), 3)
    lengths = np.empty((rows, count), np.int32)
    for row in lengths:
        if even:
            starts = np.arange(count) * positions // count
        else:
            drawn = 2 + rng.choice(positions - 2, count - 2, replace=False)
            starts = np.concatenate([[0, 1], np.sort(drawn)])
        row[:] = np.diff([*starts, positions])
    return dict(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        loss_mask=np.ones((rows, length), bool),
        document_ids=np.zeros((rows, length), np.int32),
        patch_lengths=lengths,
    )


class WorkerError(RuntimeError):
    """What a worker could not do, or how it died."""


class Worker:
    """A `worker.py` of its own process: one question at a time, a JSON line each way."""

    def __init__(self, kind: str, threads: int):
        environment = dict(
            os.environ,
            PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            OMP_NUM_THREADS=str(threads),
            MKL_NUM_THREADS=str(threads),
            # First calls are to be real ones.
            JAX_ENABLE_COMPILATION_CACHE=os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "false"),
            XLA_PYTHON_CLIENT_PREALLOCATE="false",  # the processes share a GPU
            HF_HUB_OFFLINE="1",
            TRANSFORMERS_VERBOSITY="error",
        )
        self.kind = kind
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), kind, str(threads)],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, do: str, **arguments):
        """The answer of one of the worker's methods; raises WorkerError."""
        try:
            self.process.stdin.write(json.dumps(dict(do=do, arguments=arguments)) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            reason = f"signal {-code}, perhaps for want of memory" if code < 0 else f"code {code}"
            raise WorkerError(f"{self.kind} ended at {do!r} with {reason}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.kind} could not {do}: {answer['error']}")
        return answer["answer"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            self.process.stdin.close()  # which it takes for the end
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def alternate(actions: dict, repeats: int) -> dict[str, list]:
    """What each action gave, by name; they take turns: a, b, a, b, ..."""
    found = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            found[name].append(action())
    return found


def exponent(sizes, values) -> float:
    """n of the best fit values = c * sizes^n, by least squares of logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def settings(config) -> dict:
    """A config as a worker reads it."""
    return json.loads(json.dumps(to_dict(config)))


# The same updates from the first step on, for both.
OPTIMIZER = OptimizerConfig(schedule="constant")


def with_hash_updates(optimizer: OptimizerConfig) -> OptimizerConfig:
    """With those of --hash_updates."""
    return dataclasses.replace(optimizer, hash_updates=flags.FLAGS.hash_updates)


def machine(threads: int) -> dict:
    """What figures depend on; versions come from the workers."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return dict(
        cpu=name,
        cores=os.cpu_count(),
        threads=threads,
        memory_gib=round(memory / 2**30, 1),
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
    )


def print_table(columns: dict[str, str], rows: list[dict]):
    """Rows under headings; columns: heading -> format spec. None is shown as a dash."""

    def cell(value, spec):
        if value is None or spec == "" or isinstance(value, str):
            return "-" if value is None else str(value)
        return format(value, spec)

    cells = [list(columns)]
    cells += [[cell(row.get(name), spec) for name, spec in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)), flush=True)


def print_result(benchmark: str, versions: dict, **result):
    """The machine as a line of text, then everything as one JSON line."""
    about = machine(flags.FLAGS.threads) | versions
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(json.dumps(dict(benchmark=benchmark, machine=about) | result))


def median(values) -> float:
    return statistics.median(values)

"""MB of text a second that the pipeline makes ready: `python benchmarks/data_throughput.py`.

For each kind of source the same documents (this Python's library, --megabytes of it) are written as
files of that kind and read into records; then records become batches of packed rows that lie on the
device, on one core. Every figure is the median of --repeats runs, and of real bytes. Last is a JSON
line.
"""

import contextlib
import gzip
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from bltjax import cli, sharding
from bltjax.config import DataConfig, PatchingConfig
from bltjax.data.batches.lanes import Layout
from bltjax.data.batches.loader import as_batch, batches
from bltjax.data.batches.order import Shuffled
from bltjax.data.records import store as records
from bltjax.data.sources.units import list_units, read_unit
from bltjax.vocabulary import BYTE_OFFSET

ROW_BYTES, ROW_PATCHES, BATCH_SIZE = 8192, 1792, 8


def library(megabytes: float) -> list[tuple[str, bytes]]:
    """(name, text) of the library's files in a seeded order, each cut to 64 KiB."""
    data = DataConfig(max_bytes=int(megabytes * 1e6))
    (source,) = data.named_sources()
    found = [
        (document.name, document.data[:65536])
        for unit in list_units(source, data)
        for document in read_unit(unit, source, data)
    ]
    return [(name, text) for name, text in found if text]


def write_text(documents, directory: Path):
    for number, (_, text) in enumerate(documents):
        (directory / f"{number:05d}.txt").write_bytes(text)


def write_jsonl(documents, directory: Path, open_file=open, suffix=""):
    with open_file(directory / f"corpus.jsonl{suffix}", "wb") as file:
        for name, text in documents:
            record = dict(id=name, text=text.decode("utf-8", "surrogateescape"))
            file.write(json.dumps(record).encode("utf-8", "surrogateescape") + b"\n")


def write_jsonl_gz(documents, directory: Path):
    write_jsonl(documents, directory, gzip.open, ".gz")


def write_jsonl_zst(documents, directory: Path):
    import zstandard

    write_jsonl(documents, directory, zstandard.open, ".zst")


def write_parquet(documents, directory: Path):
    import pyarrow
    from pyarrow import parquet

    names, texts = zip(*documents, strict=True)
    table = pyarrow.table(dict(id=names, text=pyarrow.array(texts, pyarrow.binary())))
    parquet.write_table(table, directory / "corpus.parquet", compression="zstd")


def write_arrow(documents, directory: Path):
    import pyarrow

    names, texts = zip(*documents, strict=True)
    table = pyarrow.table(dict(sample_id=names, text=pyarrow.array(texts, pyarrow.binary())))
    with pyarrow.ipc.new_file(directory / "corpus.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def write_array_record(documents, directory: Path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(directory / "corpus.array_record"), "group_size:1")
    for _, text in documents:
        writer.write(text)
    writer.close()


KINDS = dict(
    text=write_text,
    jsonl=write_jsonl,
    jsonl_gz=write_jsonl_gz,
    jsonl_zst=write_jsonl_zst,
    parquet=write_parquet,
    arrow=write_arrow,
    array_record=write_array_record,
)


def seconds(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def packed(documents, layout: Layout, num_bytes: int):
    """Batches on the device, until they hold so many bytes."""
    stream, done = batches(documents, layout, BATCH_SIZE), 0
    while done < num_bytes:
        rows, _ = next(stream)
        jax.block_until_ready(sharding.put_batch(as_batch(rows)))
        done += np.count_nonzero(rows.tokens >= BYTE_OFFSET)
    stream.close()
    return done


def main(argv):
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}: only flags are taken")
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core
    documents, repeats = library(flags.FLAGS.megabytes), flags.FLAGS.repeats
    size = sum(len(text) for _, text in documents)
    print(f"{len(documents)} documents, {size / 1e6:.1f} MB")
    print(f"{'source':16}{'into records':>16}{'records to batches':>22}   (MB/s of text, one core)")
    result = {}
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        for kind, write in KINDS.items():
            with tempfile.TemporaryDirectory() as scratch:
                result[kind] = measure(kind, write, documents, size, Path(scratch), repeats)
            print(
                f"{kind:16}{result[kind]['into_records']:>16.1f}"
                f"{result[kind]['to_batches']:>22.1f}",
                flush=True,
            )
    print(json.dumps(dict(documents=len(documents), bytes=size, **result)))


def measure(kind: str, write, documents, size: int, scratch: Path, repeats: int) -> dict:
    """Megabytes a second from files to records, and from records with entropies to batches."""
    (scratch / "files").mkdir()
    write(documents, scratch / "files")
    data = DataConfig(root=str(scratch / "files"), suffixes=(".txt",), validation_fraction=1e-9)
    rates = []
    for repeat in range(repeats):
        target = scratch / f"records{repeat}"
        with contextlib.redirect_stdout(io.StringIO()):
            rates.append(size / seconds(lambda t=target: records.build(t, data)) / 1e6)
    store = records.open_store(scratch / "records0")
    random = np.random.default_rng(0)
    for shard in store.shards():  # no model: values as spread as entropies are
        lengths = [len(document.data) + 2 for document in records.Documents([shard])]
        records.write_entropies(
            shard, (random.gamma(1.0, 1.2, n).clip(0, 5.5).astype(np.float16) for n in lengths)
        )
    order = Shuffled([records.Documents(store.shards(), entropies=True)], seed=0)
    layout = Layout(ROW_BYTES, ROW_PATCHES, PatchingConfig(threshold=1.8))
    packing = []
    for _ in range(repeats):
        started = time.perf_counter()
        done = packed(order, layout, size)
        packing.append(done / (time.perf_counter() - started) / 1e6)
    return dict(into_records=statistics.median(rates), to_batches=statistics.median(packing))


if __name__ == "__main__":
    flags.DEFINE_float("megabytes", 8.0, "Of text.", 0.1)
    flags.DEFINE_integer("repeats", 5, "Runs of which the median is taken.", 1)
    app.run(main, flags_parser=cli.parse)

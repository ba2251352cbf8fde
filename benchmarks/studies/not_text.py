"""Bytes that are no text: `python -m benchmarks.studies.not_text --workdir=DIR --corpus=debian`.

Of each kind of file (sound of 16 and of 8 bits, pictures, MIDI, programs) two small BLTs are
trained, with patches by entropy and of a fixed size that follows its structure, and measured on
held-out files beside n-gram models, xz, and FLAC or PNG. Patches are drawn under the waveform, on
the picture, along the bytes. See raw_corpus.py for --corpus: a directory, "debian" or "drawn".
"""

import ast
import fnmatch
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.studies import (
    pages,
    raw_baselines,
    raw_corpus,
    raw_parts,
    raw_pictures,
    shared,
    study,
)
from benchmarks.studies.points import Point, is_finished, with_bytes, with_settings
from bltjax import cli
from bltjax.data.records.store import Documents, open_store
from bltjax.data.sources.units import is_held_out
from bltjax.runtime.files import replacing

CORPUS_BYTES = {"laptop": 1_200_000, "gpu": 60_000_000, "pod": 4_000_000_000}  # of a kind
TRAINING_BYTES = {"laptop": 800_000, "gpu": 600_000_000, "pod": 40_000_000_000}  # of a point
LOOK_BYTES = {"laptop": 40_000, "gpu": 2_000_000, "pod": 20_000_000}  # of a kind, by part
HELD_OUT = 0.15  # of the files
PARTS = "train", "validation"
ROW_BYTES = {"laptop": 1024, "gpu": 4096, "pod": 8192}
# The entropy model reads less here than text of the other studies: most of these bytes are noise.
ENTROPY_SETTINGS = {
    "laptop": {"entropy_training.steps": 150, "entropy_training.optimizer.warmup_steps": 8}
}
# On top of configs/studies/blt.py; --set changes them.
SETTINGS = {
    "laptop": {
        "blt_training.batch_size": 8,
        "blt_training.optimizer.learning_rate": 5e-3,
        "blt_training.optimizer.local_rate": 1.0,
        "blt_training.optimizer.hash_rate": 1.0,
        "blt_training.optimizer.hash_updates": "touched",
    }
}


def prepare(given: study.Settings, corpus: str, kinds: Sequence[str]) -> dict[str, dict]:
    """Makes what is missing of files, entropy models and records of each kind -> what files are.

    Raises ValueError where WORKDIR was made of another corpus.
    """
    path, asked = given.directory / "corpus.json", [given.size, corpus]
    if path.exists():
        made = json.loads(path.read_text())
        if made["made_of"] != asked:
            raise ValueError(
                f"{given.directory} was made with {made['made_of']}, not {asked}: give another "
                "--workdir"
            )
    else:
        every = list(raw_corpus.KINDS)
        found = raw_corpus.make(given.directory / "files", corpus, every, CORPUS_BYTES[given.size])
        made = dict(made_of=asked, kinds=found)
        with replacing(path) as file:
            file.write(json.dumps(made).encode())
    for kind in kinds:
        directory = given.directory / kind
        if not (directory / "done").exists():
            directory.mkdir(exist_ok=True)
            arguments = [
                f"--config.{name}={value}" for name, value in records_of(given, kind).items()
            ]
            for module in ("bltjax.train", "bltjax.preprocess"):
                shared.run_command(module, f"entropy.py:{given.size}", directory, arguments)
            (directory / "done").touch()
    return {kind: made["kinds"][kind] for kind in kinds}


def records_of(given: study.Settings, kind: str) -> dict[str, object]:
    """Settings of the entropy model and the records of a kind."""
    directory = (given.directory / "files" / kind).absolute()
    patching = {"patching.target_patch_bytes": float(raw_corpus.KINDS[kind].patch)}
    return (
        ENTROPY_SETTINGS.get(given.size, {})
        | patching
        | {
            "data.sources": (dict(name=kind, path=str(directory), kind="bytes"),),
            "data.suffixes": ("",),
            "data.validation_fraction": HELD_OUT,
            "data.seed": split_seed({p.name: p.stat().st_size for p in directory.iterdir()}),
        }
    )


def split_seed(sizes: dict[str, int]) -> int:
    """The first seed of a split by file that holds out about HELD_OUT of the bytes.

    Few files are as likely as not to be all on one side. sizes: of the files, by name.
    """

    def held_out(seed: int) -> float:
        own = [n for name, n in sizes.items() if is_held_out(name, HELD_OUT, seed)]
        return sum(own) / sum(sizes.values()) if 0 < len(own) < len(sizes) else math.inf

    off = {seed: abs(held_out(seed) / HELD_OUT - 1) for seed in range(1000)}
    return next((seed for seed in off if off[seed] < 0.3), min(off, key=off.get))


def plan(given: study.Settings, kinds: Sequence[str], changed: dict) -> list[Point]:
    """A point for each kind and rule, all of which read as many bytes; changed: settings of all."""
    planned = []
    for kind in kinds:
        made = shared.Shared(given.directory / kind, given.size, **shared.ASSUMED)
        for rule in raw_corpus.KINDS[kind].rules:
            patch = raw_corpus.KINDS[kind].patch
            # Points of other settings are other points, beside these in one WORKDIR.
            name = "-".join([kind, rule, *([shared.digest(repr(changed))] if changed else [])])
            point = made.blt(name, target=patch, rule=rule, kind=kind, patches=rule)
            row = ROW_BYTES[given.size]
            # Patches of a row are given too, so that kinds of equal patches are compiled once.
            rows = dict(row_bytes=row, row_patches=round(1.06 * row / patch))
            point = with_settings(point, rows, "blt_training.")
            point = with_settings(point, SETTINGS.get(given.size, {}) | changed)
            steps = {"blt_training.steps"} & changed.keys()
            planned.append(point if steps else with_bytes(point, TRAINING_BYTES[given.size]))
    return planned


def measure(given: study.Settings, kinds: dict[str, dict]) -> list[dict]:
    """A row for each kind: its files, and what other coders make of those held out."""
    rows = []
    for kind, about in kinds.items():
        path = given.directory / kind / "coders.json"
        if not path.exists():
            found = raw_baselines.measured(kind, *(files_of(given, kind, p) for p in PARTS))
            _write_json(path, found)
        held_out = sum(map(len, files_of(given, kind, "validation")))
        rows.append(
            dict(kind=kind) | about | dict(held_out=held_out) | json.loads(path.read_text())
        )
    return rows


def files_of(given: study.Settings, kind: str, part: str) -> list[bytes]:
    """The files of a kind, those that models are trained on or those held out."""
    store = open_store(given.directory / kind / "entropy" / "records")
    documents = Documents(store.shards(part=part))
    return [documents[i].data for i in range(len(documents))]


def look(given: study.Settings, planned: Sequence[Point]) -> list[dict]:
    """Draws patches of a held-out file of each kind -> a row for each part of files of a kind."""
    sums = {}
    for point in planned:
        kind, rule = point.about["kind"], point.about["patches"]
        if not is_finished(point, given.directory / "points"):
            continue
        path = given.directory / "points" / f"{point.name}.parts.json"
        if not path.exists():
            _write_json(path, _by_part(given, point))
        for part, own in json.loads(path.read_text()).items():
            row = sums.setdefault((kind, part), dict(kind=kind, part=part, bytes=own["bytes"]))
            row |= {f"{rule}_{name}": value for name, value in own.items() if name != "bytes"}
    return list(sums.values())


def _by_part(given: study.Settings, point: Point) -> dict[str, dict]:
    """Bytes, patches and bits of each part of held-out files; draws the first of them."""
    import bltjax  # late: it takes seconds

    kind, rule = point.about["kind"], point.about["patches"]
    model = bltjax.load(given.directory / "points" / point.name)
    sums = {}
    for i, data in enumerate(some(files_of(given, kind, "validation"), LOOK_BYTES[given.size])):
        found = raw_parts.costs(model, data)
        if i == 0:
            given.out.mkdir(parents=True, exist_ok=True)
            raw_pictures.draw(given.out / f"{kind}-{rule}.png", kind, data, found)
        names = raw_parts.parts(kind, data)
        for name in dict.fromkeys(names.tolist()):
            own = names == name
            sums.setdefault(name, []).append(
                [own.sum(), found.starts[own].sum(), found.bits[own].sum()]
                + ([] if found.entropies is None else [found.entropies[own].sum()])
            )
    columns = "patch_bytes", "bits", "entropy"
    described = {}
    for name, found in sums.items():
        size, starts, *bits = (float(x) for x in np.sum(found, axis=0))
        values = [size / max(starts, 1), *(value / size for value in bits)]
        described[name] = dict(bytes=int(size)) | dict(zip(columns, values, strict=False))
    return described


def some(files: Sequence[bytes], num_bytes: int) -> list[bytes]:
    """Files from the largest on that fit into so many bytes, but one at least."""
    found, size = [], 0
    for data in sorted(files, key=len, reverse=True):
        if not found or size + len(data) <= num_bytes:
            found.append(data)
            size += len(data)
    return found


def _write_json(path: Path, value):
    with replacing(path) as file:
        file.write(json.dumps(value).encode())


# ---- the page

CODERS = dict(order_2="order-2 n-grams", xz="xz", flac="FLAC", png="PNG")


def report(rows: Sequence[dict], kinds: Sequence[dict], parts: Sequence[dict], out: Path):
    """A picture and README.md of the rows of results.csv, kinds.csv and parts.csv."""
    groups = {
        f"BLT, {rule}": {r["kind"]: r["bits_per_byte"] for r in rows if r["patches"] == rule}
        for rule in ("entropy", "static")
    }
    groups |= {
        name: {row["kind"]: row[column] for row in kinds if row.get(column) is not None}
        for column, name in CODERS.items()
    }
    groups = {name: own for name, own in groups.items() if own}
    pages.bars(out / "bits.png", groups, "bits per byte, held out")
    bits = dict.fromkeys(("entropy_2", "xz", "xz_trained", "flac", "png"), ".3f")
    bits = {f"order_{n}": ".3f" for n in raw_baselines.ORDERS} | bits
    by_part = {name: ".3f" for row in parts for name in row if name not in ("kind", "part")}
    drawn = [f"![patches of {r['kind']}]({r['kind']}-{r['patches']}.png)" for r in rows]
    pages.write_page(
        out / "README.md",
        "Bytes that are no text",
        "![bits per byte of each kind](bits.png)",
        *seen(rows, kinds),
        pages.table(kinds, dict(kind="", origin="", files="", bytes=",", held_out=",") | bits),
        pages.table(rows, dict(kind="", patches="", bits_per_byte=".4f") | pages.COST),
        pages.table(parts, dict(kind="", part="") | by_part | dict(bytes=",")),
        *drawn,
    )


def seen(rows: Sequence[dict], kinds: Sequence[dict]) -> list[str]:
    """A line for each kind: what has how many bits per byte, from the fewest on."""
    lines = []
    for row in kinds:
        found = {
            f"BLT {r['patches']}": r["bits_per_byte"] for r in rows if r["kind"] == row["kind"]
        }
        found |= {
            name: row[column] for column, name in CODERS.items() if row.get(column) is not None
        }
        ranked = ", ".join(f"{name} {found[name]:.2f}" for name in sorted(found, key=found.get))
        lines.append(f"* {row['kind']}: {ranked}.")
    return ["\n".join(lines)]


def changed_settings(given: Sequence[str]) -> dict:
    """ "a.b=1e-3" as {"a.b": 0.001}. Raises ValueError for what is no NAME=VALUE."""
    found = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not name or not equals:
            raise ValueError(f"--set={item!r} must be NAME=VALUE, a setting of every point")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def chosen_kinds(patterns: Sequence[str]) -> list[str]:
    """Kinds that match. Raises ValueError where none does."""
    found = [k for k in raw_corpus.KINDS if any(fnmatch.fnmatch(k, p) for p in patterns)]
    if not found:
        raise ValueError(
            f"--sources={','.join(patterns)} match none of {', '.join(raw_corpus.KINDS)}"
        )
    return found


def main(argv):
    study.check(argv)
    given, corpus = study.settings(), flags.FLAGS.corpus or raw_corpus.DRAWN
    # One for all kinds: their models have the same shapes.
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str((given.directory / "compiled").absolute())
    )
    with study.guarded():
        kinds = chosen_kinds(given.patterns)
        changed = changed_settings(flags.FLAGS.set)
        about = {} if given.dry_run else prepare(given, corpus, kinds)
        planned = plan(given, kinds, changed)
        rows = study.carry_out(given, planned)
        measured, parts = measure(given, about), look(given, planned)
        pages.write_csv(given.out / "kinds.csv", measured)
        pages.write_csv(given.out / "parts.csv", parts)
        report(rows, measured, parts, given.out)
        study.finish(given, rows)


if __name__ == "__main__":
    study.define_flags(corpus_help="A directory, debian or drawn, see benchmarks/studies/README.md")
    flags.DEFINE_multi_string("set", [], "NAME=VALUE, a setting of every point, on top of its own.")
    app.run(main, flags_parser=cli.parse)

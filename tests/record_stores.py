"""A small corpus of two sources, its store, and sources of made-up records."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.records import store as records
from bltjax.data.sources import units as sources
from bltjax.data.sources.units import Bad, Document, Unit

LANGUAGES = ("en", "de", "")


def write_corpus(root: Path) -> DataConfig:
    """Text files, and JSON lines with a bad one; a compressed file is a unit of several chunks."""
    rng = np.random.default_rng(0)
    for i in range(30):
        path = root / f"code/{i % 3}/{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(rng.integers(1, 400)))
    lines = [
        json.dumps({"text": "ä" * int(rng.integers(0, 200)), "id": i, "lang": LANGUAGES[i % 3]})
        for i in range(48)
    ]
    lines[41] = "{broken"
    (root / "web").mkdir()
    (root / "web/0.jsonl").write_text("\n".join(lines[0::2]))
    (root / "web/1.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[1::2]).encode()))
    names = (SourceConfig("code", str(root / "code")), SourceConfig("web", str(root / "web")))
    return DataConfig(sources=names, shard_bytes=2500, validation_fraction=0.3)


def files_of(directory: Path) -> dict[str, bytes]:
    """Relative path to content; locks are no part of a store."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in paths
        if ".locks" not in path.parts
    }


def all_documents(store, **kwargs) -> list[Document]:
    found = [records.Documents(store.shards(part=part), **kwargs) for part in records.PARTS]
    return [documents[i] for documents in found for i in range(len(documents))]


def entropies_of(shard, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, shard.documents])
    documents = records.Documents([shard])
    return [5 * rng.random(len(documents[i].data) + 2) for i in range(len(documents))]


def add_entropies(store):
    for part in records.PARTS:
        for shard in store.shards(part=part):
            if not records.has_entropies(shard):
                records.write_entropies(shard, entropies_of(shard))


class FakeSources:
    """In the place of `sources`: one unit for each list of records."""

    def __init__(self, units: list[list[Document | Bad]]):
        self.units = units

    def survey(self, source, data):
        return [Unit(f"u{i}", "text", (), 0, -1, 10) for i in range(len(self.units))], []

    def read_unit(self, unit, source, data):
        yield from self.units[int(unit.name[1:])]

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(sources, "survey", self.survey)
        self.patch.setattr(sources, "read_unit", self.read_unit)

    def __exit__(self, *_):
        self.patch.undo()

"""Which text a run reads: its sources, their mixture, and what is held out."""

import re
from dataclasses import dataclass

from bltjax.config.checks import one_of, positive

HUB = "hf://"
SOURCE_KINDS = ("auto", "text", "jsonl", "parquet", "array_record", "arrow", "huggingface")


@dataclass(frozen=True)
class SourceConfig:
    """A named part of the corpus."""

    name: str = "text"  # in metrics, reports and file names
    # A file, a directory or a glob, local or gs://. kind="huggingface": a dataset on the hub, or a
    # directory that `datasets.load_dataset` takes.
    path: str = ""
    kind: str = "auto"  # one of SOURCE_KINDS; auto: each file by its name
    field: str = ""  # of a record's text; empty: the first there is of DataConfig.text_fields
    weight: float = 0.0  # share of the bytes; 0 for all sources: each document once an epoch
    subset: str = ""  # huggingface: the name of the dataset's configuration
    split: str = "train"  # huggingface

    def problems(self, name: str) -> list[str]:
        found = one_of(self, name, "kind", SOURCE_KINDS)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            found.append(
                f"{name}.name={self.name!r} must be letters, digits, _, - or . (it names files)"
            )
        if self.kind == "huggingface" and not self.path:
            found.append(f"{name}.path={self.path!r} must name a dataset")
        if not 0 <= self.weight < float("inf"):
            found.append(f"{name}.weight={self.weight} must be a number of 0 or more")
        return found


@dataclass(frozen=True)
class DataConfig:
    """The corpus. Documents are split into training and validation by a hash of their names."""

    # The path of a single source; empty: the running Python's standard library;
    # hf://DATASET or hf://DATASET:SUBSET: a Hugging Face dataset.
    root: str = ""
    sources: tuple[SourceConfig, ...] = ()  # named sources, in the place of `root`
    suffixes: tuple[str, ...] = (".py", ".rst", ".txt", ".md")  # of text files in directories
    exclude: tuple[str, ...] = (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        ".git",
    )
    text_fields: tuple[str, ...] = ("text", "content")  # of records; the first that is there
    id_fields: tuple[str, ...] = ("sample_id", "title", "qid", "paper_id", "path", "url", "id")
    language_fields: tuple[str, ...] = ("language", "lang")
    bad_records: str = "skip"  # or "fail": a record without the field, bad JSON, a cut-off file
    validation_fraction: float = 0.035
    max_bytes: int | None = None  # of each source, about; files are taken in a seeded order
    shard_bytes: int = 64_000_000  # of documents in a shard of records, the unit of resuming
    records: str = ""  # records made by `bltjax.preprocess`; empty: workdir/records
    workers: int = 0  # processes that prepare batches; 0: a thread of the training process
    seed: int = 0

    def problems(self, name: str) -> list[str]:
        found = one_of(self, name, "bad_records", ("skip", "fail"))
        found += positive(self, name, "shard_bytes")
        if not 0 < self.validation_fraction < 1:
            found.append(
                f"{name}.validation_fraction={self.validation_fraction} must lie between 0 and 1"
            )
        for number in ("workers", "seed"):
            if getattr(self, number) < 0:
                found.append(f"{name}.{number}={getattr(self, number)} must not be negative")
        if self.max_bytes is not None and self.max_bytes < 1:
            found.append(f"{name}.max_bytes={self.max_bytes} must be at least 1")
        if self.root == HUB:
            found.append(f"{name}.root={self.root!r} must name a dataset")
        if self.root and self.sources:
            found.append(f"{name}.root={self.root!r} and {name}.sources: give one of them")
        if self.records and (self.root or any(s.path for s in self.sources)):
            found.append(
                f"{name}.records={self.records!r} holds the text already: give no {name}.root, and "
                f"{name}.sources with names and weights only"
            )
        names = [s.name for s in self.sources]
        for twice in sorted({n for n in names if names.count(n) > 1}):
            found.append(f"{name}.sources: two are named {twice!r}")
        weighted = sum(s.weight > 0 for s in self.sources)
        if 0 < weighted < len(self.sources):
            found.append(
                f"{name}.sources: {weighted} of {len(self.sources)} have a weight: give all of "
                "them one, or none"
            )
        for i, source in enumerate(self.sources):
            found += source.problems(f"{name}.sources[{i}]")
        return found

    def named_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, or the single one that `root` is."""
        if self.root.startswith(HUB):
            path, _, subset = self.root.removeprefix(HUB).partition(":")
            return (SourceConfig(path=path, kind="huggingface", subset=subset),)
        return self.sources or (SourceConfig(path=self.root),)

"""Settings of the corpus: its sources, their mixture, and the held-out part."""

import re
from dataclasses import dataclass

from bltjax.config.checks import not_negative, one_of, positive

HUB = "hf://"
FILE_KINDS = ("auto", "text", "bytes", "jsonl", "parquet", "array_record", "arrow")
SOURCE_KINDS = (*FILE_KINDS, "huggingface")


@dataclass(frozen=True)
class SourceConfig:
    """A named part of the corpus."""

    name: str = "text"  # name in metrics, reports and file names
    # A file, directory or glob, local or gs://; for kind="huggingface" the name of a dataset, or a
    # directory that `datasets.load_dataset` takes. Empty: the running Python's standard library.
    path: str = ""
    # auto: told by each file's name; text: a file is a document, decompressed if need be; bytes:
    # the same with its bytes as they are; or jsonl, parquet, array_record, arrow, huggingface.
    kind: str = "auto"
    field: str = ""  # field that holds a record's text; empty: see DataConfig.text_fields
    weight: float = 0.0  # share of the bytes; 0 for all sources: each document once an epoch
    subset: str = ""  # huggingface: the dataset's configuration
    split: str = "train"  # huggingface: the dataset's split

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = one_of(self, name, "kind", SOURCE_KINDS)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            found.append(
                f"{name}.name={self.name!r} must be letters, digits, _, - or . (it names files)"
            )
        if self.kind == "huggingface" and not self.path:
            found.append(f"{name}.path={self.path!r} must name a dataset")
        return found + not_negative(self, name, "weight")


@dataclass(frozen=True)
class DataConfig:
    """The corpus. A hash of its name puts a document into the training or the validation part."""

    # Path of the only source, or hf://DATASET or hf://DATASET:SUBSET for a Hugging Face dataset.
    # Empty: the running Python's standard library.
    root: str = ""
    sources: tuple[SourceConfig, ...] = ()  # named sources, instead of `root`
    suffixes: tuple[str, ...] = (".py", ".rst", ".txt", ".md")  # endings of text files that count
    exclude: tuple[str, ...] = (  # names of directories that are left out
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        ".git",
    )
    text_fields: tuple[str, ...] = ("text", "content")  # a record's text: the first field there is
    # A record's name: the first of these fields that there is, else its place in its file.
    id_fields: tuple[str, ...] = ("sample_id", "title", "qid", "paper_id", "path", "url", "id")
    language_fields: tuple[str, ...] = ("language", "lang")  # a record's language, likewise
    # Records without text, bad JSON and files that are cut off are left out ("skip"), or are an
    # error ("fail").
    bad_records: str = "skip"
    validation_fraction: float = 0.035  # share of the documents that is held out
    max_bytes: int | None = None  # about how much of each source is read, from files drawn by seed
    shard_bytes: int = 64_000_000  # bytes of a shard of records; a killed run repeats one at most
    records: str = ""  # directory of records from `bltjax.preprocess`; empty: WORKDIR/records
    workers: int = 0  # processes that prepare batches; 0: a thread of the training process
    seed: int = 0  # of the split, and of the order in which files are taken

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = one_of(self, name, "bad_records", ("skip", "fail"))
        found += positive(self, name, "shard_bytes", "max_bytes")
        found += not_negative(self, name, "workers", "seed")
        if not 0 < self.validation_fraction < 1:
            found.append(
                f"{name}.validation_fraction={self.validation_fraction} must lie between 0 and 1"
            )
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
        """Returns the sources; `root` is the only one where it is given."""
        if self.root.startswith(HUB):
            path, _, subset = self.root.removeprefix(HUB).partition(":")
            return (SourceConfig(path=path, kind="huggingface", subset=subset),)
        return self.sources or (SourceConfig(path=self.root),)

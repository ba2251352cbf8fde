"""Settings of the corpus: its sources, their mixture, and the held-out part."""

import collections
import re
from dataclasses import dataclass

from bltjax.config.chat import ChatConfig
from bltjax.config.checks import (
    MOST_BYTES,
    MOST_SEED,
    MOST_WORKERS,
    TINY,
    not_negative,
    one_of,
    positive,
    shown,
)

HUB = "hf://"
SYNTHETIC = "synthetic://"
FILE_KINDS = ("auto", "text", "bytes", "jsonl", "parquet", "array_record", "arrow")
SOURCE_KINDS = (*FILE_KINDS, "chat", "huggingface", "synthetic")


@dataclass(frozen=True)
class SourceConfig:
    """A named part of the corpus."""

    name: str = "text"  # name in metrics, reports and file names: letters, digits, `_`, `-` and `.`
    # a file, a directory or a glob, local or `gs://`; for `kind="huggingface"` a dataset on the
    # hub, or a directory that `datasets.load_dataset` takes
    path: str = ""
    # `"auto"` decides by the name of each file; `"text"`: a file is a document, decompressed if
    # need be; `"bytes"`: the same with its bytes as they are; `"chat"`: conversations, in JSON
    # lines or Parquet; `"synthetic"`: text that is drawn, without a path; or one of `"jsonl"`,
    # `"parquet"`, `"array_record"`, `"arrow"`, `"huggingface"`
    kind: str = "auto"
    field: str = ""  # field of a record that holds its text; empty: the first of `data.text_fields`
    # share of the bytes of this source; 0 for all sources: each document once an epoch. Give all
    # sources a weight, or none
    weight: float = 0.0
    subset: str = ""  # `huggingface` only: name of the dataset's configuration
    split: str = "train"  # `huggingface` only: the split that is read
    # endings of the text files, or of those of raw bytes, that are read in its directories; empty:
    # those of `data.suffixes`; `('',)`: any
    suffixes: tuple[str, ...] = ()

    def text_suffixes(self, data: "DataConfig") -> tuple[str, ...]:
        """Returns the endings of the text files that are read in its directories."""
        return self.suffixes or data.suffixes

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = one_of(self, name, "kind", SOURCE_KINDS)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            found.append(
                f"{name}.name={shown(self.name)} must be letters, digits, _, - or ., for files"
            )
        if self.kind == "huggingface" and not self.path:
            found.append(f"{name}.path={self.path!r} must name a dataset")
        if (self.path and self.kind == "synthetic") or _is_drawn(self.path):
            found.append(
                f"{name}.path={shown(self.path)}: text that is drawn has no path, give "
                "kind='synthetic' alone"
            )
        return found + not_negative(self, name, "weight")


@dataclass(frozen=True)
class DataConfig:
    """The corpus. A hash of its name puts a document into the training or the validation part."""

    # the path of a single source: a file, a directory or a glob, local or `gs://`; `hf://DATASET`
    # or `hf://DATASET:SUBSET` for a Hugging Face dataset; `synthetic://` for text that is drawn
    # from `seed`; empty: the standard library of the running Python
    root: str = ""
    sources: tuple[SourceConfig, ...] = ()  # named sources, instead of `root`
    # endings of the text files that are read in directories, also with `.gz`, `.zst`, `.xz` or
    # `.bz2` behind them; `('',)`: any
    suffixes: tuple[str, ...] = (".py", ".rst", ".txt", ".md")
    exclude: tuple[str, ...] = (  # names of directories that are skipped
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        ".git",
    )
    # field of a record that holds its text; the first that is there
    text_fields: tuple[str, ...] = ("text", "content")
    chat: ChatConfig = ChatConfig()  # turns of sources of the kind `chat`
    # field of a record that names it; the first that is there
    id_fields: tuple[str, ...] = ("sample_id", "title", "qid", "paper_id", "path", "url", "id")
    # field of a record that names its language; the first that is there
    language_fields: tuple[str, ...] = ("language", "lang")
    # `"skip"` counts a broken record and goes on; `"fail"` ends the run. Broken: bad JSON, no text
    # field, a file that is cut off
    bad_records: str = "skip"
    validation_fraction: float = 0.035  # share of the documents that is held out, between 0 and 1
    # bytes taken of each source, approximately; files are taken in an order drawn from `seed`;
    # None: all, of text that is drawn 16 MB
    max_bytes: int | None = None
    # bytes of a document that training reads, its first ones; None: all. A small run learns more of
    # many beginnings than of a few whole files
    max_document_bytes: int | None = None
    # bytes of documents in a shard of records; a shard is the unit of resuming and of shared work
    shard_bytes: int = 64_000_000
    # a directory of records made by `bltjax preprocess` elsewhere, local or `gs://`; empty:
    # `WORKDIR/records`
    records: str = ""
    # a local directory for copies of what is read from buckets; empty: `bltjax` in the user's cache
    # directory
    cache: str = ""
    # bytes of these copies at most; those that were not used for longest are deleted
    cache_bytes: int = 200_000_000_000
    workers: int = 0  # processes that prepare batches; 0: a thread of the training process
    # seed of the split, of the order of files and of documents, and of text that is drawn
    seed: int = 0

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = one_of(self, name, "bad_records", ("skip", "fail"))
        found += self.chat.problems(f"{name}.chat")
        sizes = "shard_bytes", "max_bytes", "max_document_bytes", "cache_bytes"
        found += positive(self, name, *sizes, most=MOST_BYTES)
        found += not_negative(self, name, "workers", most=MOST_WORKERS)
        found += not_negative(self, name, "seed", most=MOST_SEED)
        if not TINY <= self.validation_fraction < 1:
            found.append(
                f"{name}.validation_fraction={self.validation_fraction} must be above 0 and below 1"
            )
        if self.root == HUB:
            found.append(f"{name}.root={self.root!r} must name a dataset")
        if _is_drawn(self.root) and self.root != SYNTHETIC:
            found.append(
                f"{name}.root={shown(self.root)} must be {SYNTHETIC!r}: how much text is drawn and "
                f"which, {name}.max_bytes and {name}.seed say"
            )
        if self.root and self.sources:
            found.append(f"{name}.root={self.root!r} and {name}.sources: give one of them")
        if self.records and (self.root or any(s.path for s in self.sources)):
            found.append(
                f"{name}.records={self.records!r} holds the text already: give no {name}.root, and "
                f"{name}.sources with names and weights only"
            )
        names = collections.Counter(s.name for s in self.sources)
        for twice in sorted(name for name, count in names.items() if count > 1):
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
        if self.root == SYNTHETIC:
            return (SourceConfig(kind="synthetic"),)
        return self.sources or (SourceConfig(path=self.root),)


def _is_drawn(path: str) -> bool:
    return path.startswith(SYNTHETIC.rstrip("/"))

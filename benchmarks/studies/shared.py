"""What the points of a study share: text, records with entropies, a tokenizer.

WORKDIR/text/SOURCE/     a sample of the corpus, where the size of the study asks for one
WORKDIR/entropy/         the entropy model and the records (configs/studies/entropy.py)
WORKDIR/tokenizer.json   of the BPE models; tokenizer-marks.json has the pattern `marks`
WORKDIR/measured.json    mean bytes of a token and of a patch between spaces
"""

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.studies.points import CONFIGS, ROOT, Point, environment
from bltjax.config import DataConfig, PatchingConfig, SourceConfig, read_config
from bltjax.config.run import PATTERNS
from bltjax.data.sources.files import python_library_root
from bltjax.data.sources.units import Document, list_units, read_unit
from bltjax.runtime.files import replacing
from configs.studies import tokens as tokens_file

SAMPLE_BYTES = {"laptop": 12_000_000}  # with what a study adds; other sizes read the whole corpus
LOOK_BYTES = 200_000_000  # of a source, among which its share is drawn
TOKENIZER_BYTES = 20_000_000
# As long as nothing is measured.
ASSUMED = dict(token_bytes=4.0, token_bytes_marks=4.0, space_bytes=6.0)


class Shared(NamedTuple):
    directory: Path
    size: str
    token_bytes: float
    token_bytes_marks: float
    space_bytes: float

    @property
    def records(self) -> str:
        return str((self.directory / "entropy" / "records").absolute())

    @property
    def entropy_model(self) -> Path:
        return self.directory / "entropy"

    def blt(self, name, level=0, dim=None, target=None, rule="entropy", **about) -> Point:
        """A byte latent transformer; target: bytes of its mean patch, where the rule has one."""
        patch_bytes = {"space": self.space_bytes, "static": target, "byte": 1.0}.get(rule, target)
        settings = {"patching.rule": rule, "data.records": self.records}
        if rule == "static":
            settings["patching.patch_size"] = int(target)
        elif rule not in ("space", "byte"):
            settings["patching.target_patch_bytes"] = float(target)
        arguments = f"{self.size},level={level}" + (f",dim={dim}" if dim else "")
        return Point(name, f"blt.py:{arguments}", patch_bytes, settings, dict(level=level) | about)

    def tokenizer(self, pattern: str = "letters") -> Path:
        """Where the tokenizer with a pattern for words lies."""
        name = "tokenizer.json" if pattern == "letters" else f"tokenizer-{pattern}.json"
        return self.directory / name

    def tokens(
        self, name, level=0, dim=None, bytes_only=False, tables=False, pattern="letters", **about
    ) -> Point:
        """A transformer over BPE tokens or over bytes, whose rows span those of the BLTs.

        tables: with hash n-gram tables like a BLT's. pattern: for words, of the tokenizer.
        """
        arguments = f"{self.size},level={level}" + (f",dim={dim}" if dim else "")
        arguments += ",tables=1" if tables else ""
        if bytes_only:
            arguments, token_bytes = f"{arguments},vocab={tokens_file.BYTES_ONLY}", 1.0
            settings = {"data.records": self.records}
        else:
            token_bytes = self.token_bytes if pattern == "letters" else self.token_bytes_marks
            path = str(self.tokenizer(pattern).absolute())
            settings = {"data.records": self.records, "tokenizer.path": path}
        row = max(8, round(tokens_file.BATCH[self.size][1] / token_bytes / 8) * 8)
        settings["token_training.row_bytes"] = row
        about = dict(level=level) | about
        return Point(name, f"tokens.py:{arguments}", token_bytes, settings, about)


def assumed(directory: Path, size: str) -> Shared:
    """What is known before anything is made, or what was measured."""
    path = directory / "measured.json"
    found = json.loads(path.read_text()) if path.exists() else ASSUMED
    return Shared(directory, size, **{name: found[name] for name in ASSUMED})


def prepare(
    directory: Path,
    size: str,
    corpus: str,
    patterns: list[str],
    balanced: bool = False,
    extra: dict[str, list[bytes]] | None = None,
    settings: dict | None = None,
) -> Shared:
    """Makes what is missing of it, and measures. Raises ValueError where the text is not there.

    patterns: of the names of the sources that are read. balanced: a sample with as much of each.
    extra: sources made by the study. settings: of the entropy model, for its config.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, asked = directory / "measured.json", [size, corpus, patterns, settings or {}]
    if path.exists():
        made = json.loads(path.read_text())
        if made["made_of"] != asked or ASSUMED.keys() - made.keys():
            raise ValueError(
                f"{directory} was made with {made['made_of']} by this or an older version, not "
                f"{asked}: give another --workdir"
            )
        return assumed(directory, size)
    text = _text(directory, size, corpus, patterns, balanced, extra or {})
    arguments = [f"--config.{name}={value}" for name, value in (settings or {}).items()]
    for module in ("bltjax.train", "bltjax.preprocess"):
        run_command(module, f"entropy.py:{size},corpus={text}", directory, arguments)
    measured = _measure(directory, tokens_file.VOCABULARY[size])
    with replacing(path) as file:
        file.write(json.dumps(measured | dict(made_of=asked)).encode())
    return assumed(directory, size)


def held_out(shared: Shared, num_bytes: int) -> list[bytes]:
    """Held-out documents of at most so many bytes in all, but one at least, evenly spread."""
    return _documents(shared, "validation", num_bytes)


def training_text(shared: Shared, num_bytes: int) -> list[bytes]:
    """Training documents, likewise."""
    return _documents(shared, "train", num_bytes)


def _documents(shared: Shared, part: str, num_bytes: int) -> list[bytes]:
    from bltjax.data.records.store import Documents, open_store

    every = Documents(open_store(shared.records).shards(part=part))
    found, size = [], 0
    for i in sorted(range(len(every)), key=lambda i: _hash(str(i))):
        data = every[i].data
        if found and size + len(data) > num_bytes:
            break
        found.append(data)
        size += len(data)
    return found


def _text(directory, size, corpus, patterns, balanced, extra) -> str:
    """Where the sources of a study lie, as entropy.py takes it."""
    wanted = chosen_sources(corpus, patterns)
    target = directory / "text"
    if not target.exists():
        partial = directory / "text.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if size in SAMPLE_BYTES:
            added = sum(len(data) for documents in extra.values() for data in documents)
            extra = sample(wanted, SAMPLE_BYTES[size] - added, balanced) | extra
        for name, documents in extra.items():
            (partial / name).mkdir()
            for i, data in enumerate(documents):
                (partial / name / f"{i:06d}.txt").write_bytes(data)
        partial.rename(target)
    made = [str(target.absolute())] if any(target.iterdir()) else []
    if size in SAMPLE_BYTES:
        return made[0]
    return os.pathsep.join([s.path or str(python_library_root()) for s in wanted] + made)


def chosen_sources(corpus: str, patterns: list[str]) -> tuple[SourceConfig, ...]:
    """The sources of a corpus whose names match. Raises ValueError where none does."""
    config = read_config(f"{CONFIGS}/entropy.py:laptop,corpus={corpus}")
    every = config.data.named_sources()
    found = [s for s in every if any(fnmatch.fnmatch(s.name, p) for p in patterns)]
    if not found:
        names = ", ".join(source.name for source in every)
        raise ValueError(f"--sources={','.join(patterns)} match none of {names}: give others")
    return tuple(found)


def sample(sources, num_bytes: int, balanced: bool) -> dict[str, list[bytes]]:
    """Documents of each source, about `num_bytes` in all, by size or as much of each."""
    every = {source.name: list(_read(source)) for source in sources}
    sizes = {name: sum(len(d) for _, d in documents) for name, documents in every.items()}
    left, total, found = num_bytes, sum(sizes.values()), {}
    # From the smallest on: what one has too little of, the others share.
    for i, name in enumerate(sorted(sizes, key=sizes.get)):
        share = left / (len(sizes) - i) if balanced else left * sizes[name] / total
        total -= sizes[name]
        taken, size = [], 0
        for _, data in sorted(every[name], key=lambda item: _hash(item[0])):
            if size >= share:
                break
            taken.append(data)
            size += len(data)
        found[name], left = taken, left - size
    return found


def _read(source: SourceConfig) -> Iterator[tuple[str, bytes]]:
    size, data = 0, DataConfig()
    for unit in list_units(source, data):
        for document in read_unit(unit, source, data):
            if isinstance(document, Document):
                size += len(document.data)
                yield document.name, document.data
        if size > LOOK_BYTES:
            return


def run_command(module: str, config: str, directory: Path, arguments: list[str]):
    """A command of bltjax to its end, in DIRECTORY/entropy. Raises ValueError where it fails."""
    path = f"--config={CONFIGS}/{config}"
    command = [sys.executable, "-m", module, path, f"--workdir={directory / 'entropy'}", *arguments]
    print(f"{module}: {config}", flush=True)
    with (directory / "entropy.log").open("ab") as log:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(directory), stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        last = (directory / "entropy.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"{module} ended with {done.returncode} ({' '.join(last)})")


def _measure(directory: Path, vocabulary: int) -> dict:
    """Trains the tokenizers too, on training documents."""
    from bltjax.data import tokenizer
    from bltjax.data.records.store import open_store
    from bltjax.recipe.entropies import sample_lengths

    shared = Shared(directory, "", **ASSUMED)
    texts, held = training_text(shared, TOKENIZER_BYTES), held_out(shared, 1_000_000)
    token_bytes = {}
    for pattern in PATTERNS:
        made = tokenizer.train(texts, vocabulary, pattern)
        made.save(shared.tokenizer(pattern))
        ids = sum(len(made.encode(text, add_bos=False, add_eos=False)) for text in held)
        token_bytes[pattern] = sum(map(len, held)) / ids
    store = open_store(shared.records)
    lengths = sample_lengths(PatchingConfig(rule="space"), store.shards())
    sizes = {source: sum(s.num_bytes for s in store.shards(source)) for source in lengths}
    patches = sum(size / lengths[source].mean() for source, size in sizes.items())
    return dict(
        token_bytes=token_bytes["letters"],
        token_bytes_marks=token_bytes["marks"],
        space_bytes=float(sum(sizes.values()) / patches),
    )


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def digest(text: str) -> str:
    """A name for a text, of eight letters and digits."""
    return _hash(text).hex()[:8]

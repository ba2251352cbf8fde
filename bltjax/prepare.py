"""What must be right before a run writes anything: stages, sizes, mesh, text, working directory.

A working directory belongs to one config and one text. `config.json` holds both, written when a
run first claims the directory and compared whenever it is resumed.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.config import ENTROPY_RULES, RunConfig, differences, to_dict
from bltjax.data.sources import Document, python_library_root, read_documents, split_by_file
from bltjax.files import replacing
from bltjax.training.checkpoint import has_checkpoint


class Corpus(NamedTuple):
    train: list[Document]  # in the seeded order in which runs read them
    validation: list[Document]


class Prepared(NamedTuple):
    """What must be right before anything is written."""

    config: RunConfig
    workdir: Path
    corpus: Corpus
    mesh: jax.sharding.Mesh


def prepare(config: RunConfig, workdir: str | os.PathLike) -> Prepared:
    """Check everything a run needs. Raises ValueError or OSError naming the value and remedy."""
    workdir = Path(workdir).absolute()
    mesh = sharding.make_mesh(config.mesh)
    check_stages(config, workdir)
    check_batch_sizes(config, mesh)
    for name in used_models(config):
        sharding.check_model(getattr(config, name), name, mesh)
    corpus = read_corpus(config)
    check_corpus_size(config, corpus)
    claim_workdir(config, corpus, workdir)
    return Prepared(config, workdir, corpus, mesh)


def used_models(config: RunConfig) -> list[str]:
    """The models that the stages run, not only those they train."""
    stages = set(config.stages)
    blt = bool(stages & {"blt", "sample"}) or stages == {"evaluate"}
    patched = blt or "entropies" in stages
    entropy_model = "entropy_model" in stages or (patched and config.patching.rule in ENTROPY_RULES)
    return ["entropy_model"] * entropy_model + ["blt"] * blt


def check_stages(config: RunConfig, workdir: Path):
    """A model that the stages use must be trained by them, or before. Raises ValueError."""
    used = used_models(config)
    if config.patching.rule == "bpe" and "blt" in used:
        raise ValueError(
            "patching.rule='bpe' starts patches at delimiters (id 3), which files of raw bytes do "
            "not have: choose another rule"
        )
    for stage in used:
        if stage not in config.stages and not has_checkpoint(workdir / stage / "checkpoints"):
            raise ValueError(
                f"stages={config.stages} need a trained {stage} in {workdir}, and there is none: "
                f"add the stage {stage!r}, or run it first in that --workdir"
            )


def check_corpus_size(config: RunConfig, corpus: Corpus):
    """Each training stage needs text for one batch. Raises ValueError."""
    size = sum(len(document.data) for document in corpus.train)
    for stage, name in (("entropy_model", "entropy_training"), ("blt", "blt_training")):
        training = getattr(config, name)
        batch = training.batch_size * training.row_bytes
        if stage in config.stages and size < batch:
            raise ValueError(
                f"the corpus has {size} bytes for training, fewer than one batch of {name}."
                f"batch_size={training.batch_size} rows of row_bytes={training.row_bytes}: give "
                "more text, or lower them"
            )


def check_batch_sizes(config: RunConfig, mesh: jax.sharding.Mesh):
    """Rows are split over the mesh, so each stage's batch must divide. Raises ValueError."""
    shards = sharding.num_row_shards(mesh)
    names = [name.replace("entropy_model", "entropy") + "_training" for name in used_models(config)]
    names += ["evaluation"] if "evaluate" in config.stages else []
    for name in names:
        size = getattr(config, name).batch_size
        if size % shards:
            raise ValueError(
                f"{name}.batch_size={size} is not divisible by the {shards} row shards of "
                f"mesh={dict(mesh.shape)}: change one"
            )


def read_corpus(config: RunConfig) -> Corpus:
    """The documents of a run, split by file, training documents in seeded order."""
    data = config.data
    root = Path(data.root) if data.root else python_library_root()
    try:
        documents = read_documents(root, data.suffixes, data.exclude, data.max_bytes)
    except PermissionError as error:
        raise PermissionError(f"data.root={root}: {error}: make it readable, or move it") from error
    train_documents, validation = split_by_file(documents, data.validation_fraction, data.seed)
    order = np.random.default_rng(data.seed).permutation(len(train_documents))
    return Corpus([train_documents[i] for i in order], validation)


def claim_workdir(config: RunConfig, corpus: Corpus, workdir: Path):
    """Write config and fingerprint into a new working directory, or compare with those there.

    Raises ValueError where they differ, OSError where nothing can be written.
    """
    claim = dict(config=to_dict(config), corpus=fingerprint(corpus))
    path = workdir / "config.json"
    if not path.exists():
        # A process killed while it wrote the claim leaves its partial file.
        if workdir.is_dir() and {p.name for p in workdir.iterdir()} - {"config.partial"}:
            raise ValueError(
                f"{workdir} is not empty and holds no run (no config.json): choose a new --workdir"
            )
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, claim)
        except OSError as error:
            raise OSError(
                f"--workdir={workdir} cannot be written ({error}): choose another"
            ) from error
        return
    try:
        there = json.loads(path.read_text())
        changed = differences(there["config"], claim["config"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or choose a new --workdir"
        ) from error
    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(
            f"{workdir} holds a run of another config ({changed[0]}{more}): choose another "
            "--workdir, or give the settings it was started with"
        )
    if there["corpus"] != claim["corpus"]:
        raise ValueError(
            f"{workdir} holds a run on other text ({there['corpus']} there, {claim['corpus']} "
            "here): choose another --workdir, or give the corpus it was started with"
        )


def fingerprint(corpus: Corpus) -> str:
    """Sizes and a digest of every document's name and bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for document in (*corpus.train, *corpus.validation):
        for part in (document.name.encode("utf-8", "surrogateescape"), document.data):
            digest.update(len(part).to_bytes(8, "big") + part)
    return f"{len(corpus.train)}+{len(corpus.validation)} files, {digest.hexdigest()}"


def write_json(path: Path, value: dict):
    """Atomically: a killed process leaves the old file or the new one, never half of one."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())

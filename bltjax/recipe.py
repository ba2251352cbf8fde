"""A run from text to a measured model: the stages of a RunConfig, each resuming by itself.

    entropy_model   train the small byte model                       workdir/entropy_model/
    entropies       run it over the corpus, calibrate the threshold  workdir/entropies/
    blt             train the byte latent transformer                workdir/blt/
    evaluate        bits per byte of held-out files, and baselines
    sample          a continuation, and the patches of a sentence

A stage that a run leaves out must have been done in the same working directory before, or not be
needed: rules such as `space` use no entropies.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.config import ENTROPY_RULES, PatchingConfig, RunConfig, to_dict
from bltjax.data.entropies import (
    corpus_entropies,
    make_entropy_fn,
    receptive_bytes,
    stored_entropies,
)
from bltjax.data.packing import Row, pack_bytes, pack_patches, stack, utilisation
from bltjax.data.sources import Document
from bltjax.evaluation.baselines import baselines
from bltjax.evaluation.bits_per_byte import evaluate
from bltjax.flops import format_report, parameter_report
from bltjax.inference.decode import generate_by_recompute, row_patch_starts
from bltjax.model import functional
from bltjax.patching.boundaries import lengths_from_starts, patch_starts
from bltjax.patching.calibrate import calibrate_threshold, mean_patch_bytes
from bltjax.prepare import Corpus, Prepared, write_json
from bltjax.training.checkpoint import has_checkpoint, load_params
from bltjax.training.loop import train
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import abstract_state
from bltjax.training.step import make_eval_step
from bltjax.vocabulary import encode


def run(prepared: Prepared) -> dict:
    """All stages in order -> the result, also in workdir/result.json."""
    config, workdir, corpus, mesh = prepared
    started = time.perf_counter()
    result = dict(workdir=str(workdir), compilations={}, parameters={})
    describe(prepared)
    with jax.set_mesh(mesh):
        if "entropy_model" in config.stages:
            train_entropy_model(config, workdir, corpus, result)
        patching, documents = config.patching, None
        if "entropies" in config.stages or "blt" in config.stages:
            patching, documents = find_patches(config, workdir, corpus, result)
        if "blt" in config.stages:
            train_blt(config, workdir, documents, result)
        if "evaluate" in config.stages:
            evaluate_model(config, workdir, corpus, documents, result)
        if "sample" in config.stages:
            show_sample(config, workdir, patching, result)
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_json(workdir / "result.json", result)
    return result


def describe(prepared: Prepared):
    _, workdir, corpus, mesh = prepared
    sizes = [sum(len(d.data) for d in part) for part in corpus]
    print(
        f"corpus: {len(corpus.train)} files, {sizes[0] / 1e6:.2f} MB for training; "
        f"{len(corpus.validation)} files, {sizes[1] / 1e6:.2f} MB held out\n"
        f"mesh: {dict(mesh.shape)} on {jax.devices()[0].device_kind}; workdir: {workdir}",
        flush=True,
    )


def train_entropy_model(config: RunConfig, workdir: Path, corpus: Corpus, result: dict):
    """Stage 1."""
    report("entropy_model", config.entropy_model, result)
    stage = config.entropy_training
    documents = take_bytes(corpus.train, stage.steps * stage.batch_size * stage.row_bytes)
    rows = stack(pack_bytes((encode(d.data) for d in documents), stage.row_bytes))
    trained = train("entropy_model", config.entropy_model, stage, rows, workdir / "entropy_model")
    result["compilations"]["entropy_model"] = trained.compilations


class Patched(NamedTuple):
    """Documents as ids, and where their patches start."""

    train: list[tuple[np.ndarray, np.ndarray]]
    validation: list[tuple[np.ndarray, np.ndarray]]
    mean_patch_bytes: float


def find_patches(config: RunConfig, workdir: Path, corpus: Corpus, result: dict):
    """Stage 2 -> the PatchingConfig with the calibrated threshold, and Patched documents.

    Only as many training documents as the next stage reads go through the entropy model.
    """
    patching, stage = config.patching, config.blt_training
    documents = take_bytes(corpus.train, stage.steps * stage.batch_size * stage.row_bytes)
    ids = [[encode(d.data) for d in part] for part in (documents, corpus.validation)]
    entropies = [[None] * len(part) for part in ids]
    if patching.rule in ENTROPY_RULES:
        entropies = entropies_of(config, workdir, ids, result)
        if patching.target_patch_bytes is not None:
            threshold = calibrate_threshold(
                entropies[0], patching.target_patch_bytes, patching.rule
            )
            patching = dataclasses.replace(patching, threshold=threshold)
        write_json(workdir / "patching.json", to_dict(patching))
        result["threshold"] = patching.threshold
    train_part, validation = (
        [(i, patch_starts(patching, i, h)[: len(i)]) for i, h in zip(*part, strict=True)]
        for part in zip(ids, entropies, strict=True)
    )
    mean = mean_patch_bytes([starts for _, starts in train_part])
    result["mean_patch_bytes"] = mean
    print(
        f"patches: {mean:.2f} bytes on average"
        + (f" at threshold {patching.threshold:.4f} nats" if entropies[0][0] is not None else ""),
        flush=True,
    )
    return patching, Patched(train_part, validation, mean)


def entropies_of(config: RunConfig, workdir: Path, ids, result: dict) -> list[list[np.ndarray]]:
    """Entropies of the (training, validation) documents; shards that are stored are only read."""
    entropy_fn = make_entropy_fn(config.entropy_model, config.patching.reset_at_newlines)
    stage = config.entropy_training
    row_bytes = max(stage.row_bytes, 2 * receptive_bytes(config.entropy_model))
    params = functools.cache(lambda: entropy_params(config, workdir))

    def compute(documents):
        return corpus_entropies(
            entropy_fn, params(), config.entropy_model, documents, row_bytes, stage.batch_size
        )

    found = [
        stored_entropies(workdir / "entropies", name, part, compute)
        for name, part in zip(("train", "validation"), ids, strict=True)
    ]
    result["compilations"]["entropies"] = entropy_fn._cache_size()
    return found


def train_blt(config: RunConfig, workdir: Path, documents: Patched, result: dict):
    """Stage 3."""
    report("blt", config.blt, result)
    rows = pack(config, documents, documents.train)
    result.update(utilisation(rows))
    print(
        f"rows: {len(rows.tokens)} of {rows.tokens.shape[1]} bytes and "
        f"{rows.patch_lengths.shape[1]} patches; {result['byte_utilisation']:.1%} of byte "
        f"positions and {result['patch_utilisation']:.1%} of patch slots are real",
        flush=True,
    )
    trained = train("blt", config.blt, config.blt_training, rows, workdir / "blt")
    result["compilations"]["blt"] = trained.compilations


def evaluate_model(
    config: RunConfig, workdir: Path, corpus: Corpus, documents: Patched | None, result: dict
):
    """Stage 4: bits per byte of the held-out files, beside n-gram models and xz.

    Of the byte latent transformer, or of the entropy model in a run that trains nothing else.
    """
    if "blt" not in config.stages and not has_checkpoint(workdir / "blt" / "checkpoints"):
        model, params = config.entropy_model, entropy_params(config, workdir)
        ids = (encode(d.data) for d in corpus.validation)
        rows = stack(pack_bytes(ids, config.entropy_training.row_bytes))
    else:
        if documents is None:
            _, documents = find_patches(config, workdir, corpus, result)
        model, params = config.blt, blt_params(config, workdir)
        rows = pack(config, documents, documents.validation)
    eval_step = make_eval_step(model)
    sums = evaluate(eval_step, params, rows, config.evaluation.batch_size)
    result["bits_per_byte"] = sums["bits_per_byte"]
    result["validation_bytes"] = int(sums["bytes"])
    result["compilations"]["evaluate"] = eval_step._cache_size()
    print(
        f"held out: {sums['bits_per_byte']:.4f} bits per byte over {sums['bytes']:.0f} bytes",
        flush=True,
    )
    if config.evaluation.baselines:
        result["baselines"] = baselines(*([d.data for d in part] for part in corpus))
        found = ", ".join(f"{name} {bits:.3f}" for name, bits in result["baselines"].items())
        print(f"baselines: {found}", flush=True)


def show_sample(config: RunConfig, workdir: Path, patching: PatchingConfig, result: dict):
    """Stage 5: a continuation of the prompt, and the patches of a sentence."""
    settings, params = config.evaluation, blt_params(config, workdir)
    entropy_config, entropy = None, None
    if patching.rule in ENTROPY_RULES:
        entropy_config, entropy = config.entropy_model, entropy_params(config, workdir)
        stored = workdir / "patching.json"
        patching = dataclasses.replace(
            patching, threshold=json.loads(stored.read_text())["threshold"]
        )
    continuation = generate_by_recompute(
        config.blt,
        params,
        entropy_config,
        entropy,
        patching,
        settings.prompt,
        max_new_bytes=settings.sample_bytes,
        temperature=settings.temperature,
    )
    text = settings.prompt + continuation.decode("utf-8", errors="replace")
    print(f"sample:\n{text}\n", flush=True)

    ids = encode(settings.sentence, add_eos=False)
    starts, _ = row_patch_starts(patching, entropy_config, entropy, sharding.one_per_shard(ids))
    lengths = lengths_from_starts(np.asarray(starts)[0, : len(ids)])
    pieces = np.split(
        np.frombuffer(settings.sentence.encode(), np.uint8), np.cumsum(lengths)[:-1] - 1
    )[1:]  # the first patch is BOS alone
    result["patches"] = [bytes(p).decode("utf-8", errors="replace") for p in pieces]
    print("patches:\n" + "|".join(result["patches"]), flush=True)
    result["sample"] = text


def pack(config: RunConfig, documents: Patched, part) -> Row:
    """Rows of both budgets; the default patch budget follows from the measured mean patch."""
    stage = config.blt_training
    wanted = -(-stage.row_bytes / documents.mean_patch_bytes // 8) * 8
    patches = stage.row_patches or int(min(stage.row_bytes, max(wanted, 8)))
    return stack(pack_patches(part, stage.row_bytes, patches))


def take_bytes(documents: list[Document], num_bytes: int) -> list[Document]:
    """The first documents that together hold at least `num_bytes`, or all."""
    taken, total = [], 0
    for document in documents:
        if total >= num_bytes:
            break
        taken.append(document)
        total += len(document.data)
    return taken


def report(stage: str, model_config, result: dict):
    counts = parameter_report(functional.abstract_params(model_config))
    result["parameters"][stage] = counts
    print(f"{stage}: {format_report(counts)}", flush=True)


def entropy_params(config: RunConfig, workdir: Path) -> dict:
    return trained_params(config.entropy_model, config.entropy_training, workdir / "entropy_model")


def blt_params(config: RunConfig, workdir: Path) -> dict:
    return trained_params(config.blt, config.blt_training, workdir / "blt")


def trained_params(model_config, stage, directory: Path) -> dict:
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    return load_params(directory / "checkpoints", abstract_state(model_config, optimizer))

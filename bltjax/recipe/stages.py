"""A run from text to a measured model: the stages of a RunConfig, each resuming by itself.

    (always)        read the corpus into records                     workdir/records/
    entropy_model   train the small byte model                       workdir/entropy_model/
    entropies       run it over what is read, calibrate a threshold  workdir/records/, patching.json
    blt             train the byte latent transformer                workdir/blt/
    evaluate        bits per byte of held-out documents, and baselines
    sample          a continuation, and the patches of a sentence
    token_model     train a tokenizer, and a transformer of tokens   workdir/token_model/

A stage that a run leaves out must have been done in the same working directory before, or not be
needed: rules such as `space` use no entropies, and records may have them already. `token_model`
stands beside the others, as what a BLT is measured against; a run of it wants stages of its own.
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np

from bltjax import sharding
from bltjax.checkpoints.run_directory import (
    WEIGHTS,
    blt_params,
    entropy_params,
    is_of_tokens,
    is_trained,
    token_params,
)
from bltjax.config import ENTROPY_RULES, PatchingConfig, RunConfig, to_dict
from bltjax.costs.flops import TRAINING_FACTOR, flops_per_byte, format_report, parameter_report
from bltjax.costs.peak import peak_flops
from bltjax.data.batches.lanes import Lane, Layout
from bltjax.data.batches.loader import whole_batches
from bltjax.data.batches.rows import utilisation
from bltjax.data.records.store import Documents, Store
from bltjax.evaluation.bits_per_byte import evaluate
from bltjax.evaluation.ngram_baselines import baselines
from bltjax.inference.engine import generate
from bltjax.inference.model_steps import prepared
from bltjax.inference.reference import row_patch_starts
from bltjax.inference.requests import ask, configure
from bltjax.model import functional
from bltjax.patching.boundaries import lengths_from_starts
from bltjax.recipe import corpus, token_corpus
from bltjax.recipe import entropies as entropies_module
from bltjax.recipe.checks import Prepared
from bltjax.recipe.entropies import Patched
from bltjax.recipe.workdir import write_json
from bltjax.training.loop import InStep, TrainingData, Watch, train
from bltjax.training.patch_finder import make_patch_finder
from bltjax.training.step import make_eval_step
from bltjax.vocabulary import encode

BASELINE_BYTES = 100_000_000  # that n-gram models are fitted on, about: they count in memory
MEASURED_ROWS = 256  # whose budgets are reported


def run(prepared: Prepared) -> dict:
    """All stages in order -> the result, also in workdir/result.json."""
    config, workdir, mesh = prepared
    started = time.perf_counter()
    result = dict(workdir=str(workdir), compilations={}, parameters={})
    print(
        f"mesh: {dict(mesh.shape)} on {jax.devices()[0].device_kind}; workdir: {workdir}",
        flush=True,
    )
    with jax.set_mesh(mesh):
        store = corpus.open_corpus(config, workdir)
        if "entropy_model" in config.stages:
            train_entropy_model(config, workdir, store, result)
        if "token_model" in config.stages:
            train_token_model(config, workdir, store, result)
        patched = None
        if "entropies" in config.stages or "blt" in config.stages:
            patched = find_patches(config, workdir, store, result)
        if "blt" in config.stages:
            train_blt(config, workdir, store, patched, result)
        if "evaluate" in config.stages:
            evaluate_model(config, workdir, store, patched, result)
        if "sample" in config.stages:
            show_sample(config, workdir, config.patching, result)
    result["seconds"] = round(time.perf_counter() - started, 1)
    if jax.process_index() == 0:
        write_json(workdir / "result.json", result)
    sharding.barrier("the run is over")  # the end of the process waits less long for others
    return result


def train_entropy_model(config: RunConfig, workdir: Path, store: Store, result: dict):
    """Stage 1; nothing is left to do where a model was brought."""
    if (workdir / "entropy_model" / WEIGHTS).is_dir():
        return
    report("entropy_model", config.entropy_model, result)
    stage = config.entropy_training
    shards = corpus.select(config, store, corpus.needed_bytes(config, stage))
    data = corpus.training_data(config, store, shards, Layout(stage.row_bytes), entropies=False)
    trained = train(
        "entropy_model",
        config.entropy_model,
        stage,
        data,
        workdir / "entropy_model",
        watch=watch(config, config.entropy_model, data.layout),
    )
    result["compilations"]["entropy_model"] = trained.compilations


def find_patches(
    config: RunConfig, workdir: Path, store: Store, result: dict, everything: bool = False
) -> Patched:
    """Stage 2: the threshold, and the documents of the next stages with their entropies."""
    patched, threshold = entropies_module.find_patches(config, workdir, store, everything), ""
    if config.patching.rule in ENTROPY_RULES:
        result["compilations"]["entropies"] = patched.compilations
        write_json(workdir / "patching.json", to_dict(patched.patching), once=True)
        sharding.barrier("a threshold is written")
        others = entropies_module.stored_threshold(workdir) != patched.patching.threshold
        if sharding.any_process(others):  # another run was first
            patched = entropies_module.find_patches(config, workdir, store, everything)
        result["threshold"] = patched.patching.threshold
        threshold = f" at threshold {patched.patching.threshold:.4f} nats"
    result["mean_patch_bytes"] = patched.mean_patch_bytes
    print(f"patches: {patched.mean_patch_bytes:.2f} bytes on average{threshold}", flush=True)
    return patched


def train_blt(config: RunConfig, workdir: Path, store: Store, patched: Patched, result: dict):
    """Stage 3."""
    report("blt", config.blt, result)
    layout = entropies_module.blt_layout(config, patched)
    write_json(workdir / "rows.json", layout._replace(patching=None)._asdict())
    stored = config.patching.rule in ENTROPY_RULES and not config.patching.in_step
    data = corpus.training_data(config, store, patched.train, layout, entropies=stored)
    measure_rows(data, result)
    in_step = in_step_patching(config, workdir, patched, layout)
    trained = train(
        "blt",
        config.blt,
        config.blt_training,
        data,
        workdir / "blt",
        in_step,
        watch(config, config.blt, layout, patched.mean_patch_bytes),
    )
    result["compilations"]["blt"] = trained.compilations
    result["data_wait_fraction"] = trained.data_wait_fraction


def train_token_model(config: RunConfig, workdir: Path, store: Store, result: dict):
    """The tokenizer, and the transformer of its ids, in the same loop as the others."""
    report("token_model", config.token_model, result)
    tokenizer = token_corpus.ensure_tokenizer(config, workdir, store)
    layout = Layout(config.token_training.row_bytes, tokenizer=tokenizer)
    data, mean = token_corpus.training_data(config, store, tokenizer, layout)
    print(f"tokens: {len(tokenizer)} ids, {mean:.2f} bytes on average", flush=True)
    about = watch(config, config.token_model, layout)
    about = about._replace(
        flops_per_byte=about.flops_per_byte / mean,
        about=about.about | dict(tokenizer=tokenizer.digest),
    )
    directory = workdir / "token_model"
    trained = train(
        "token_model", config.token_model, config.token_training, data, directory, watch=about
    )
    result["compilations"]["token_model"] = trained.compilations
    result["data_wait_fraction"] = trained.data_wait_fraction


def watch(config: RunConfig, model_config, layout: Layout, mean_patch_bytes: float = 1.0) -> Watch:
    """What a stage tells of itself: useful FLOPs, traces, and the settings, for its checkpoints."""
    forward = flops_per_byte(model_config, layout.row_bytes, mean_patch_bytes)["total"]
    about = dict(config=to_dict(config), mesh=dict(jax.sharding.get_mesh().shape))
    peak = peak_flops(model_config.compute_dtype)
    return Watch(TRAINING_FACTOR * forward, peak, config.profile, about)


def in_step_patching(
    config: RunConfig, workdir: Path, patched: Patched, layout: Layout
) -> InStep | None:
    """What finds the patches of rows without; None where rows have them."""
    if layout.row_patches:
        return None
    entropy = config.patching.rule in ENTROPY_RULES
    finder = make_patch_finder(
        patched.patching,
        config.entropy_model if entropy else None,
        entropies_module.in_step_patches(config, patched, layout.row_bytes),
    )
    return InStep(finder, entropy_params(config, workdir) if entropy else None)


def measure_rows(data: TrainingData, result: dict):
    """How full rows are, on the first of them."""
    lane = Lane(data.documents, data.layout, 0, 1)
    found = utilisation(itertools.islice(lane, MEASURED_ROWS))
    result.update(found)
    shares = ", ".join(
        f"{share:.1%} of {kind.split('_')[0]} {'positions' if kind.startswith('byte') else 'slots'}"
        for kind, share in found.items()
    )
    layout = data.layout
    patches = f" and {layout.row_patches} patches" if layout.row_patches else ""
    print(f"rows: {layout.row_bytes} bytes{patches}; {shares} are real", flush=True)


def evaluate_model(
    config: RunConfig, workdir: Path, store: Store, patched: Patched | None, result: dict
):
    """Stage 4: bits per byte of the held-out documents, beside n-gram models and xz.

    Of the byte latent transformer, else of the token model, else of the entropy model.
    """
    in_step, byte_lengths = None, None
    if is_of_tokens(config.stages, workdir):
        model, params = config.token_model, token_params(config, workdir)
        tokenizer = token_corpus.ensure_tokenizer(config, workdir, store)
        layout = Layout(config.token_training.row_bytes, tokenizer=tokenizer)
        byte_lengths, entropies = tokenizer.byte_lengths(model.vocab_size), False
        shards = corpus.select(config, store, config.evaluation.max_bytes, "validation")
    elif "blt" not in config.stages and not is_trained(workdir / "blt"):
        model, params = config.entropy_model, entropy_params(config, workdir)
        layout, entropies = Layout(config.entropy_training.row_bytes), False
        shards = corpus.select(config, store, config.evaluation.max_bytes, "validation")
    else:
        patched = patched or find_patches(config, workdir, store, result)
        model, params = config.blt, blt_params(config, workdir)
        layout, shards = entropies_module.blt_layout(config, patched), patched.validation
        in_step = in_step_patching(config, workdir, patched, layout)
        entropies = config.patching.rule in ENTROPY_RULES and in_step is None
    # One document after the other, so that each has as much context as its rows can give.
    documents = corpus.in_order(store, shards, entropies)
    rows = Lane(documents, layout._replace(pool=1), 0, 1)
    finder = in_step and in_step.find_patches
    eval_step = make_eval_step(model, finder, len(store.sources), byte_lengths)
    batches = whole_batches(rows, config.evaluation.batch_size)
    frozen = [in_step.entropy_params] if in_step else []
    sums = evaluate(eval_step, params, batches, store.sources, *frozen)
    result["bits_per_byte"] = sums["bits_per_byte"]
    result["validation_bytes"] = int(sums["bytes"])
    result["sources"] = sums["sources"]
    if "tokens" in sums:
        result["mean_token_bytes"] = sums["bytes"] / sums["tokens"]
    result["compilations"]["evaluate"] = eval_step._cache_size()
    print(
        f"held out: {sums['bits_per_byte']:.4f} bits per byte over {sums['bytes']:.0f} bytes",
        flush=True,
    )
    if len(sums["sources"]) > 1:
        for name, of in sums["sources"].items():
            print(f"  {name}: {of['bits_per_byte']:.4f} over {of['bytes']} bytes", flush=True)
    if config.evaluation.baselines and jax.process_index() == 0:
        parts = corpus.select(config, store, BASELINE_BYTES), shards
        texts = ([d.data for d in Documents(part)] for part in parts)
        result["baselines"] = baselines(*texts)
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
    models = dict(blt=params) | ({} if entropy is None else dict(entropy_model=entropy))
    configs, options = configure(
        config.blt, entropy_config, patching, temperature=settings.temperature
    )
    row = ask([settings.prompt], settings.sample_bytes, 0, config.blt_training.row_bytes)
    (continuation,), _ = generate(configs, prepared(models), row, **options)
    text = settings.prompt + continuation.decode("utf-8", errors="replace")
    print(f"sample:\n{text}\n", flush=True)

    ids = encode(settings.sentence, add_eos=False)
    starts, _ = row_patch_starts(patching, entropy_config, entropy, sharding.one_per_shard(ids))
    lengths = lengths_from_starts(sharding.on_host(starts)[0, : len(ids)])
    pieces = np.split(
        np.frombuffer(settings.sentence.encode(), np.uint8), np.cumsum(lengths)[:-1] - 1
    )[1:]  # the first patch is BOS alone
    result["patches"] = [bytes(p).decode("utf-8", errors="replace") for p in pieces]
    print("patches:\n" + "|".join(result["patches"]), flush=True)
    result["sample"] = text


def report(stage: str, model_config, result: dict):
    counts = parameter_report(model_config, functional.abstract_params(model_config))
    result["parameters"][stage] = counts
    print(f"{stage}: {format_report(counts)}", flush=True)

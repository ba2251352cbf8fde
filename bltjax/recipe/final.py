"""The last stages of a run: `evaluate` measures its model, `sample` shows what it writes."""

import dataclasses

import jax

from bltjax import sharding
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import RunConfig
from bltjax.data.batches.loader import whole_batches
from bltjax.data.records.store import Documents, Shard, Store
from bltjax.evaluation.bits_per_byte import evaluate
from bltjax.evaluation.ngram_baselines import baselines
from bltjax.evaluation.patch_use import patch_use, told
from bltjax.evaluation.patches.view import view_of
from bltjax.inference.decoders import BLTDecoder, for_generation
from bltjax.inference.engine import generate
from bltjax.inference.requests import make_requests
from bltjax.inference.sampling import Sampling
from bltjax.model import functional
from bltjax.model.lora import merged
from bltjax.patching.boundaries import needs_entropies
from bltjax.recipe import corpus
from bltjax.recipe.entropies import Patched
from bltjax.recipe.held_out import HeldOut, held_out
from bltjax.runtime.progress import announced
from bltjax.runtime.terminal import printable, printable_name
from bltjax.vocabulary import encode, text_bytes

BASELINE_BYTES = 100_000_000  # that n-gram models are fitted on, about: they count in memory


def evaluate_model(
    config: RunConfig, directory: RunDirectory, store: Store, patched: Patched | None, name: str
) -> dict:
    """Measures the bits per byte of held-out documents, beside n-gram models and xz."""
    stage = directory.stage(config, name)
    held, params = held_out(config, directory, store, patched, stage), stage.params()
    with announced("evaluate: compiling and measuring"):
        sums = measure_held_out(config, store, held, params)
    print(
        f"held out: {sums['bits_per_byte']:.4f} bits per byte over {sums['bytes']:.0f} bytes",
        flush=True,
    )
    if len(sums["sources"]) > 1:
        for source, of in sums["sources"].items():
            print(
                f"  {printable_name(source)}: {of['bits_per_byte']:.4f} over {of['bytes']} bytes",
                flush=True,
            )
    result = dict(
        bits_per_byte=sums["bits_per_byte"],
        validation_bytes=int(sums["bytes"]),
        sources=sums["sources"],
        compilations=dict(evaluate=held.eval_step._cache_size()),
    )
    if "tokens" in sums:
        result["mean_token_bytes"] = sums["bytes"] / sums["tokens"]
    if held.use_step and config.evaluation.patch_use_rows:
        result["patch_use"] = measure_patch_use(config, store, held, params)
        result["compilations"]["patch_use"] = held.use_step._cache_size()
    if name == "entropy_model":
        result["entropy_model"] = dict(bits_per_byte=sums["bits_per_byte"])
    elif uses_entropy_model(config, directory):
        result["entropy_model"] = measure_entropy_model(config, directory, store)
    if config.evaluation.baselines and jax.process_index() == 0:
        result["baselines"] = measure_baselines(
            corpus.select(config, store, BASELINE_BYTES), held.shards
        )
    return result


def measure_held_out(config: RunConfig, store: Store, held: HeldOut, params: dict) -> dict:
    """Returns what `evaluate` finds over all held-out rows."""
    batches = whole_batches(held.rows(store, held.shards), config.evaluation.batch_size)
    return evaluate(held.eval_step, params, batches, store.sources, *held.frozen)


def measure_patch_use(config: RunConfig, store: Store, held: HeldOut, params: dict) -> dict:
    """Prints and returns how much a BLT uses its patches, on a sample of held-out rows."""
    settings = config.evaluation
    rows = held.sample(store, settings.patch_use_rows)
    with announced("patch use: compiling and measuring"):
        found = patch_use(held.use_step, params, rows, settings.batch_size, *held.frozen)
    print(told(found), flush=True)
    return found


def uses_entropy_model(config: RunConfig, directory: RunDirectory) -> bool:
    """Returns whether a run trained an entropy model or found patches by one."""
    wanted = "entropy_model" in config.stages or needs_entropies(config.patching)
    return wanted and directory.is_trained("entropy_model")


def measure_entropy_model(config: RunConfig, directory: RunDirectory, store: Store) -> dict:
    """Prints and returns the bits per byte that the entropy model needs of the same documents."""
    stage = directory.stage(config, "entropy_model")
    held = held_out(config, directory, store, None, stage)
    with announced("entropy model: compiling and measuring"):
        bits = measure_held_out(config, store, held, stage.params())["bits_per_byte"]
    print(f"entropy model: {bits:.4f} bits per byte of the held-out documents", flush=True)
    return dict(bits_per_byte=bits)


def measure_baselines(train: list[Shard], validation: list[Shard]) -> dict:
    """Prints and returns the bits per byte of n-gram models and xz."""
    texts = ([d.data for d in Documents(part)] for part in (train, validation))
    found = baselines(*texts)
    print("baselines: " + ", ".join(f"{n} {bits:.3f}" for n, bits in found.items()), flush=True)
    return found


def show_sample(config: RunConfig, directory: RunDirectory) -> dict:
    """Prints and returns a continuation of the prompt, and the patches of a sentence."""
    settings, patching = config.evaluation, config.patching
    blt, params = merged(config.blt, directory.stage(config, "blt").params())
    models = dict(blt=params)
    entropy_config = None
    if needs_entropies(patching):
        entropy_config = config.entropy_model
        models["entropy_model"] = directory.stage(config, "entropy_model").params()
        patching = dataclasses.replace(patching, threshold=directory.threshold())
    decoder = BLTDecoder(blt, entropy_config, patching)
    prompt, length = [settings.prompt], config.blt_training.row_bytes
    requests = make_requests(decoder, prompt, settings.sample_bytes, 0, length)
    sampling = Sampling(temperature=settings.temperature)
    with announced("sample: compiling and drawing"):
        params = for_generation(decoder, models)
        (continuation,), _ = generate(decoder, params, requests, sampling)
    text = text_bytes(settings.prompt) + continuation
    print(f"sample:\n{printable(text)}\n", flush=True)

    sentence, entropies = text_bytes(settings.sentence), None
    ids = encode(sentence)
    if needs_entropies(patching):
        model = entropy_config, models["entropy_model"]
        rows = sharding.one_per_shard(ids), patching.reset_at_newlines
        with announced("patches: compiling the entropies"):
            entropies = sharding.on_host(functional.entropies(*model, *rows))[0]
    view = view_of(sentence, ids, entropies, patching, patching)
    print("patches:\n" + "|".join(map(printable, view.patches)), flush=True)
    return dict(
        patches=[patch.decode("utf-8", errors="replace") for patch in view.patches],
        sample=text.decode("utf-8", errors="replace"),
    )

"""A run from text to a measured model: the stages of a RunConfig, each resuming by itself.

    (always)        read the corpus into records
    entropy_model   train the small byte model
    entropies       run it over what is read, calibrate a threshold
    blt             train the byte latent transformer
    evaluate        bits per byte of held-out documents, and baselines
    sample          a continuation, and the patches of a sentence
    token_model     train a tokenizer, and a transformer of tokens

Where they leave what they make: bltjax/checkpoints/run_directory.py. A stage that a run leaves out
must have been done in the same working directory before, or not be needed: rules such as `space`
use no entropies, and records may have them already. `token_model` stands beside the others, as what
a BLT is measured against; a run of it wants stages of its own.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator

import jax

from bltjax import sharding
from bltjax.checkpoints.run_directory import RunDirectory, Stage, has_weights
from bltjax.checkpoints.weights import Weights
from bltjax.config import RunConfig, to_dict
from bltjax.costs.flops import TRAINING_FACTOR, flops_per_byte, format_report, parameter_report
from bltjax.costs.peak import peak_flops
from bltjax.data.batches.lanes import Lane, Layout
from bltjax.data.batches.rows import utilisation
from bltjax.data.records.store import Store
from bltjax.model import functional
from bltjax.model.transformer import attention_report
from bltjax.patching.boundaries import needs_entropies
from bltjax.recipe import corpus, token_corpus
from bltjax.recipe.checks import CheckedRun
from bltjax.recipe.entropies import Patched, blt_layout, find_patches
from bltjax.recipe.final import evaluate_model, show_sample
from bltjax.recipe.held_out import held_out, in_step_patching, validation
from bltjax.recipe.start import first_params, import_first_entropy_model
from bltjax.recipe.teacher import open_teacher
from bltjax.runtime.paths import is_remote
from bltjax.runtime.system_errors import writing
from bltjax.runtime.terminal import printable_name
from bltjax.training.block_diffusion import blocks_per_byte
from bltjax.training.loop import InStep, Reporting, TrainingData, train
from bltjax.training.optimizer import learning, make_optimizer
from bltjax.training.state import abstract_state
from bltjax.training.teacher import Teacher

MEASURED_ROWS = 256  # whose budgets are reported
HEADLINES = dict(  # in the order in which they run
    entropy_model="train the small byte model, which tells how hard bytes are to guess",
    token_model="train a tokenizer, and a transformer of its tokens",
    entropies="find where patches start in the corpus",
    blt="train the byte latent transformer",
    evaluate="measure the bits per byte of held-out documents",
    sample="show a continuation, and the patches of a sentence",
)


def run(checked: CheckedRun) -> dict:
    """Runs all stages in order; returns the result, which is also written to result.json.

    Raises BlockingIOError where another run trains in the same working directory.
    """
    with checked.directory.own() if jax.process_index() == 0 else contextlib.nullcontext():
        sharding.barrier("the working directory is ours")
        return run_alone(checked)


def run_alone(checked: CheckedRun) -> dict:
    """Does the work of `run` in a working directory that the run owns."""
    config, directory, mesh, start = checked
    started = time.perf_counter()
    workdir = printable_name(str(directory.path))
    on = f"{dict(mesh.shape)} on {jax.devices()[0].device_kind}"
    print(f"mesh: {on}; workdir: {workdir}", flush=True)
    result = dict(workdir=str(directory.path), compilations={}, parameters={})
    with jax.set_mesh(mesh):
        store = corpus.open_corpus(config, directory)
        for part in run_stages(config, directory, store, start):
            for of_each_stage in ("compilations", "parameters"):
                result[of_each_stage] |= part.pop(of_each_stage, {})
            result |= part
    result["seconds"] = round(time.perf_counter() - started, 1)
    if jax.process_index() == 0:
        directory.write_result(result)
    sharding.barrier("the run is over")  # the end of the process waits less long for others
    return result


def run_stages(
    config: RunConfig, directory: RunDirectory, store: Store, start: Weights | None = None
) -> Iterator[dict]:
    """Runs the stages one by one; yields the part of the result that each of them gives."""
    stages, patched = set(config.stages), None
    if start:
        import_first_entropy_model(config, directory, start)
    evaluated = directory.evaluated(stages) if "evaluate" in stages else None
    if "entropy_model" in stages:
        begin("entropy_model", config)
        yield train_entropy_model(config, directory, store, start)
    if "token_model" in stages:
        begin("token_model", config)
        yield train_token_model(config, directory, store)
    if stages & {"entropies", "blt"} or evaluated == "blt":
        if "entropies" in stages:
            begin("entropies", config)
        patched = find_patches(config, directory, store)
        yield describe_patches(config, patched)
    if "blt" in stages:
        begin("blt", config)
        yield train_blt(config, directory, store, patched, start)
    if evaluated:
        begin("evaluate", config)
        yield evaluate_model(config, directory, store, patched, evaluated)
    if "sample" in stages:
        begin("sample", config)
        yield show_sample(config, directory)


def begin(name: str, config: RunConfig):
    """Prints the headline of a stage."""
    order = [stage for stage in HEADLINES if stage in config.stages]
    place = f"{order.index(name) + 1} of {len(order)}"
    print(f"stage {place}, {name}: {HEADLINES[name]}", flush=True)


def train_entropy_model(
    config: RunConfig, directory: RunDirectory, store: Store, start: Weights | None = None
) -> dict:
    """Trains the entropy model; does nothing where one was imported."""
    stage = directory.stage(config, "entropy_model")
    if has_weights(stage.weights):
        return {}
    parameters = count_parameters(stage)
    shards = corpus.select(config, store, corpus.needed_bytes(config, stage.training))
    layout = Layout(stage.training.row_bytes)
    data = corpus.training_data(config, store, shards, layout, entropies=False)
    reported = watch(config, directory, store, stage, layout)
    first = first_params(config, directory, stage, start)
    trained = train_stage(stage, identified(data, store), reported, first_params=first)
    return dict(parameters=parameters, compilations={stage.name: trained.compilations})


def describe_patches(config: RunConfig, patched: Patched) -> dict:
    """Returns the part of the result that is about patches."""
    result = dict(mean_patch_bytes=patched.mean_patch_bytes)
    if needs_entropies(config.patching):
        result |= dict(
            threshold=patched.patching.threshold,
            compilations=dict(entropies=patched.compilations),
        )
    return result


def train_blt(
    config: RunConfig,
    directory: RunDirectory,
    store: Store,
    patched: Patched,
    start: Weights | None = None,
) -> dict:
    """Trains the byte latent transformer."""
    stage = directory.stage(config, "blt")
    parameters = count_parameters(stage)
    layout = blt_layout(config, patched, store.chat)
    directory.write_rows(dict(row_bytes=layout.row_bytes, row_patches=layout.row_patches))
    stored = needs_entropies(config.patching) and not config.patching.in_step
    data = corpus.training_data(config, store, patched.train, layout, entropies=stored)
    teacher = None
    if config.blt_training.teacher.source:
        teacher, tokenizer, known = open_teacher(config, patched.train, layout.row_bytes, start)
        data = data._replace(layout=layout._replace(teacher=tokenizer))
    filled = measure_rows(data)
    in_step = in_step_patching(config, directory, patched, layout)
    reported = watch(config, directory, store, stage, layout, patched, in_step)
    data = identified(data, store, row_bytes=layout.row_bytes, row_patches=layout.row_patches)
    if needs_entropies(config.patching):
        data.identity["threshold"] = patched.patching.threshold
    if teacher:
        data.identity["teacher"] = known
    first = first_params(config, directory, stage, start)
    trained = train_stage(stage, data, reported, in_step, first, teacher)
    return filled | dict(
        parameters=parameters,
        compilations={stage.name: trained.compilations},
        data_wait_fraction=trained.data_wait_fraction,
    )


def train_token_model(config: RunConfig, directory: RunDirectory, store: Store) -> dict:
    """Trains the tokenizer, and the transformer of its ids in the same loop as the others."""
    stage = directory.stage(config, "token_model")
    parameters = count_parameters(stage)
    tokenizer = token_corpus.ensure_tokenizer(config, directory, store)
    layout = Layout(stage.training.row_bytes, tokenizer=tokenizer)
    data, mean = token_corpus.training_data(config, store, tokenizer, layout)
    print(f"tokens: {len(tokenizer)} ids, {mean:.2f} bytes on average", flush=True)
    reported = watch(config, directory, store, stage, layout)
    reported = reported._replace(
        flops_per_byte=reported.flops_per_byte / mean,
        metadata=reported.metadata | dict(tokenizer=tokenizer.digest),
    )
    trained = train_stage(stage, identified(data, store, tokenizer=tokenizer.digest), reported)
    return dict(
        parameters=parameters,
        compilations={stage.name: trained.compilations},
        data_wait_fraction=trained.data_wait_fraction,
    )


def identified(data: TrainingData, store: Store, **others) -> TrainingData:
    """Returns training data with what tells it apart, beside `others` the corpus."""
    return data._replace(identity=dict(corpus=store.digest()) | others)


def train_stage(
    stage: Stage,
    data: TrainingData,
    reporting: Reporting,
    in_step: InStep | None = None,
    first_params: Callable[[], dict] | None = None,
    teacher: Teacher | None = None,
):
    """Trains the model of a stage in its directory; returns a TrainResult.

    Raises UnwritableError where the working directory is not there any more.
    """
    with writing(stage.directory):
        if not is_remote(stage.directory):
            stage.directory.mkdir(exist_ok=True)
    named = stage.name, stage.model, stage.training
    return train(*named, data, stage.directory, in_step, reporting, first_params, teacher)


def count_parameters(stage: Stage) -> dict:
    """Prints the parameters of a stage's model; returns their numbers by its name."""
    counts = parameter_report(stage.model, functional.abstract_params(stage.model))
    print(f"{stage.name}: {format_report(counts)}", flush=True)
    settings = stage.training.optimizer
    state = abstract_state(stage.model, make_optimizer(settings, stage.training.steps))
    learn, total = (
        sum(x.size for x in jax.tree.leaves(params))
        for params in (learning(settings, state.params), state.params)
    )
    if learn < total:
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state)) / 1e6
        print(
            f"{stage.name}: {learn:,} of {total:,} parameters learn, the optimizer holds "
            f"{held:.1f} MB",
            flush=True,
        )
        counts["learning"] = learn
    return {stage.name: counts}


def watch(
    config: RunConfig,
    directory: RunDirectory,
    store: Store,
    stage: Stage,
    layout: Layout,
    patched: Patched | None = None,
    in_step: InStep | None = None,
) -> Reporting:
    """Returns what a stage reports: useful FLOPs, traces, its settings, and held-out rows."""
    mean_patch_bytes = patched.mean_patch_bytes if patched else 1.0
    row_bytes = layout.row_bytes
    row_patches = layout.row_patches or row_bytes / mean_patch_bytes
    blocks = blocks_per_byte(stage.model, stage.training, row_bytes, row_patches)
    forward = flops_per_byte(stage.model, row_bytes, mean_patch_bytes, blocks)["total"]
    kernels = attention_report(stage.model)
    print(f"{stage.name}: {kernels}", flush=True)
    about = dict(
        config=to_dict(config), mesh=dict(jax.sharding.get_mesh().shape), attention=kernels
    )
    peak = peak_flops(stage.model.compute_dtype)
    measure = None
    if stage.training.validate_every:
        held = held_out(config, directory, store, patched, stage, in_step)
        measure = validation(config, store, held)
    return Reporting(TRAINING_FACTOR * forward, peak, config.profile, about, measure)


def measure_rows(data: TrainingData) -> dict:
    """Prints and returns how full rows are, on the first of them."""
    lane = Lane(data.documents, data.layout, 0, 1)
    found = utilisation(itertools.islice(lane, MEASURED_ROWS))
    shares = ", ".join(
        f"{share:.1%} of {kind.split('_')[0]} {'positions' if kind.startswith('byte') else 'slots'}"
        for kind, share in found.items()
    )
    layout = data.layout
    patches = f" and {layout.row_patches} patches" if layout.row_patches else ""
    print(f"rows: {layout.row_bytes} bytes{patches}; {shares} are real", flush=True)
    return found

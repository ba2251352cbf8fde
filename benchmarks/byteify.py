"""What a source's layers and a teacher are worth: `python -m benchmarks.byteify --source=PATH ...`.

Trains a byte model around the layers of SOURCE, a model of the Llama family, on CORPUS, and tells
held-out bits per byte against the bytes that were read, for some of the arms

    teacher     byteified, words learned first, the layers frozen, with a teacher (which feeds the
                decoder in a share of `--feed` of the steps, the first ones)
    words       byteified, words learned first, the layers frozen, without a teacher
    frozen      byteified, the layers frozen, without a teacher
    all         byteified, all learns, the layers at half the rate, without a teacher
    random      the same shape from random numbers, all learns

Patches end with words. With `-tokens` behind its name (`teacher-tokens`) an arm has the source's
tokens for patches: an oracle, which no model that generates can be, since the bytes to come decide
where a token ends. They are also shorter, and tell something of the next byte.

The arms stand beside what the source itself makes of the same held-out rows, which are cut where
patches end: the likelihoods of its tokens, over their bytes, of tokens that follow another one in
their row. Beside the oracle it is also told where its tokens end (benchmarks/told_ends.py). An
interrupted run goes on. DIR gets README.md, curves.csv and curves.png.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import token_patches
from benchmarks.studies import pages
from benchmarks.told_ends import ToldEnds
from bltjax import cli, sharding
from bltjax.checkpoints import formats, placing
from bltjax.checkpoints.pytorch import llama
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import RunConfig, from_config_dict, to_config_dict
from bltjax.config.reading import config_of_file
from bltjax.data.batches.lanes import Layout
from bltjax.data.batches.loader import as_batch, whole_batches
from bltjax.data.teacher_tokens import TeacherTokenizer
from bltjax.model import functional
from bltjax.ops.norm import rms_norm
from bltjax.patching.boundaries import needs_entropies
from bltjax.recipe import corpus
from bltjax.recipe.byteify import byteify
from bltjax.recipe.checks import check_run
from bltjax.recipe.entropies import blt_layout, find_patches
from bltjax.recipe.held_out import HeldOut
from bltjax.recipe.stages import run
from bltjax.recipe.teacher import open_teacher, tokenizer_of
from bltjax.training.metrics import HELD_OUT
from bltjax.training.teacher import read_tokens, token_log_likelihoods

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "byteify_smollm2.py"
ARMS = {
    "teacher": "byteified, words first, frozen, with a teacher",
    "words": "byteified, words first, frozen",
    "frozen": "byteified, frozen",
    "all": "byteified, all learns",
    "random": "random numbers, all learns",
}
TOKENS = "-tokens"  # of arms, and of what they start from and read: patches are tokens
ARMS |= {arm + TOKENS: f"{model}, tokens as patches" for arm, model in ARMS.items()}
SOURCES = {"": "the source", TOKENS: "the source, on rows of tokens"}
TOLD = "the source, told where its tokens end"
MADE = {"teacher": "taught", "words": "taught"}  # directories that arms start from; or BYTEIFIED
BYTEIFIED = "byteified"
SHARD_BYTES = 50_000  # a short run reads few shards, and should read of every file
SETTINGS = (
    *("source", "corpus", "steps", "rows", "row_bytes", "rate"),
    *("feed", "vocabulary_steps", "validation_rows"),
)

FLAGS = flags.FLAGS
flags.DEFINE_string("source", None, "A directory of Hugging Face's or a GGUF file.", required=True)
flags.DEFINE_string("corpus", None, "A file, a directory or a glob.", required=True)
flags.DEFINE_string("workdir", None, "Where runs and results are kept.", required=True)
flags.DEFINE_list("arms", "teacher,frozen,random", f"Of {', '.join(ARMS)}.")
flags.DEFINE_integer("steps", 600, "Of an arm.", 1)
flags.DEFINE_integer("rows", 2, "Of a batch.", 1)
flags.DEFINE_integer("row_bytes", 512, "Of a row.", 8)
flags.DEFINE_float("rate", 1e-3, "Peak learning rate.")
flags.DEFINE_float("feed", 0.5, "Share of the steps with the teacher's states.", 0, 1)
flags.DEFINE_integer("vocabulary_steps", 300, "In which words are learned first.", 1)
flags.DEFINE_integer("measurements", 10, "Of held-out rows, of an arm.", 1)
flags.DEFINE_integer("validation_rows", 32, "Held-out rows.", 1)


def main(argv):
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}: give flags alone")
    try:
        measure(FLAGS)
    except (ValueError, OSError) as error:
        cli.fail(error)


def measure(chosen):
    """Trains the arms, measures the source, and writes the page."""
    workdir, arms = Path(chosen.workdir), chosen.arms
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"--arms={','.join(unknown)}: give some of {', '.join(ARMS)}")
    workdir.mkdir(parents=True, exist_ok=True)
    for path in dict.fromkeys(start_of(arm, chosen) for arm in arms):
        if not path.exists():
            make(path, chosen)
    if any(map(patches_of, arms)):
        text = config_of("words", chosen).data
        token_patches.record(records_of_tokens(chosen), text, tokenizer_of_source(chosen))
    rows = [point for arm in arms for point in curve(arm, chosen)]
    firsts = {patches_of(arm): arm for arm in reversed(arms)}
    levels = {}
    with jax.set_mesh(sharding.make_mesh()):
        for patches in sorted(firsts):
            levels |= of_source(firsts[patches], chosen)
    write_page(workdir, rows, levels, {name: chosen[name].value for name in SETTINGS})
    last = {arm: [r for r in rows if r["arm"] == arm][-1] for arm in arms}
    print(json.dumps(dict(source=levels, last=last)))


def patches_of(arm: str) -> str:
    """Returns TOKENS where an arm's patches are tokens, "" where they are words."""
    return TOKENS if arm.endswith(TOKENS) else ""


def tokenizer_of_source(chosen) -> TeacherTokenizer:
    """Returns the tokenizer of the source."""
    path = llama.local_path(chosen.source)
    with jax.set_mesh(sharding.make_mesh()):
        model = llama.read(path, values=False)
    return tokenizer_of(path, f"--source={path}", "blt_training.teacher.tokenizer", model)


def make(path: Path, chosen):
    """Makes a byte model that arms start from."""
    tokens = bool(patches_of(path.name))
    steps = 0 if path.name.removesuffix(TOKENS) == BYTEIFIED else chosen.vocabulary_steps
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=path.parent) as scratch:
        target = Path(scratch) / path.name if tokens else path
        made = byteify(
            chosen.source, target, vocabulary_steps=steps, space_first=tokens, progress=True
        )
        if tokens:
            with jax.set_mesh(sharding.make_mesh()):
                token_patches.write_copy(target, path)
    print(f"{path}: {made['seconds']} s, distance of words {made['word_distance']}")


def start_of(arm: str, chosen) -> Path:
    """Returns the byte model that an arm has the weights of, or at least the shape."""
    made = MADE.get(arm.removesuffix(TOKENS), BYTEIFIED)
    return Path(chosen.workdir).absolute() / (made + patches_of(arm))


def records_of_tokens(chosen) -> Path:
    """Returns the directory of the records in which tokens end."""
    return Path(chosen.workdir).absolute() / ("records" + TOKENS)


def config_of(arm: str, chosen) -> RunConfig:
    """Returns the settings of an arm."""
    given = config_of_file(f"{CONFIG}:align")
    made = start_of(arm, chosen)
    given.stages = ("entropies", "blt")
    given.data.root, given.start_from = chosen.corpus, str(made)
    given.data.shard_bytes = SHARD_BYTES
    if patches_of(arm):
        given.data.root, given.data.records = "", str(records_of_tokens(chosen))
    given.evaluation.validation_rows = chosen.validation_rows
    given.evaluation.batch_size = chosen.rows
    training, optimizer = given.blt_training, given.blt_training.optimizer
    training.steps, training.batch_size = chosen.steps, chosen.rows
    training.row_bytes = chosen.row_bytes
    training.checkpoint_every = training.validate_every = max(
        1, chosen.steps // chosen.measurements
    )
    training.log_every = training.validate_every
    optimizer.learning_rate, optimizer.warmup_steps = chosen.rate, chosen.steps // 20
    training.teacher.source, training.teacher.feed = os.path.abspath(chosen.source), chosen.feed
    kind = arm.removesuffix(TOKENS)
    if kind != "teacher":
        training.teacher.source, training.teacher.feed = "", 0.0
    optimizer.global_rate = dict(all=0.5, random=1.0).get(kind, 0.0)
    if kind == "random":
        with jax.set_mesh(sharding.make_mesh()):
            weights = formats.read(made, values=False)
        given.start_from = ""
        given.blt = to_config_dict(weights.blt)
        given.patching = to_config_dict(weights.patching)
    return from_config_dict(RunConfig, given)


def curve(arm: str, chosen) -> list[dict]:
    """Trains an arm as far as it is not; returns its held-out bits per byte by bytes read."""
    directory, config = Path(chosen.workdir) / arm, config_of(arm, chosen)
    if not (directory / "result.json").exists():
        run(check_run(config, directory))
    lines = map(json.loads, RunDirectory(directory).metrics("blt").open())
    return [
        dict(
            arm=arm,
            step=line["step"] + 1,
            bytes_read=sum(v for k, v in line.items() if k.startswith("bytes_seen/")),
            held_out=line[HELD_OUT],
            seconds_per_step=line["seconds_per_step"],
        )
        for line in lines
        if HELD_OUT in line
    ]


def of_source(arm: str, chosen) -> dict[str, float]:
    """Returns the bits per byte of the source on the rows that an arm is measured on, by its name.

    Where patches are tokens it is also told where they end. Needs a mesh to be set.
    """
    config = config_of("teacher" + patches_of(arm), chosen)
    config = dataclasses.replace(config, start_from=str(start_of(arm, chosen)))
    directory = RunDirectory((Path(chosen.workdir) / arm).absolute())
    start = formats.read(config.start_from)
    blt = start.blt
    config = dataclasses.replace(config, blt=blt, patching=start.patching)
    store = corpus.open_corpus(config, directory)
    patched = find_patches(config, directory, store)
    layout: Layout = blt_layout(config, patched, store.chat)
    shards = patched.validation
    teacher, tokenizer, _ = open_teacher(config, patched.train, layout.row_bytes, None)
    stored = needs_entropies(config.patching)
    held = HeldOut(layout._replace(teacher=tokenizer), shards, None, [], stored)
    params = placing.put_lazy(
        formats.cast(start, "float32").params["blt"], functional.abstract_params(blt)
    )
    eps, columns = blt.global_transformer.norm_eps, layout.row_bytes // 2

    @jax.jit
    def read(params, arrays, batch):
        tokens, _, hidden = read_tokens(blt, columns, params, arrays, batch)
        logs = token_log_likelihoods(arrays, eps, hidden, tokens.ids)
        return tokens, logs, rms_norm(hidden, arrays["norm"], eps).astype(jnp.float32)

    told = ToldEnds(tokenizer.pieces) if patches_of(arm) else None
    output = np.asarray(teacher.arrays.get("output", teacher.arrays["embeddings"]))
    total = np.zeros(3)  # nats of tokens, nats of bytes where their ends are told, bytes
    sample = held.sample(store, chosen.validation_rows)
    for rows in whole_batches(iter(sample), chosen.rows):
        found = read(params, teacher.arrays, sharding.put_batch(as_batch(rows)))
        tokens, logs, states = jax.tree.map(np.asarray, found)
        counted = rows.loss_mask.any(axis=1, keepdims=True)  # not what fills up the last batch
        row, column = np.nonzero(tokens.follows & counted)
        lengths = (tokens.ends - tokens.begins + 1)[row, column]
        total += -logs[row, column].sum(), 0, lengths.sum()
        if told:
            logits = states[row, column - 1] @ output.T
            total[1] += told.nats(logits, tokens.ids[row, column]).sum()
    of_tokens, of_bytes, _ = (total / total[2] / np.log(2)).tolist()
    return {SOURCES[patches_of(arm)]: of_tokens} | ({TOLD: of_bytes} if told else {})


def write_page(workdir: Path, rows: list[dict], levels: dict[str, float], settings: dict):
    """Writes curves.csv, curves.png and README.md."""
    pages.write_csv(workdir / "curves.csv", rows)
    last = {row["arm"]: row for row in rows}
    series = {
        arm: [(row["bytes_read"] / 1e6, row["held_out"], 0) for row in rows if row["arm"] == arm]
        for arm in last
    }
    most = max(row["bytes_read"] for row in rows) / 1e6
    series |= {name: [(0, level, 0), (most, level, 0)] for name, level in levels.items()}
    axes = "MB read", "held-out bits per byte"
    pages.curves(workdir / "curves.png", series, *axes, log_x=False)
    table = pages.table(
        [
            *(row | dict(model=ARMS[arm]) for arm, row in last.items()),
            *(dict(model=name, held_out=level) for name, level in levels.items()),
        ],
        dict(model="", bytes_read=",.0f", held_out=".3f", seconds_per_step=".2f"),
    )
    told = ", ".join(f"`{name}={value}`" for name, value in settings.items())
    parts = __doc__.split("\n\n", 1)[1].strip(), table, "![](curves.png)", f"Settings: {told}."
    pages.write_page(workdir / "README.md", f"Byte-ifying {Path(settings['source']).name}", *parts)
    print(table)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)

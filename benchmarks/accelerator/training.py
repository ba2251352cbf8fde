"""The training step of a model by attention backend: speed, memory, losses, where its time goes."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from accelerator.attention import draw_segments
from accelerator.notes import Notes
from accelerator.timing import device_bytes, traced
from measuring import OPTIMIZER, PATCH_BYTES, ROOT, SIZES, draw_batch, median

from bltjax import sharding
from bltjax.config import TrainingConfig, read_config
from bltjax.costs.chips import GIB, find_chip
from bltjax.costs.flops import TRAINING_FACTOR, flops_per_byte
from bltjax.model.transformer import attention_report
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import abstract_state, create_state
from bltjax.training.step import make_train_step

STEPS = 6  # of which the first is not timed
DOCUMENTS = 4  # of a row
PROFILED = 20  # seconds that a profiled step and reading its trace may take


class Variant(NamedTuple):
    """A model with a batch that one device may hold."""

    tables: str  # which hash tables
    model: Any
    rows: int
    length: int
    hash_updates: str = "dense"


def variants(name: str, tiny: bool) -> list[Variant]:
    """Returns what to try for a model, until one fits in memory."""
    if name == "entropy_100m":
        model = read_config(str(ROOT / "configs/entropy_100m.py")).entropy_model
        return [Variant("none", model, 32, 8192)]
    if name == "blt_1b" and not tiny:
        model = read_config(str(ROOT / "configs/blt_1b.py")).blt
        smaller = dataclasses.replace(model, hash=dataclasses.replace(model.hash, vocab=100_000))
        released = Variant("as released, touched rows", model, 8, 8192, "touched")
        return [released, Variant("of 100,000 rows", smaller, 8, 8192)]
    if name not in ("blt_1b", "large"):
        raise ValueError(f"no model {name!r}: choose blt_1b, large or entropy_100m")
    size = ("tiny" if tiny else "large"), *((2, 64) if tiny else (8, 8192))
    model = dataclasses.replace(SIZES[size[0]], compute_dtype="bfloat16", remat="dots")
    found = [Variant("of 100 rows" if tiny else "of 10,000 rows", model, *size[1:])]
    if tiny and name == "blt_1b":  # as the real one
        found.insert(0, found[0]._replace(tables="touched rows", hash_updates="touched"))
    return found


def measure(notes: Notes, name: str, backend: str = "auto", remat: str | None = None):
    """Notes the step of the first variant that runs, and why those before it did not."""
    for variant in variants(name, notes.tiny):
        model = dataclasses.replace(variant.model, attention=backend)
        model = dataclasses.replace(model, remat=remat or model.remat)
        about = dict(model=name, backend=backend, remat=model.remat, tables=variant.tables)
        about |= dict(rows=variant.rows, row_bytes=variant.length)
        try:
            about["attention"] = attention_report(model)
        except ValueError as error:
            notes.impossible(error, **about)
            return
        try:
            _step(notes, variant._replace(model=model), about)
            return
        except Exception as error:
            notes.failed(error, **about)
            if not is_want_of_memory(error):
                return


def is_want_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _step(notes: Notes, variant: Variant, about: dict):
    model, rows, length = variant.model, variant.rows, variant.length
    batch = _batch(model, rows, length)
    patch_bytes = (length + 1) / batch["patch_lengths"].shape[1] if "patch_lengths" in batch else 1
    settings = dataclasses.replace(OPTIMIZER, hash_updates=variant.hash_updates)
    training = TrainingConfig(batch_size=rows, row_bytes=length, optimizer=settings)
    optimizer = make_optimizer(training.optimizer, training.steps)
    step, batch = make_train_step(model, training, optimizer), sharding.put_batch(batch)
    started = time.perf_counter()
    state = sharding.concrete(abstract_state(model, optimizer))
    compiled = step.lower(state, batch).compile()
    found = dict(compile_s=time.perf_counter() - started) | _memory(compiled)
    if found["limit_gib"] and found["needed_gib"] > found["limit_gib"]:
        raise MemoryError(
            f"needs {found['needed_gib']:.1f} GiB as compiled, and {found['limit_gib']:.1f} GiB "
            "may be had"
        )
    state, losses, seconds = create_state(model, optimizer, 0), [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
        losses.append(float(metrics["loss"]))
    a_step = median(seconds[1:])
    peak, chip = device_bytes(), find_chip(jax.devices()[0].device_kind)
    forward = flops_per_byte(model, length, patch_bytes)["total"]
    flops = TRAINING_FACTOR * forward * rows * length
    notes.write(
        "train",
        **about,
        **found,
        step_s=a_step,
        seconds=seconds,
        losses=losses,
        bytes_per_s=rows * length / a_step,
        model_tflops=flops / a_step / 1e12,
        mfu=flops / a_step / chip.flops if chip else None,
        peak_gib=peak and peak / GIB,
    )
    if notes.left < PROFILED and not notes.tiny:
        notes.late("no time for the profile", **about)
        return
    with traced() as profile:
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
    notes.write("profile", **about, **profile[0])


def _batch(model, rows: int, length: int) -> dict:
    batch = draw_batch(rows, length, PATCH_BYTES)
    batch["document_ids"] = np.asarray(draw_segments(rows, length, DOCUMENTS))
    if not hasattr(model, "global_transformer"):
        del batch["patch_lengths"]
    return batch


def _memory(compiled) -> dict:
    """Returns GiB that a program needs, as the compiler says, and those that may be had."""
    memory, limit = compiled.memory_analysis(), device_bytes("bytes_limit")
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
    needed = arguments - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return dict(
        temporary_gib=memory.temp_size_in_bytes / GIB,
        needed_gib=needed / GIB,
        limit_gib=limit and limit / GIB,
    )

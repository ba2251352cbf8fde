"""Lessons for a byte-ified model from the tokenized one whose layers are its global transformer.

The teacher reads the tokens of the rows: their embeddings go through the global transformer, which
is frozen, and its states tell the likelihood of each next token (Bolmo, 2025, stage 1; here a patch
starts where earlier bytes say so). Of it a step learns

    align     that patches are as the embeddings of the tokens with the same bytes
    distill   that the bytes of a token are together as likely as the token

beside the cross-entropy of the next byte. docs/finetuning.md#two-stages.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax import sharding
from bltjax.config import BLTConfig
from bltjax.config.teacher import TeacherConfig
from bltjax.model import functional
from bltjax.model.blt import patch_documents
from bltjax.ops.cross_entropy import next_byte_nats
from bltjax.ops.norm import rms_norm
from bltjax.patching.buffers import PatchBuffers
from bltjax.patching.teacher_tokens import (
    TeacherTokens,
    latest_tokens,
    same_bytes,
    sums_by_column,
    take,
    tokens_of_rows,
)

Array = jax.Array
AT_ONCE = 512  # tokens of a row whose logits are computed together
LEAST = 1e-6  # by which a likelihood is below 1, in nats over the temperature


class Teacher(NamedTuple):
    """A tokenized model, without its layers, on the mesh.

    arrays: `embeddings` [T, G], `norm` [G], `mean_square`, of all embeddings, and `output` [T, G]
    unless the embeddings are it. A step adds `fed`: whether the decoder reads its states.
    row_tokens: columns for the tokens of a row.
    """

    arrays: dict
    row_tokens: int


def taught_logits(
    model: BLTConfig,
    config: TeacherConfig,
    row_tokens: int,
    params: dict,
    arrays: dict,
    batch: dict,
    patches: PatchBuffers,
    **known,
) -> tuple[Array, dict]:
    """Returns logits float32 [B, L, V] of the next bytes, and sums over the batch, float32.

    The sums are `align` over the `aligned` patches, `distill`, `teacher_nats` and `teacher_bytes`
    over the `taught` tokens, and `untaught`, the tokens without a column. known: of `encode`.
    """
    tokens, documents = batch["tokens"], batch["document_ids"]
    teacher, embedded, hidden = read_tokens(model, row_tokens, params, arrays, batch)
    documents_of_patches = patch_documents(tokens, documents, patches.starts)
    column, found = latest_tokens(teacher, patches, documents_of_patches)
    byte_states, inputs = functional.encode(model, params, tokens, patches, documents, **known)

    def fed(_):
        return jnp.where(found[..., None], take(hidden, column), 0)

    def own(inputs):
        return functional.global_states(model, params, inputs, documents_of_patches)

    states = _either(config.feed, arrays.get("fed"), fed, own, inputs)
    logits = functional.decode(model, params, byte_states, states, patches, documents)
    aligned = same_bytes(teacher, patches, tokens, column, found)
    distances = alignment(inputs, take(embedded, column), arrays["mean_square"])
    sums = dict(
        align=jnp.sum(jnp.where(aligned, distances, 0)),
        aligned=jnp.sum(aligned, dtype=jnp.float32),
        untaught=jnp.sum(teacher.overflow, dtype=jnp.float32),
    )
    eps = model.global_transformer.norm_eps
    of_teacher = token_log_likelihoods(arrays, eps, hidden, teacher.ids)
    return logits, sums | _distilled(config, teacher, logits, of_teacher, batch)


def _either(share: float, is_fed: Array | None, fed, own, inputs: Array) -> Array:
    """Returns what one of two functions makes of inputs; only a share between 0 and 1 asks."""
    if share in (0.0, 1.0):
        return fed(inputs) if share else own(inputs)
    return jax.lax.cond(is_fed, fed, own, inputs)


def read_tokens(
    model: BLTConfig, row_tokens: int, params: dict, arrays: dict, batch: dict
) -> tuple[TeacherTokens, Array, Array]:
    """Returns the tokens of rows, their embeddings and the teacher's last states [B, N, G]."""
    rows = batch["teacher_tokens"], batch["tokens"], batch["document_ids"]
    teacher = tokens_of_rows(*rows, row_tokens)
    embedded = sharding.lookup(arrays["embeddings"], teacher.ids)
    inputs = embedded.astype(model.compute_dtype)
    hidden = functional.global_states(model, params, inputs, teacher.documents)
    return teacher, embedded, jax.lax.stop_gradient(hidden)


def weighted(config: TeacherConfig, sums: dict) -> Array:
    """Returns what the teacher adds to the sum of nats."""
    return config.align * sums["align"] + config.distill * sums["distill"]


def means(sums: dict) -> dict:
    """Returns metrics of the sums of `taught_logits`: means over patches, tokens and bytes."""
    tokens = jnp.maximum(sums["taught"], 1)
    nats_of_bytes = sums["teacher_nats"] / jnp.maximum(sums["teacher_bytes"], 1)
    return dict(
        align=sums["align"] / jnp.maximum(sums["aligned"], 1),
        aligned_share=sums["aligned"] / jnp.maximum(sums["patches"], 1),
        distill=sums["distill"] / tokens,
        teacher_bits_per_byte=nats_of_bytes / jnp.log(2.0),
        untaught_tokens=sums["untaught"],
    )


def alignment(inputs: Array, embedded: Array, mean_square: Array) -> Array:
    """Returns the mean square distance of patches and embeddings [B, P, G] -> float32 [B, P].

    It is relative to the mean square of all embeddings.
    """
    apart = inputs.astype(jnp.float32) - embedded
    return jnp.mean(jnp.square(apart), axis=-1) / mean_square


def token_log_likelihoods(arrays: dict, eps: float, hidden: Array, ids: Array) -> Array:
    """Returns the log-likelihood of each token after those before it, nats, float32 [B, N].

    hidden: [B, N, G], the last layer's states. The first token of a row has 0.
    """
    output = arrays.get("output", arrays["embeddings"])
    states = rms_norm(hidden, arrays["norm"], eps)[:, :-1]
    following = ids[:, 1:]
    parts = [jnp.zeros(ids.shape, jnp.float32)[:, :1]]
    for start in range(0, following.shape[1], AT_ONCE):
        part = slice(start, start + AT_ONCE)
        h, matrix = states[:, part], output.astype(hidden.dtype)
        logits = jnp.einsum("bng,tg->bnt", h, matrix, preferred_element_type=jnp.float32)
        rows = sharding.lookup(matrix, following[:, part])
        chosen = jnp.einsum("bng,bng->bn", h, rows, preferred_element_type=jnp.float32)
        parts.append(chosen - jax.nn.logsumexp(logits, axis=-1))
    return jnp.concatenate(sharding.shard_rows(parts), axis=1)


def _distilled(
    config: TeacherConfig, teacher: TeacherTokens, logits: Array, of_teacher: Array, batch: dict
) -> dict:
    """Returns the sums over tokens that teach.

    They follow another one in their row, which the teacher knows them by, and all of their bytes
    are to be learned.
    """
    num_columns = teacher.ids.shape[1]
    nats = next_byte_nats(logits, batch["targets"])

    def by_token(x):  # x of each position is about the byte after it
        of_bytes = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        return sums_by_column(of_bytes, teacher.of_bytes, num_columns)

    learned = by_token(batch["loss_mask"].astype(jnp.float32))
    lengths = (teacher.ends - teacher.begins + 1).astype(jnp.float32)
    taught = teacher.follows & (learned == lengths)
    losses = distillation(-by_token(nats), of_teacher, config.temperature)

    def total(x):
        return jnp.sum(jnp.where(taught, x, 0), dtype=jnp.float32)

    return dict(
        distill=total(losses),
        taught=total(1.0),
        teacher_nats=-total(of_teacher),
        teacher_bytes=total(lengths),
    )


def distillation(log_student: Array, log_teacher: Array, temperature: float) -> Array:
    """Returns the binary cross-entropy of likelihoods to the power of 1 / temperature.

        -(y log s + (1 - y) log(1 - s)),   y = teacher ** (1 / temperature), s of the student

    The arguments are logarithms, at most 0.
    """
    s = jnp.minimum(log_student / temperature, -LEAST)
    t = jnp.minimum(log_teacher / temperature, 0.0)
    return -(jnp.exp(t) * s - jnp.expm1(t) * log_of_rest(s))


def log_of_rest(x: Array) -> Array:
    """Returns log(1 - exp(x)) of x < 0, without loss of digits where x is near 0 or far from it."""
    near = x > -0.6931472
    # Each form is computed at a number that is harmless to it, so that no gradient is NaN.
    of_near = jnp.log(-jnp.expm1(jnp.where(near, x, -0.5)))
    return jnp.where(near, of_near, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))

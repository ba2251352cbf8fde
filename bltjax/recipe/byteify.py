"""Makes a byte latent transformer around the layers of a tokenized model (docs/finetuning.md).

Its global transformer is the source's layers, bit for bit. Local encoder, local decoder,
cross-attention and hash tables are random numbers, and learn in a run with `start_from`.

The first layer of the source has always read token embeddings, and its patches should be as large.
So the fresh encoder runs once on random bytes with patches of four, and what makes patches of its
states is scaled: their root mean square becomes that of all token embeddings. That is the matrix
into the global transformer, or where widths are equal and there is none, what the encoder makes of
patches: the first queries and the output of cross-attention.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax import sharding
from bltjax.checkpoints import formats
from bltjax.checkpoints.demo import directory_of
from bltjax.checkpoints.lazy_arrays import read_all, tree_leaves
from bltjax.checkpoints.pytorch import llama
from bltjax.checkpoints.pytorch.convert import target_error, write_new
from bltjax.checkpoints.weights import Weights, WeightsError, flat
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    HashConfig,
    PatchingConfig,
    TransformerConfig,
)
from bltjax.model import functional
from bltjax.patching.boundaries import needs_entropies
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.recipe.teacher import tokenizer_of
from bltjax.recipe.vocabulary_lesson import Words, learn_words, words_of
from bltjax.runtime.paths import absolute
from bltjax.runtime.progress import progress_bar
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET

HEAD_WIDTH = 64  # of local heads, and what local widths are rounded to
SAMPLE_ROWS, SAMPLE_PATCHES, PATCH_BYTES = 8, 64, 4  # of random bytes
CLOSE = 0.005  # share by which a measured root mean square may differ


class LocalSizes(NamedTuple):
    """Sizes of what is around the source's layers; None: they follow from its width."""

    dim: int | None = None  # a third of the source's width, rounded to a multiple of 64
    heads: int | None = None  # one for 64 features
    encoder_layers: int = 1
    decoder_layers: int | None = None  # 4, or 6 from a width of 2,048 on
    window: int = 512
    k: int | None = None  # vectors of a patch: as many as fill the source's width
    hash_sizes: tuple[int, ...] = HashConfig().sizes
    hash_vocab: int = 50_000


def byteify(
    source: str | Path,
    target: str | Path,
    *,
    sizes: LocalSizes = LocalSizes(),
    vocabulary_steps: int = 0,
    space_first: bool = False,
    tokenizer: str | Path | None = None,
    entropy_model: str | Path | None = None,
    drop_rope_scaling: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Writes a byte latent transformer around the layers in `source` to a new directory `target`.

    source: a directory of Hugging Face's with a model of the Llama family, or a GGUF file.
    vocabulary_steps: in which the fresh encoder learns what the source has for its words; 0: none.
    space_first: the patches of these words begin with a space, in the place of one at their end.
    tokenizer: a directory or a tokenizer.json, of those words; default: the source's own.
    entropy_model: a directory whose entropy model, rule and threshold place the patches; without
    one they end with words. drop_rope_scaling: positions are not scaled as the source does. seed:
    of the fresh parameters.

    The whole source is checked first. Raises WeightsError, which lists all problems, ValueError or
    OSError; the target then does not exist. Returns a summary for JSON, with notes.
    """
    started = time.perf_counter()
    read_from, target = llama.local_path(source), absolute(target)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        model, size, config, other = _checked(
            read_from, target, sizes, entropy_model, drop_rope_scaling, progress
        )
        words = None
        if vocabulary_steps:
            words = _words(
                model, llama.local_path(tokenizer) if tokenizer else read_from, space_first
            )
        params, patch_size = _matched(config, _fresh(config, seed), size, seed)
        distance = None
        if words:
            params, distance = learn_words(
                _without_layers(config), params, *words, vocabulary_steps, seed, progress
            )
            patch_size = patch_root_mean_square(config, params, seed)
        params["global_transformer"]["layers"] = model.layers
        weights = _weights(config, params, other, model)
        write_new(formats.plan(weights, formats.BLTJAX), target, weights.num_bytes(), progress)
    leaves = flat(weights.params).values()
    return dict(
        source=str(source),
        target=str(target),
        format=formats.BLTJAX,
        models=list(weights.params),
        parameters=sum(math.prod(leaf.shape) for leaf in leaves),
        kept_parameters=sum(math.prod(leaf.shape) for _, leaf in tree_leaves(model.layers)),
        bytes=weights.num_bytes(),
        dtypes=sorted({np.dtype(leaf.dtype).name for leaf in leaves}),
        embedding_rms=size,
        patch_rms=patch_size,
        word_distance=distance,
        notes=list(dict.fromkeys((*weights.notes, *_left_behind(read_from, model)))),
        seconds=round(time.perf_counter() - started, 1),
    )


def _checked(source: Path, target: Path, sizes: LocalSizes, entropy_model, drop, progress):
    """Returns the source, the root mean square of its embeddings, the config of the result, and
    weights with an entropy model, or None.

    Raises one error for all problems with them and with the target; where the latter is wrong, no
    value of the layers is read.
    """
    wrong = target_error(target, [source])
    problems = [str(wrong)] if wrong else []
    model = size = config = other = None
    with progress_bar("checking", llama.stored_bytes(source), shown=progress) as bar:
        try:
            model = llama.read(source, drop, bar.update, values=wrong is None)
            config = config_around(model.settings.stack, sizes)
            problems += config.problems("blt")
            size = llama.root_mean_square(model.embeddings)
            if size == 0:
                problems.append("all token embeddings are 0: they tell how large patches should be")
        except WeightsError as error:
            problems += error.problems
    if entropy_model is not None:
        try:
            other = _entropy_model(directory_of(entropy_model))
        except WeightsError as error:
            problems += [f"{entropy_model}: {problem}" for problem in error.problems]
    if wrong and len(problems) == 1:
        raise wrong
    if problems:
        raise WeightsError(source, problems)
    return model, size, config, other


def _entropy_model(directory: Path) -> Weights:
    """Reads weights with an entropy model. Raises WeightsError where there is none."""
    found = formats.read(directory)
    if found.entropy_model is None:
        raise WeightsError(directory, ["it has no entropy model: give a directory that has one"])
    if not needs_entropies(found.patching):
        problem = f"its patches have the rule {found.patching.rule!r}, which needs no entropy model"
        raise WeightsError(directory, [f"{problem}: leave --entropy_model out"])
    return found


def _words(model: llama.TokenModel, path: Path, space_first: bool) -> tuple[Words, np.ndarray]:
    """Returns the words of the source, and its embeddings of them. Raises ValueError."""
    tokenizer = tokenizer_of(path, f"the tokenizer in {path}", "--tokenizer", model)
    words = words_of(tokenizer.pieces, space_first)
    return words, np.asarray(read_all(model.embeddings), np.float32)[words.ids]


def config_around(stack: TransformerConfig, sizes: LocalSizes) -> BLTConfig:
    """Returns the config of a byte latent transformer with a global transformer, by its width."""
    rounded = round(stack.dim / 3 / HEAD_WIDTH) * HEAD_WIDTH
    dim = sizes.dim or max(HEAD_WIDTH, rounded)
    heads = sizes.heads or max(1, dim // HEAD_WIDTH)
    local = TransformerConfig(
        dim=dim, num_layers=sizes.encoder_layers, num_heads=heads, window=sizes.window
    )
    decoder_layers = sizes.decoder_layers or (4 if stack.dim < 2048 else 6)
    return BLTConfig(
        local_encoder=local,
        global_transformer=stack,
        local_decoder=dataclasses.replace(local, num_layers=decoder_layers),
        cross_attention=CrossAttentionConfig(
            k=sizes.k or max(1, round(stack.dim / dim)), num_heads=heads
        ),
        hash=HashConfig(sizes=sizes.hash_sizes, vocab=sizes.hash_vocab),
    )


def _without_layers(config: BLTConfig) -> BLTConfig:
    """Returns a config of the same shapes, with next to nothing for the source's layers."""
    tiny = TransformerConfig(
        dim=config.global_transformer.dim, num_layers=1, num_heads=1, head_dim=2, ffn_width=1
    )
    return dataclasses.replace(config, global_transformer=tiny)


def _fresh(config: BLTConfig, seed: int) -> dict:
    """Draws all parameters but the source's layers, in whose place are others."""
    return functional.init(_without_layers(config), jax.random.key(seed))


def _matched(config: BLTConfig, params: dict, wanted: float, seed: int) -> tuple[dict, float]:
    """Returns parameters under which patch inputs have a root mean square, and what it is.

    The norms inside cross-attention add a constant to small squares, so that it takes some rounds.
    """
    for _ in range(10):
        found = patch_root_mean_square(config, params, seed)
        if abs(found / wanted - 1) < CLOSE:
            break
        params = _scaled(params, wanted / found)
    return jax.tree.map(np.asarray, params), patch_root_mean_square(config, params, seed)


def _scaled(params: dict, times: float) -> dict:
    """Returns parameters under which patch inputs are about so many times as large."""

    def scale(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return leaf * times if name in scaled else leaf

    scaled = {"global_transformer.token_embedding_projection.weight"}
    if "token_embedding_projection" not in params["global_transformer"]:
        scaled = {
            "local_encoder.patch_embedding_projection.weight",
            "local_encoder.cross_attn_layers.wo.weight",
        }
    return jax.tree_util.tree_map_with_path(scale, params)


def patch_root_mean_square(config: BLTConfig, params: dict, seed: int) -> float:
    """Measures what the first global layer reads, of random bytes in patches of four.

    params: as of a config whose global layers nobody reads, see `_without_layers`. The patch of BOS
    alone does not count.
    """
    num_bytes = SAMPLE_PATCHES * PATCH_BYTES
    rng = np.random.default_rng(seed)
    tokens = BYTE_OFFSET + rng.integers(0, 256, (SAMPLE_ROWS, num_bytes), np.int32)
    tokens[:, 0] = BOS_ID
    lengths = np.full((SAMPLE_ROWS, 1 + SAMPLE_PATCHES), PATCH_BYTES, np.int32)
    lengths[:, 0] = 1
    return float(_patch_size(_without_layers(config), params, tokens, lengths))


@functools.partial(jax.jit, static_argnums=0)
def _patch_size(config: BLTConfig, params: dict, tokens, lengths):
    patches = buffers_from_lengths(lengths, tokens.shape[1])
    states = functional.intermediates(config, params, tokens, patches)["patch_states"]
    read = functional.without_global_blocks(config, params, states)[:, 1:]
    return jnp.sqrt(jnp.mean(jnp.square(read.astype(jnp.float32))))


def _weights(config: BLTConfig, params: dict, other: Weights | None, model) -> Weights:
    """Returns the weights of the result, with those of an entropy model where there is one."""
    notes = (
        *model.settings.notes,
        "the source's last norm is left out: norms of cross-attention in the decoder are in its "
        "place",
        "the source's tokenizer, token embeddings and output layer are left out: bytes need none",
        "the layers are a copy of the source's, under its licence: keep that with the target",
    )
    patching = PatchingConfig(rule="space", target_patch_bytes=None)
    weights = Weights(config, None, patching, dict(blt=params), notes=notes)
    if other is None:
        return weights
    return weights.with_entropy_model(other)._replace(patching=other.patching)


def _left_behind(source: Path, model: llama.TokenModel) -> list[str]:
    """Returns a note on files of the source that are not read, such as a licence."""
    if not source.is_dir():
        return []
    there = {path for path in source.iterdir() if not path.name.startswith(".")}
    others = sorted(path.name for path in there - set(model.files))
    if not others:
        return []
    return [f"these files of the source are neither read nor copied: {', '.join(others)}"]

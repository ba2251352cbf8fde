"""The published models' numbers: shapes, hash ids, masks, every intermediate and the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.model import functional
from bltjax.ops.hashing import ngram_hash_ids
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.patching.entropy import next_byte_entropy
from tests import golden

CLOSE = dict(rtol=0, atol=1e-5)


@functools.cache
def computed(name):
    """Config, golden arrays, patch buffers and our intermediates for a golden model."""
    config, expected = golden.blt_config(name), golden.arrays(name)
    patches = buffers_from_lengths(
        jnp.asarray(expected["patch_lengths"]), expected["tokens"].shape[1]
    )
    result = jax.jit(functools.partial(functional.intermediates, config))(
        golden.params(name), expected["tokens"], patches
    )
    return config, expected, patches, result


@pytest.mark.parametrize("name", golden.MODELS)
def test_parameters_have_the_published_names_and_shapes(name):
    published = jax.tree.map(np.shape, golden.params(name))
    assert (
        jax.tree.map(lambda x: x.shape, functional.abstract_params(golden.blt_config(name)))
        == published
    )


@pytest.mark.parametrize("name", golden.MODELS)
def test_hash_ids(name):
    config, expected, _, _ = computed(name)
    sizes, num_functions = config.hash.sizes, config.hash.num_functions
    ids = ngram_hash_ids(jnp.asarray(expected["tokens"]), sizes, num_functions, config.hash.vocab)
    columns = [expected[f"hash_f{f}_n{n}"] for f in range(num_functions) for n in sizes]
    np.testing.assert_array_equal(ids, np.stack(columns, axis=-1))


@pytest.mark.parametrize("name", golden.MODELS[:3])
def test_patch_ids_and_cross_attention_masks(name):
    """The ids, with the windows, say who sees whom, as published (model.md#cross-attention)."""
    config, expected, patches, _ = computed(name)
    encoder, decoder = (np.asarray(x) for x in (patches.encoder_ids, patches.decoder_ids))
    np.testing.assert_array_equal(encoder, expected["patch_ids_enc"])
    np.testing.assert_array_equal(decoder, expected["patch_ids_dec"])
    cross = config.cross_attention
    slot = np.repeat(np.arange(expected["patch_lengths"].shape[1]), cross.k)
    behind = slot[None, :, None] - encoder[:, None, :]
    np.testing.assert_array_equal(
        (behind >= 0) & (behind < (cross.window_encoder or 1)), expected["cross_mask_enc"]
    )
    behind = decoder[:, :, None] - slot[None, None, :]
    np.testing.assert_array_equal(
        (behind >= 0) & (behind < (cross.window_decoder or 1)), expected["cross_mask_dec"]
    )


@pytest.mark.parametrize("name", golden.MODELS)
def test_every_intermediate(name):
    config, expected, _, result = computed(name)
    ours = dict(
        encoder_embeds=result["embedded"],
        h_encoder=result["byte_states"],
        global_out=result["global_states"],
        logits=result["logits"],
        **{f"dec_layer{i}_out": state for i, state in enumerate(result["decoder_states"])},
    )
    if config.cross_attention.encoder:
        ours["h_cross"] = np.asarray(result["patch_states"]).reshape(expected["h_cross"].shape)
    floats = {
        key for key, value in expected.items() if value.dtype == np.float32 and key != "entropies"
    }
    assert ours.keys() == floats
    assert result["logits"].dtype == jnp.float32
    for key, value in ours.items():
        np.testing.assert_allclose(value, expected[key], **CLOSE, err_msg=key)


def test_entropy_model():
    config, expected = golden.entropy_config(), golden.arrays("meta_entropy")
    params = golden.params("meta_entropy")
    assert jax.tree.map(lambda x: x.shape, functional.abstract_params(config)) == jax.tree.map(
        np.shape, params
    )
    logits = jax.jit(functools.partial(functional.apply, config))(params, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], **CLOSE)
    np.testing.assert_allclose(next_byte_entropy(logits), expected["entropies"], **CLOSE)

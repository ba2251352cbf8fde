"""Blocks of a step: which are drawn and masked, what is learned of them, and what is not."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.config import DiffusionConfig, OptimizerConfig, PatchingConfig, TrainingConfig
from bltjax.data.batches.loader import as_batch, whole_batches
from bltjax.data.batches.packing import OpenDocument, Packer, patch_ends
from bltjax.model import functional
from bltjax.ops.block_attention import tile_length
from bltjax.patching.boundaries import patch_starts
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.training import block_diffusion
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import start_state
from bltjax.training.step import make_train_step
from bltjax.vocabulary import MASK_ID, PAD_ID, encode
from tests.model.test_invariants import tiny

pytestmark = pytest.mark.long  # one interpreter will do

B, L, P, K = 4, 150, 60, 3
MODEL = dataclasses.replace(tiny(sizes=(3,), window=7), diffusion_block=K)
FAST = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")
WORDS = b"the patch, the byte and the patches read a byte; "


@functools.cache
def rows():
    """Packed rows of documents, of some of which a part is learned, as a batch on the host."""
    rng, documents = np.random.default_rng(0), []
    for n in range(14):
        ids = encode(WORDS[: rng.integers(2, 40)] * (1 + n % 3))
        ends = patch_ends(ids, patch_starts(PatchingConfig("space"), ids)[: len(ids)])
        learned = np.arange(len(ids)) % 16 < 9 if n % 3 == 0 else None
        documents.append(OpenDocument(ids, ends, learned=learned))
    packer, stream = Packer(L, P), iter(documents)
    batch = as_batch(next(whole_batches(iter(functools.partial(packer.next_row, stream), None), B)))
    assert (batch["tokens"] == PAD_ID).any() and batch["document_ids"].max() > 2
    return batch


def with_noise(batch, seed, rows=B):
    drawn = np.random.default_rng(seed).random((rows, L, 2 + K), np.float32)
    return batch | dict(block_noise=drawn)


@functools.cache
def drawing(shape, **options):
    config = DiffusionConfig(**options)

    @jax.jit
    def draw(batch):
        patches = buffers_from_lengths(batch["patch_lengths"], L)
        return block_diffusion.draw_blocks(config, shape, batch, patches)

    return draw


def masks_of(noise, share, masks, t_min):
    """Which bytes of a block are masked, and with what probability each."""
    if masks == "random":
        t = t_min + (1 - t_min) * share
        return noise < t, np.full(K, t)
    known = 1 + int(share * (K - 1))
    return np.arange(K) >= known, np.float64([1, *(np.arange(1, K) / (K - 1))])


def by_loops(batch, shape, masks, t_min, t_per):
    """Of each row and tile: {start: (ids, masked ones MASK_ID; weights)}; and the counts."""
    (tiles, blocks), size, found = shape, tile_length(L, shape[0]), {}
    number_of_targets = number = 0
    for b in range(B):
        tokens = np.append(batch["tokens"][b], [PAD_ID] * K)
        starts = set(np.cumsum(batch["patch_lengths"][b])[batch["patch_lengths"][b] > 0])
        own, learned, noise = (batch[x][b] for x in ("document_ids", "loss_mask", "block_noise"))
        possible = {}
        for start in range(1, L + 1):
            inside = [
                tokens[at] != PAD_ID and own[at] == own[start - 1] for at in range(start, start + K)
            ]
            counted = [i and learned[start - 1 + k] for k, i in enumerate(inside)]
            counted[0] &= masks == "random"
            if start in starts and any(counted):
                possible[start] = inside, counted
        number += len(possible)
        number_of_targets += sum(sum(counted) for _, counted in possible.values())
        for s in range(tiles):
            of_tile = [n for n in possible if (n - 1) // size == s]
            taken = sorted(of_tile, key=lambda n: -noise[n - 1, 0])[:blocks]
            for start in taken:
                inside, counted = possible[start]
                share = noise[start - 1 if t_per == "block" else 0, 1]
                masked, t = masks_of(noise[start - 1, 2:], share, masks, t_min)
                ids = np.where(masked | ~np.array(inside), MASK_ID, tokens[start : start + K])
                weights = len(of_tile) / len(taken) * (masked & counted) / t
                found[b, s, start] = ids, weights
    return found, number, number_of_targets


@pytest.mark.parametrize(
    "shape, masks, t_per",
    [
        ((3, 4), "random", "block"),
        ((5, 2), "random", "row"),
        ((1, 100), "random", "block"),
        ((3, 4), "prefix", "row"),
        ((1, 100), "prefix", "block"),
    ],
)
def test_draws_are_those_of_a_loop(shape, masks, t_per):
    for seed in range(3):
        batch = with_noise(rows(), seed)
        draw = drawing(shape, masks=masks, t_min=0.3, t_per=t_per)
        blocks, targets, weights, counts = draw(batch)
        expected, number, number_of_targets = by_loops(batch, shape, masks, 0.3, t_per)
        assert (counts["blocks"], counts["block_targets"]) == (number, number_of_targets)
        decoder_ids = np.asarray(buffers_from_lengths(batch["patch_lengths"], L).decoder_ids)
        seen = set()
        for b, s, m in itertools.product(range(B), *map(range, shape)):
            start, place = int(blocks.starts[b, s, m]), (b, s, int(blocks.starts[b, s, m]))
            assert blocks.patch_ids[b, s, m] == decoder_ids[b, start - 1]
            if place not in expected or place in seen:
                assert not np.any(weights[b, s, m])
                continue
            seen.add(place)
            ids, expected_weights = expected[place]
            np.testing.assert_array_equal(blocks.ids[b, s, m], ids)
            np.testing.assert_allclose(weights[b, s, m], expected_weights, rtol=1e-5)
            known = ids != MASK_ID
            np.testing.assert_array_equal(np.asarray(targets[b, s, m])[known], ids[known])
            for k in np.flatnonzero(expected_weights):
                assert targets[b, s, m, k] == batch["targets"][b, start + k - 1]
        assert seen == set(expected) and counts["blocks_taken"] == len(expected)
        order = np.asarray(blocks.patch_ids).reshape(B, -1)
        assert (np.diff(order) >= 0).all()  # sums by patch rely on it


@settings(max_examples=10)
@given(st.integers(1, 2**30))
def test_every_place_is_as_likely(seed):
    """Each open place is stood for once, on average."""
    rng, number = np.random.default_rng(seed), 4000
    is_open = rng.random((1, 30)) < 0.5
    noise = rng.random((number, 30), np.float32)
    opens = np.broadcast_to(is_open, noise.shape)
    positions, stands_for = jax.jit(block_diffusion.choose, static_argnums=(2, 3))(
        opens, noise, 3, 2
    )
    total = np.zeros(30)
    np.add.at(total, np.asarray(positions).reshape(-1), np.asarray(stands_for).reshape(-1))
    mean = total / number
    # The least likely place is drawn in a fifth of the cases, and then stands for five.
    np.testing.assert_allclose(mean, is_open[0], rtol=0, atol=5 * 2 / number**0.5)
    assert (mean[~is_open[0]] == 0).all()


@pytest.mark.parametrize("masks", ["random", "prefix"])
def test_masked_bytes_weigh_one_on_average(masks):
    """All blocks are drawn; of a byte, 1 / t has a variance of (log(1 / 0.1) / 0.9) - 1 = 1.56.

    That of prefixes is 1 at most.
    """
    number, draw = 300, drawing((1, 100), masks=masks, t_min=0.1)
    total = np.zeros((B, L + 1, K))
    for seed in range(number):
        blocks, _, weights, counts = draw(with_noise(rows(), seed))
        for b in range(B):
            np.add.at(total[b], np.asarray(blocks.starts[b, 0]), np.asarray(weights[b, 0]))
    mean = total[total > 0] / number
    assert len(mean) == counts["block_targets"]
    error = (1.56 / number) ** 0.5
    # Bytes of a block have one t, and so are not independent.
    assert abs(mean.mean() - 1) < 4 * error / (len(mean) / K) ** 0.5
    assert np.abs(mean - 1).max() < 5 * error


# The model


@functools.cache
def parameters():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), functional.abstract_params(MODEL)
    )


def loss_of_blocks(config, params, batch, **known):
    patches = buffers_from_lengths(batch["patch_lengths"], L)
    _, sums = block_diffusion.logits_and_sums(MODEL, config, params, batch, patches, **known)
    return sums["block_nats"], sums


def test_a_sample_of_blocks_has_the_loss_of_all():
    """With all bytes masked, so that only the sample is left to chance."""
    batch = {name: x[:1] for name, x in rows().items()}
    nats = {}
    for blocks, number in ((300, 2), (9, 150)):
        config = DiffusionConfig(t_min=1.0, row_blocks=blocks)

        @jax.jit
        def losses(noise, config=config):
            def one(noise):
                return loss_of_blocks(config, parameters(), batch | dict(block_noise=noise))[0]

            return jax.lax.map(one, noise)

        noise = np.random.default_rng(1).random((number, 1, L, 2 + K), np.float32)
        nats[blocks] = np.asarray(losses(noise))
    whole, again = nats[300]
    assert whole == pytest.approx(again, rel=1e-6)
    error = nats[9].std() / len(nats[9]) ** 0.5
    assert 0 < error < 0.02 * whole
    assert abs(nats[9].mean() - whole) < 4 * error


def test_gradients_come_from_what_counts_alone():
    """Of one document in each row something is learned: others, later bytes and all else: 0."""
    batch = with_noise(rows(), 5)
    chosen = batch["document_ids"] == 1
    batch |= dict(loss_mask=batch["loss_mask"] & chosen)
    config = DiffusionConfig(row_blocks=30)

    @jax.jit
    def gradient(batch):
        def loss(params, added):
            return loss_of_blocks(config, params, batch, ngrams=added)

        nothing = jnp.zeros((B, L, MODEL.local_encoder.dim))
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters(), nothing)

    (of_params, of_bytes), sums = gradient(batch)
    reached = np.abs(np.asarray(of_bytes)).max(axis=-1) > 0
    assert sums["block_targets"] > 0 and reached.any(axis=1).all()
    assert not reached[~chosen].any()
    assert np.any(of_params["local_decoder"]["mask_embedding"]["weight"])
    nowhere = batch | dict(loss_mask=np.zeros_like(batch["loss_mask"]))
    (of_params, of_bytes), sums = gradient(nowhere)
    assert sums["block_nats"] == sums["blocks"] == 0
    assert not any(np.any(g) for g in jax.tree.leaves((of_params, of_bytes)))  # nor NaN


def training(**changes):
    given = dict(steps=100, batch_size=B, optimizer=FAST, diffusion=DiffusionConfig(t_min=0.2))
    return TrainingConfig(**given | changes)


def steps(model, settings, count):
    """The last state, and the metrics of each step, on the mesh that is set."""
    rule = make_optimizer(settings.optimizer, settings.steps)
    step = make_train_step(model, settings, rule)
    like = functional.abstract_params(model)
    placed = {
        name: x if name != "local_decoder" else {k: v for k, v in x.items() if k in like[name]}
        for name, x in parameters().items()
    }
    params = jax.tree.map(
        lambda x, like: jax.device_put(
            x, jax.NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)
        ),
        placed,
        like,
    )
    state, found = start_state(params, rule), []
    for _ in range(count):
        state, metrics = step(state, sharding.put_batch(rows()))
        found.append({k: float(v) for k, v in metrics.items() if jnp.ndim(v) == 0})
    assert step._cache_size() == 1
    return state, found


@functools.cache
def trained():
    return steps(MODEL, training(), 12)


def test_a_step_learns_blocks_beside_next_bytes():
    _, found = trained()
    assert 0.5 < found[0]["block_share"] <= 1
    assert len({x["block_share"] for x in found}) == 1  # of these rows, whatever is drawn
    for name in ("loss", "block_loss"):
        assert 0 < found[-1][name] < 0.95 * found[0][name]


def test_without_weight_a_step_is_that_of_a_plain_model():
    _, found = trained()
    plain = dataclasses.replace(MODEL, diffusion_block=0)
    _, (first,) = steps(plain, training(), 1)
    assert found[0]["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert "block_loss" not in first
    _, (without,) = steps(MODEL, training(diffusion=DiffusionConfig(weight=0.0)), 1)
    assert without == first


def test_parts_of_a_batch_have_the_blocks_of_the_whole():
    _, (whole, *_) = trained()
    _, (parts, *_) = steps(MODEL, training(accumulation_steps=2), 2)
    for name in ("loss", "block_loss", "block_share"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.05)  # means are by part


def test_a_mesh_learns_the_same(use_mesh):
    _, expected = trained()
    with use_mesh(2, 2, 1):
        _, found = steps(MODEL, training(), 3)
    for ours, theirs in zip(found, expected, strict=False):
        for name in ("loss", "block_loss", "block_share", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_touched_rows_learn_the_same():
    _, expected = trained()
    touched = dataclasses.replace(FAST, hash_updates="touched")
    _, found = steps(MODEL, training(optimizer=touched), 3)
    for ours, theirs in zip(found, expected, strict=False):
        for name in ("loss", "block_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)

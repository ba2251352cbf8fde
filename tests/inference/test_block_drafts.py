"""Blocks that the decoder fills in: plain decoding's text, in fewer passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import sharding
from bltjax.config import MeshConfig
from bltjax.inference.block_drafts import _choose, _fill_in
from bltjax.inference.jobs import BlockDrafts, Decoding, Job, Request
from bltjax.inference.room import Room, make_shape
from bltjax.model import functional
from bltjax.model.block_rows import Blocks
from bltjax.model.local_decoder import MASK
from bltjax.patching.boundaries import lengths_from_starts, patch_starts
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.patching.entropy import next_byte_entropy
from bltjax.vocabulary import BYTE_OFFSET, EOS_ID, MASK_ID, VOCAB_SIZE, encode
from tests.inference.test_engine import PATCHING, TEXTS, Tiny, prompts

BLOCK = 4


class Filling(Tiny):
    """A golden model with embeddings of masked bytes."""

    def __init__(self, name="meta_A_1b_like", patching=PATCHING):
        super().__init__(name, patching)
        self.config = dataclasses.replace(self.config, diffusion_block=BLOCK)
        mask = jax.random.normal(jax.random.key(0), (BLOCK, self.config.local_decoder.dim))
        decoder = self.params["blt"]["local_decoder"] | {MASK: dict(weight=mask)}
        self.params["blt"] = self.params["blt"] | dict(local_decoder=decoder)


@pytest.fixture(scope="module")
def filling():
    return Filling()


LONG = " ".join(TEXTS).encode() * 2
WRITTEN = 21  # ids of each text


class Written:
    """Texts of which all but the last byte have been read, and the blocks that these are in."""

    def __init__(self, model, blocks):
        self.model = model
        ids = np.stack([encode(LONG[n:], add_eos=False)[:WRITTEN] for n in range(0, 60, 5)])
        starts = [np.flatnonzero(row[:WRITTEN])[-1] for row in starts_of(model, ids)]
        known = WRITTEN - np.int32(starts)
        fits = known < BLOCK  # else nothing is filled in
        assert fits.sum() > 2 and len(set(known[fits])) > 1
        self.ids, self.starts, self.known = ids[fits], np.int32(starts)[fits], known[fits]
        jobs = [Job(Request(x[:-1], 1, 0), threshold=PATCHING.threshold) for x in self.ids]
        shape = make_shape(model._decoder(), len(jobs), 128, Decoding(blocks=blocks))
        self.room = Room(shape, model._generation_params)
        self.room.fill(dict(enumerate(jobs)))
        self.room._renew()
        state = self.room.progress.state
        tokens = np.array(state.tokens)
        tokens[:, WRITTEN - 1] = self.ids[:, -1]
        self.state = state.with_tokens(sharding.shard_rows(tokens))
        self.blocks = np.full((len(self.ids), BLOCK), MASK_ID, np.int32)
        for row, x, start, number in zip(
            self.blocks, self.ids, self.starts, self.known, strict=True
        ):
            row[:number] = x[start:]

    def teacher_forced(self, blocks):
        """Logits [B, K, V] of the blocks by the full pass, over texts that go on as they do."""
        ids = np.pad(self.ids, ((0, 0), (0, BLOCK)), constant_values=BYTE_OFFSET)
        for row, start, block in zip(ids, self.starts, blocks, strict=True):
            row[start : start + BLOCK] = np.where(block == MASK_ID, BYTE_OFFSET, block)
        opens = starts_of(self.model, ids)
        numbers = np.cumsum(opens, axis=1)[np.arange(len(opens)), self.starts] - 1
        before = np.int32(numbers) - 1
        rows = [lengths_from_starts(row) for row in opens]
        lengths = np.stack([np.pad(x, (0, ids.shape[1] + 1 - len(x))) for x in rows])
        blocks = Blocks(
            self.starts[:, None, None],
            blocks[:, None, None].astype(np.int32),
            before[:, None, None],
        )
        found = full_pass(self.model.config, self.model.params["blt"], ids, lengths, blocks)
        return np.asarray(found)[..., :VOCAB_SIZE].reshape(*blocks.ids.shape[::3], VOCAB_SIZE)


@functools.partial(jax.jit, static_argnums=0)
def full_pass(config, params, ids, lengths, blocks):
    patches = buffers_from_lengths(lengths, ids.shape[1])
    return functional.intermediates(config, params, ids, patches, blocks=blocks)["block_logits"]


def starts_of(model, ids):
    logits = functional.apply(model.entropy_config, model.params["entropy_model"], ids)
    return patch_starts(model.patching, ids, np.array(next_byte_entropy(logits)))


@pytest.mark.parametrize("name", ["meta_A_1b_like", "meta_B_7b_like"])
def test_logits_of_blocks_are_those_of_the_whole_text(name):
    """With the first bytes known, of which the encoder alone read the last; or the last ones."""
    written = Written(Filling(name), BlockDrafts(BLOCK))
    params, decoder = written.room.params, written.room.shape.decoder
    last = np.full_like(written.starts, WRITTEN - 1)
    state = jax.jit(decoder.read_states, static_argnums=3)(params, written.state, last, 1)
    gap = np.where(np.arange(BLOCK) == 0, MASK_ID, np.maximum(written.blocks, BYTE_OFFSET))
    for blocks in (written.blocks, gap):
        found = jax.jit(decoder.predict_block)(params, state, blocks, written.starts)
        np.testing.assert_allclose(found, written.teacher_forced(blocks), rtol=0, atol=1e-5)


def test_each_pass_is_told_what_those_before_it_filled_in():
    """A byte in a pass, the first one: as full passes over all bytes so far would have it."""
    written = Written(Filling(), BlockDrafts(BLOCK, confidence=1 - 1e-6))
    room, expected = written.room, written.blocks.copy()
    found, _, passes = jax.jit(functools.partial(_fill_in, room.shape))(
        room.params,
        room._arrays,
        room.progress._replace(state=written.state),
        written.starts,
        written.known,
    )
    assert passes == BLOCK - written.known.min()
    for k in range(written.known.min(), BLOCK):
        logits = np.array(written.teacher_forced(expected)[:, k])
        logits[:, [i for i in range(BYTE_OFFSET) if i != EOS_ID]] = -np.inf
        expected[:, k] = np.where(k < written.known, expected[:, k], logits.argmax(axis=-1))
    np.testing.assert_array_equal(found, expected)


def check_same(model, texts, new, **options):
    plain, _ = model.generate(texts, new, batch_size=4)
    found, counts = model.generate(texts, new, batch_size=4, **options)
    assert found == plain
    assert counts.drafted > counts.accepted


@pytest.mark.long
@pytest.mark.parametrize("name", ["meta_A_1b_like", "meta_B_7b_like"])
def test_greedy_text_is_that_of_plain_decoding(name):
    check_same(Filling(name), prompts(8), 32, blocks=BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 1)])
def test_greedy_text_of_two_hundred_prompts(mesh):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*mesh), jax.devices()[: np.prod(mesh)])):
        model, texts = Filling(), prompts(200, seed=5)
        plain, _ = model.generate(texts, 24)
        for size in (1, 7, 32):
            found, _ = model.generate(texts, 24, batch_size=size, blocks=BLOCK)
            assert found == plain, size


@pytest.mark.long
@pytest.mark.parametrize(
    "chosen",
    [
        BlockDrafts(3),
        BlockDrafts(4, confidence=0.01),
        BlockDrafts(4, entropy_bound=6.0),
        BlockDrafts(4, confidence=0.01, max_passes=1),
    ],
)
def test_ways_to_fill_in_change_no_greedy_text(filling, chosen):
    check_same(filling, prompts(4, seed=1), 24, blocks=chosen)


@pytest.mark.parametrize("passes", [None, 1])
@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("bound", [dict(confidence=0.3), dict(entropy_bound=3.0)])
def test_of_a_pass_sure_bytes_are_kept(passes, verified, bound):
    """Of blocks that are verified from the left on: what is drawn depends on what is before it."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 2.5, (200, 6, 9)), jnp.float32)
    is_masked = rng.random((200, 6)) < 0.7
    options = BlockDrafts(6, verified, max_passes=passes, **bound)
    kept = np.asarray(_choose(options, logits, jnp.asarray(is_masked), passes == 1))
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    entropy, top = -(p * np.log(p)).sum(axis=-1), p.max(axis=-1)
    for row in range(len(kept)):
        left = list(np.flatnonzero(is_masked[row]))
        if not verified:
            left.sort(key=lambda k: entropy[row, k] if "entropy_bound" in bound else -top[row, k])
        total, expected = 0.0, []
        for k in left:
            total += entropy[row, k]
            is_sure = total <= 3 if "entropy_bound" in bound else top[row, k] > 0.3
            if is_sure or (passes is None and k == left[0]):
                expected.append(k)
            if not is_sure:
                break
        assert sorted(expected) == list(np.flatnonzero(kept[row]))
    assert 0 < kept.sum() < is_masked.sum()


def test_drafts_end_before_what_is_not_sure(filling):
    """With a bound that no byte reaches nothing is drafted, and nothing else changes."""
    texts, none = prompts(4, seed=1), BlockDrafts(4, confidence=1 - 1e-6, max_passes=1)
    plain, _ = filling.generate(texts, 24)
    found, counts = filling.generate(texts, 24, blocks=none)
    assert found == plain and counts.drafted == 0
    some = BlockDrafts(4, confidence=0.05, max_passes=1)
    found, fewer = filling.generate(texts, 24, blocks=some)
    assert found == plain
    found, whole = filling.generate(texts, 24, blocks=4)
    assert found == plain and 0 < fewer.drafted < whole.drafted
    assert fewer.accepted <= fewer.in_patch <= fewer.drafted


@pytest.mark.long
def test_budgets_stops_and_many_patches(filling):
    whole, _ = filling.generate([b"abc"], 30)
    stops = [whole[0][9:12], whole[0][20:21] + b"never"]
    found, _ = filling.generate([b"abc"] * 3, [0, 7, 30], stop=stops, blocks=BLOCK)
    assert found == [b"", whole[0][:7], whole[0][: whole[0].index(stops[0])]]
    pieces = [piece for piece, _ in filling.stream(b"abc", 30, stop=stops, blocks=BLOCK)]
    assert b"".join(pieces) == found[2]


@pytest.mark.long
def test_without_verification_all_drafts_stand(filling):
    _, counts = filling.generate(
        prompts(4), 32, batch_size=4, blocks=BlockDrafts(BLOCK, verified=False)
    )
    _, verified = filling.generate(prompts(4), 32, batch_size=4, blocks=BLOCK)
    assert counts.accepted / counts.drafted > verified.accepted / verified.drafted
    penalty = dict(temperature=0.9, top_k=20, repetition_penalty=1.2, valid_utf8=True)
    drawn = filling.generate(prompts(4), 32, seed=7, blocks=BLOCK, **penalty)[0]
    alone = [
        filling.generate([text], 32, seed=7, blocks=BLOCK, **penalty)[0][0] for text in prompts(4)
    ]
    assert drawn == alone


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [4, BlockDrafts(4, confidence=0.01, max_passes=1)])
def test_drawn_text_has_the_distribution_of_plain_decoding(blocks):
    """The second byte of 50,000 texts, a draft or what took its place, against exact shares."""
    model = Filling(patching=dataclasses.replace(PATCHING, threshold=99.0))  # one long patch
    count, prompt = 50_000, b"T"
    texts, counts = model.generate(
        [prompt] * count, 2, temperature=1.0, seed=range(count), blocks=blocks, batch_size=500
    )
    assert counts.drafted > counts.accepted > count / 100
    first = next_bytes(model, [prompt])[0]
    second = first @ next_bytes(model, [prompt + bytes([byte]) for byte in range(256)])
    found = np.bincount([text[1] for text in texts if len(text) == 2], minlength=256)
    expected = second * count
    large = expected >= 5
    observed = np.append(found[large], found[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert chi_square < 340  # 255 degrees of freedom: exceeded with a chance of 0.0003


def next_bytes(model, texts) -> np.ndarray:
    """Probabilities of the byte after each text, those of EOS left out, float64 [texts, 256]."""
    ids = np.stack([encode(text, add_eos=False) for text in texts])
    starts = patch_starts(model.patching, ids, np.zeros(ids.shape, np.float32))
    lengths = np.stack([lengths_from_starts(row) for row in starts])
    patches = buffers_from_lengths(lengths, ids.shape[1])
    logits = functional.apply(model.config, model.params["blt"], ids, patches)[:, -1]
    drawable = np.float64(logits)[:, [EOS_ID, *range(BYTE_OFFSET, VOCAB_SIZE)]]
    p = np.exp(drawable - drawable.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True))[:, 1:]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(blocks=1), "blocks=1 must be a whole number of bytes from 2"),
        (dict(blocks=5), "blocks=5: the decoder was trained to fill in blocks of 4"),
        (dict(blocks=4, max_drafts=2), "max_drafts=2 and blocks=4 are two ways to draft"),
    ],
)
def test_what_makes_no_sense_is_refused(filling, wrong, said):
    with pytest.raises(ValueError, match=said):
        filling.generate([b"a"], 1, **wrong)


def test_a_model_without_blocks_says_so():
    with pytest.raises(ValueError, match=r"blocks of 0 bytes .*: leave blocks out, or train with"):
        Tiny("meta_A_1b_like").generate([b"a"], 1, blocks=4)

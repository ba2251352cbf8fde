"""Blocks that the decoder fills in: plain decoding's text, in fewer passes."""

import dataclasses

import jax
import numpy as np
import pytest

from bltjax import sharding
from bltjax.config import MeshConfig
from bltjax.inference import loops
from bltjax.inference.jobs import BlockDrafts, Decoding, Job, Request
from bltjax.inference.room import make_shape, new_reading
from bltjax.model import functional
from bltjax.model.block_rows import Blocks
from bltjax.model.local_decoder import MASK
from bltjax.patching.boundaries import lengths_from_starts, patch_starts
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.patching.entropy import next_byte_entropy
from bltjax.vocabulary import BYTE_OFFSET, EOS_ID, MASK_ID, VOCAB_SIZE, encode
from tests.inference.test_engine import PATCHING, Tiny, prompts

BLOCK = 4


class Filling(Tiny):
    """A golden model with an embedding of masked bytes."""

    def __init__(self, name="meta_A_1b_like", patching=PATCHING):
        super().__init__(name, patching)
        self.config = dataclasses.replace(self.config, diffusion_block=BLOCK)
        mask = jax.random.normal(jax.random.key(0), (1, self.config.local_decoder.dim))
        decoder = self.params["blt"]["local_decoder"] | {MASK: dict(weight=mask)}
        self.params["blt"] = self.params["blt"] | dict(local_decoder=decoder)


@pytest.fixture(scope="module")
def filling():
    return Filling()


def starts_of(model, ids):
    logits = functional.apply(model.entropy_config, model.params["entropy_model"], ids[None])
    return patch_starts(model.patching, ids[None], np.array(next_byte_entropy(logits)))[0]


@pytest.mark.parametrize("name", ["meta_A_1b_like", "meta_B_7b_like"])
def test_logits_of_blocks_are_those_of_the_whole_text(name):
    """After prompts of any length: with nothing, or some bytes of the block known."""
    model = Filling(name)
    texts = [text for text in prompts(12, seed=3) if len(text) > 3]
    shape = make_shape(model._decoder(), len(texts), 128, Decoding(blocks=BlockDrafts(BLOCK)))
    jobs = [
        Job(Request(encode(t, add_eos=False), 1, 0), threshold=PATCHING.threshold) for t in texts
    ]
    lengths = np.int32([len(job.request.ids) for job in jobs])
    params = model._generation_params
    reading = loops.read(shape, params, new_reading(jobs, shape), lengths, np.int32(9))
    starts = np.array(shape.decoder.open_patch(reading.state, lengths - 1))
    blocks = np.full((len(texts), BLOCK), MASK_ID, np.int32)
    for row, job, start in zip(blocks, jobs, starts, strict=True):
        known = job.request.ids[start:][:BLOCK]
        row[: len(known)] = known
    found = np.array(shape.decoder.predict_block(params, reading.state, blocks, starts))
    assert len({int(n - s) for n, s in zip(lengths, starts, strict=True)}) > 1
    for job, start, ids, logits in zip(jobs, starts, blocks, found, strict=True):
        expected = teacher_forced(model, job.request.ids, start, ids)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def teacher_forced(model, ids, start, block):
    """Logits [K, V] of a block at `start` of a text, by the full pass."""
    opens = starts_of(model, ids)
    patches = buffers_from_lengths(lengths_from_starts(opens)[None], len(ids))
    before = int(opens[: start + 1].sum()) - 2
    blocks = Blocks(
        np.int32(start).reshape(1, 1, 1), block.reshape(1, 1, 1, -1), np.int32([[[before]]])
    )
    known = dict(blocks=blocks)
    everything = functional.intermediates(
        model.config, model.params["blt"], ids[None], patches, **known
    )
    return everything["block_logits"][0, :, :VOCAB_SIZE]


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


@pytest.mark.parametrize(
    "chosen", [BlockDrafts(3), BlockDrafts(4, True, 0.01), BlockDrafts(4, True, 0.0, 6.0)]
)
def test_ways_to_fill_in_change_no_greedy_text(filling, chosen):
    check_same(filling, prompts(4, seed=1), 24, blocks=chosen)


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
def test_drawn_text_has_the_distribution_of_plain_decoding():
    """The second byte of 50,000 texts, a draft or what took its place, against exact shares."""
    model = Filling(patching=dataclasses.replace(PATCHING, threshold=99.0))  # one long patch
    count, prompt = 50_000, b"T"
    texts, counts = model.generate(
        [prompt] * count, 2, temperature=1.0, seed=range(count), blocks=4, batch_size=500
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

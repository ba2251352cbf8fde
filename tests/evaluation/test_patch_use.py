"""The use of patches: the numbers of a model in NumPy, and models whose use is known."""

import functools

import jax
import numpy as np
import pytest

from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    HashConfig,
    PatchingConfig,
    TransformerConfig,
)
from bltjax.data.batches.packing import pack_patches
from bltjax.data.batches.rows import Row
from bltjax.evaluation.patch_use import (
    DISTURBED,
    make_patch_use_step,
    patch_use,
    patch_use_of_documents,
)
from bltjax.evaluation.score import BLTScoring, score_documents
from bltjax.model import functional
from bltjax.patching.boundaries import document_segments, patch_starts
from bltjax.training.patch_finder import make_patch_finder
from bltjax.vocabulary import BYTE_OFFSET, encode
from tests import golden
from tests.conftest import mesh_of
from tests.test_model_page import page, weights


def stack(dim: int) -> TransformerConfig:
    return TransformerConfig(dim, 1, num_heads=2, window=8, ffn_multiple_of=16)


CONFIG = BLTConfig(
    local_encoder=stack(16),
    global_transformer=stack(24),
    local_decoder=stack(16),
    cross_attention=CrossAttentionConfig(num_heads=2),
    hash=HashConfig((2, 3), vocab=104),
)
STEP = make_patch_use_step(CONFIG)
SPACE = PatchingConfig("space")
SENTENCES = "One row of text.", "Rows differ in patches, a lot", "x " * 9, "The fourth row, here"


def golden_rows(name) -> list[Row]:
    """The rows of a golden model, each id but the last with the next one as its target."""
    expected = golden.arrays(name)
    tokens, lengths = expected["tokens"].astype(np.int32), expected["patch_lengths"]
    targets = np.roll(tokens, -1, axis=1)
    mask = np.arange(tokens.shape[1]) < tokens.shape[1] - 1
    documents = np.asarray(document_segments(tokens))
    nothing = np.zeros_like(tokens)
    return [
        Row(*values[:2], mask, *values[2:])
        for values in zip(tokens, targets, documents, nothing, lengths, strict=True)
    ]


def latents_in_numpy(w, config, row: Row):
    """Byte states [N, E], patches as the global transformer reads them, and what it makes of them.

    Patches [P, G] are those of the row alone, without unused columns.
    """
    lengths = np.trim_zeros(row.patch_lengths)
    encoder_ids, decoder_ids = page()["patch_ids"](lengths)
    h, patches = page()["encode"](w, config, row.tokens, encoder_ids, len(lengths))
    documents = page()["documents"](row.tokens)
    of_next = np.append(documents, documents[-1] + (row.tokens[-1] == 2))
    begins = np.cumsum(lengths) - lengths
    of_patches = of_next[np.minimum(begins, len(row.tokens))]
    states = page()["run_global"](w, config, patches, of_patches)
    name = "global_transformer.token_embedding_projection.weight"
    return h, patches @ w[name].T if name in w else patches, states, decoder_ids


def bits_in_numpy(w, config, row: Row, h, states, decoder_ids) -> tuple[float, int]:
    """Bits of the bytes of a row, and their number."""
    logits = page()["decode"](w, config, h, states, decoder_ids, row.tokens)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    counted = row.loss_mask & (row.targets >= BYTE_OFFSET)
    nats = -logs[np.arange(len(logs)), row.targets][counted].sum()
    return nats / np.log(2), counted.sum()


def use_in_numpy(w, config, rows: list[Row]) -> dict:
    found = [latents_in_numpy(w, config, row) for row in rows]
    totals = dict.fromkeys(("plain", *DISTURBED), 0.0)
    num_bytes = 0
    for r, (h, unmixed, states, decoder_ids) in enumerate(found):
        of_before = found[r - 1][2][:-1]  # without the tail
        variants = dict(
            plain=states,
            zeroed=0 * states,
            another_row=np.stack([of_before[j % len(of_before)] for j in range(len(states))]),
            one_late=np.concatenate([0 * states[:1], states[:-1]]),
            no_global_blocks=unmixed,
        )
        for name, latents in variants.items():
            bits, count = bits_in_numpy(w, config, rows[r], h, latents, decoder_ids)
            totals[name] += bits
        num_bytes += count
    per_byte = {name: bits / num_bytes for name, bits in totals.items()}
    use = {name: per_byte[name] - per_byte["plain"] for name in DISTURBED}
    return use | dict(bits_per_byte=per_byte["plain"], bytes=num_bytes)


@pytest.mark.parametrize("name", golden.MODELS)
def test_it_is_that_of_the_model_in_numpy(name):
    """Rows of unequal numbers of patches, documents that end in a row, all kinds of decoders."""
    config, rows = golden.blt_config(name), golden_rows(name)
    found = patch_use(make_patch_use_step(config), golden.params(name), rows, 4)
    wanted = use_in_numpy(weights(name), config, rows)
    assert found.keys() == wanted.keys() and found["bytes"] == wanted["bytes"]
    for kind, value in wanted.items():
        assert found[kind] == pytest.approx(value, abs=2e-5), kind
    assert all(abs(wanted[kind]) > 5e-4 for kind in DISTURBED)


def text_rows(texts=SENTENCES, length=32) -> list[Row]:
    """A row for each text, in patches of words."""
    rows = []
    for text in texts:
        ids = encode(text)
        rows += pack_patches([(ids, patch_starts(SPACE, ids)[: len(ids)])], length, 24)
    return rows


@functools.cache
def params():
    """Larger than initial weights, so that every part of the model matters."""
    rng = np.random.default_rng(0)
    shapes = functional.abstract_params(CONFIG)
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


def silenced(tree):
    return jax.tree.map(np.zeros_like, tree)


def test_a_decoder_that_ignores_its_patches_uses_none():
    rows = text_rows()
    given = params()
    assert all(abs(patch_use(STEP, given, rows, 2)[kind]) > 1e-4 for kind in DISTURBED)
    decoder = given["local_decoder"]
    cross = decoder["cross_attn_layers"]
    deaf = dict(cross_attn_layers=dict(cross, wo=silenced(cross["wo"])))
    found = patch_use(STEP, given | dict(local_decoder=decoder | deaf), rows, 2)
    assert [found[kind] for kind in DISTURBED] == [0.0] * 4 and found["bits_per_byte"] > 1


def test_without_global_blocks_nothing_is_lost_where_they_add_nothing():
    blocks = params()["global_transformer"]
    layers = blocks["layers"]
    attention, forward = layers["attention"], layers["feed_forward"]
    silent = dict(
        layers,
        attention=dict(attention, wo=silenced(attention["wo"])),
        feed_forward=dict(forward, w2=silenced(forward["w2"])),
    )
    given = params() | dict(global_transformer=dict(blocks, layers=silent))
    found = patch_use(STEP, given, text_rows(), 2)
    assert found["no_global_blocks"] == 0.0 and found["zeroed"] != 0


def test_another_row_costs_nothing_where_all_rows_are_the_same():
    rows = text_rows(SENTENCES[:1] * 4)
    found = patch_use(STEP, params(), rows, 4)
    assert found["another_row"] == 0.0 and found["zeroed"] != 0


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 2)])
def test_rows_over_devices(sizes):
    """The row before may lie on another device."""
    rows = text_rows(SENTENCES * 2)
    expected = patch_use(STEP, params(), rows, 8)
    with jax.set_mesh(mesh_of(*sizes)):
        found = patch_use(make_patch_use_step(CONFIG), params(), rows, 8)
    assert found == pytest.approx(expected, abs=1e-5)


def test_patches_that_are_found_in_the_step_give_the_same():
    rows = text_rows()
    expected = patch_use(STEP, params(), rows, 4)
    step = make_patch_use_step(CONFIG, make_patch_finder(SPACE, None, 24))
    rows = [row._replace(patch_lengths=row.patch_lengths[:0]) for row in rows]
    assert patch_use(step, params(), rows, 4, None) == pytest.approx(expected, abs=1e-6)


def seen(rows, batch_size):
    """What `patch_use` gives a step: batches of (first id that differs between rows, it counts)."""
    batches = []

    def step(_, batch):
        firsts, counts = batch["tokens"][:, 1].tolist(), batch["loss_mask"].any(axis=1).tolist()
        batches.append(list(zip(firsts, counts, strict=True)))
        return dict(byte_nats=np.ones(5), bytes=np.ones(5))

    return patch_use(step, None, rows, batch_size), batches


def test_no_row_is_its_own_row_before():
    a, b, c, _ = ids = [encode(text)[1] for text in SENTENCES]
    assert len(set(map(int, ids))) == 4
    rows = text_rows()
    _, batches = seen(rows[:3], 1)
    assert batches == [[(a, True), (b, True)]]  # batches of two rows; the third would be alone
    _, batches = seen(rows[:3], 4)
    assert batches == [[(a, True), (b, True), (c, True), (c, False)]]
    found, batches = seen(rows[:1], 4)
    assert batches == [[(a, True), *[(a, False)] * 3]]
    assert found["another_row"] is None and found["zeroed"] == 0


def test_documents_fill_rows_in_order():
    documents = ["two words", "and three words", "", "no end of words " * 9]
    model = BLTScoring(CONFIG, params(), None, None, SPACE)
    found = patch_use_of_documents(model, documents, 64, 128)
    assert found["bytes"] == sum(map(len, documents))
    alone = score_documents(model, documents[3:], row_bytes=512)[0]
    of_one = patch_use_of_documents(model, documents[3:], 64, 512)
    assert of_one["bits_per_byte"] == pytest.approx(alone.bits_per_byte, abs=1e-5)
    assert of_one["another_row"] is None  # of a single row
    assert 0 < patch_use_of_documents(model, documents, 1, 64)["bytes"] < 64
    with pytest.raises(ValueError, match="0 documents"):
        patch_use_of_documents(model, [], 64, 128)
    with pytest.raises(ValueError, match="0 rows"):
        patch_use_of_documents(model, documents, 0, 128)

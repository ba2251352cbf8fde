"""The limb arithmetic against the published hash ids and against Python's own integers."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bltjax.ops import hashing

GOLDEN = pathlib.Path(__file__).parents[1] / "golden_data" / "golden"
CASES = json.loads((GOLDEN / "meta_tokenizer_hash_patch_cases.json").read_text())["hash"]
RELEASED = {"sizes": (3, 4, 5, 6, 7, 8), "num_functions": 1, "vocab": 500002}


def oracle(tokens, sizes, num_functions, vocab):
    """The definition of model.md#n-grams in Python integers, for tokens [L]."""
    columns = []
    for prime in hashing.PRIMES[:num_functions]:
        for size in sizes:
            padded = [0] * (size - 1) + [int(token) for token in tokens]
            for t in range(len(tokens)):
                window = padded[t : t + size]
                value = sum(w * prime**i for i, w in enumerate(window)) % 2**64
                columns.append((value - 2**64 * (value >= 2**63)) % vocab)
    return np.array(columns).reshape(num_functions * len(sizes), len(tokens)).T


def test_spec_vector():
    tokens = jnp.array([1, 88, 108, 109])
    ids = hashing.ngram_hash_ids(tokens, (3,), 1, 500002)
    assert ids.dtype == jnp.int32
    assert ids[:, 0].tolist() == [443987, 49195, 178009, 42221]


def test_published_cases():
    # One call per vocabulary computes every function and size: this pins the column order too.
    tokens = np.array(CASES[0]["tokens"])
    assert all(case["tokens"] == CASES[0]["tokens"] for case in CASES)
    sizes = sorted({case["n"] for case in CASES})
    num_functions = 1 + max(case["func"] for case in CASES)
    for vocab in sorted({case["vocab"] for case in CASES}):
        hash_ids = functools.partial(
            hashing.ngram_hash_ids, sizes=sizes, num_functions=num_functions, vocab=vocab
        )
        ids = np.asarray(jax.jit(hash_ids)(tokens))
        assert ids.shape == (*tokens.shape, num_functions * len(sizes))
        for case in (case for case in CASES if case["vocab"] == vocab):
            column = case["func"] * len(sizes) + sizes.index(case["n"])
            np.testing.assert_array_equal(ids[..., column], case["ids"], str(case)[:80])


@settings(max_examples=8, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 259), min_size=1, max_size=20),
    sizes=st.lists(st.integers(1, hashing.MAX_NGRAM), min_size=2, max_size=2),
    num_functions=st.integers(1, len(hashing.PRIMES)),
    vocab=st.one_of(st.integers(1, 2**28), st.sampled_from([1, 2**16, 2**24, 2**28])),
)
@example([4095] * 20, [hashing.MAX_NGRAM, 1], 11, 2**28)
@example([4095] * 20, [hashing.MAX_NGRAM, 2], 11, 2**28 - 1)
@example([4095] * 20, [8, 3], 11, 2**24 - 1)
@example([4095] * 20, [8, 3], 11, 2**16 - 1)
@example([259] * 20, [8, 3], 11, 2**16 + 1)
@example([259] * 20, [8, 3], 11, 2**24 + 1)
def test_equals_python_integers(tokens, sizes, num_functions, vocab):
    row = np.zeros(20, np.int32)  # One length, so that eager operations compile once.
    row[: len(tokens)] = tokens
    ids = hashing.ngram_hash_ids(jnp.asarray(row), sizes, num_functions, vocab)
    np.testing.assert_array_equal(ids, oracle(row, sizes, num_functions, vocab))


@pytest.mark.parametrize(
    "vocab", [8192, 2**16 + 1, 2**24 + 1, 2**28], ids=lambda vocab: f"{vocab} rows"
)
def test_ids_of_tokens_are_hashed_whole(vocab):
    """They have more than the 12 bits that are hashed at once."""
    num_ids = hashing.MAX_IDS
    row = np.random.default_rng(0).integers(0, num_ids, 24)
    row[:16], row[-2:] = num_ids - 1, [4095, 4096]
    sizes = (hashing.MAX_NGRAM, 2, 1)
    ids = hashing.ngram_hash_ids(jnp.asarray(row), sizes, 11, vocab, num_ids)
    np.testing.assert_array_equal(ids, oracle(row, sizes, 11, vocab))
    few = jnp.asarray(row % 4096)
    np.testing.assert_array_equal(
        hashing.ngram_hash_ids(few, sizes, 2, vocab, num_ids),
        hashing.ngram_hash_ids(few, sizes, 2, vocab),
    )


def test_any_leading_shape():
    tokens = jax.random.randint(jax.random.key(0), (2, 3, 10), 0, 260)
    ids = jax.jit(hashing.ngram_hash_ids, static_argnums=(1, 2, 3))(tokens, (3, 2), 2, 97)
    assert ids.shape == (2, 3, 10, 4)
    np.testing.assert_array_equal(ids[1, 2], oracle(np.asarray(tokens)[1, 2], (3, 2), 2, 97))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 1)])
def test_the_batch_stays_sharded(shape):
    if jax.device_count() < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} devices, {jax.device_count()} here")
    tokens = np.random.default_rng(0).integers(0, 260, (8, 16)).astype(np.int32)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=jax.devices()[: np.prod(shape)])
    rows = NamedSharding(mesh, P(("data", "fsdp"), None))
    hash_ids = functools.partial(hashing.ngram_hash_ids, **RELEASED)
    with jax.set_mesh(mesh):
        ids = jax.jit(hash_ids)(jax.device_put(tokens, rows))
    assert ids.sharding.spec == P(("data", "fsdp"), None, None)
    np.testing.assert_array_equal(np.asarray(ids)[7], oracle(tokens[7], *RELEASED.values()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_functions": 0}, "num_functions is 0"),
        ({"num_functions": 12}, "num_functions is 12"),
        ({"sizes": ()}, "sizes are"),
        ({"sizes": (3, 0)}, r"sizes are \(3, 0\)"),
        ({"sizes": (17, 3)}, r"sizes are \(17, 3\)"),
        ({"vocab": 0}, "vocab is 0"),
        ({"vocab": 2**28 + 1}, "vocab is 268435457"),
        ({"num_ids": 2**24 + 1}, "num_ids is 16777217"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        hashing.ngram_hash_ids(jnp.zeros((1, 4), jnp.int32), **(RELEASED | change))

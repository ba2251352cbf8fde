"""Distributions against NumPy, draws against distributions, and drafts that change neither."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from bltjax.inference import sampling
from bltjax.inference.sampling import GREEDY_BELOW, Sampling, leftover, row_keys, sampling_arrays
from bltjax.inference.self_speculation import accept
from bltjax.ops.slots import below
from bltjax.vocabulary import BYTE_OFFSET, EOS_ID, VOCAB_SIZE, is_drawable

DRAWS = 50_000
WITHOUT_BYTES = [i for i in range(BYTE_OFFSET) if i != EOS_ID]
distribution, draw = jax.jit(sampling.distribution), jax.jit(sampling.draw)
ALL = np.ones(VOCAB_SIZE, bool)


def expected_distribution(logits, chosen: Sampling, seen, allowed):
    """Probabilities float64 [V]; the steps one by one, of equals at a limit all are kept."""
    logits = logits.astype(np.float64)
    for i in np.flatnonzero(seen[BYTE_OFFSET:]) + BYTE_OFFSET:
        penalty = chosen.repetition_penalty
        logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
    logits[~allowed] = -np.inf
    logits[WITHOUT_BYTES] = -np.inf
    if chosen.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    p = np.exp((logits - logits.max()) / chosen.temperature)
    p /= p.sum()
    if chosen.top_k is not None:
        p = keep(p, p >= np.sort(p)[::-1][min(chosen.top_k, len(p)) - 1])
    if chosen.top_p not in (None, 1):
        taken, smallest = 0.0, 1.0
        for value in np.sort(p)[::-1]:
            if taken >= chosen.top_p or value == 0:
                break
            taken, smallest = taken + value, value
        p = keep(p, p >= smallest)
    if chosen.min_p is not None:
        p = keep(p, p >= p.max() * chosen.min_p)
    return p


def keep(p, kept):
    p = np.where(kept, p, 0)
    return p / p.sum()


def maybe(values):
    return st.none() | values


@given(
    # No sum of probabilities comes near these, no two logits near each other unless equal.
    chosen=st.builds(
        Sampling,
        # None makes a penalised logit equal to another one, which has one decimal.
        repetition_penalty=st.sampled_from([1.0, 1.2345, 0.8123, 1.9877]),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        top_k=maybe(st.sampled_from([1, 2, 7, 40, 300])),
        top_p=maybe(st.sampled_from([1e-6, 0.3137, 0.90123, 0.998765, 1.0])),
        min_p=maybe(st.sampled_from([1e-9, 0.0431, 0.7, 1.0])),
    ),
    spread=st.sampled_from([0.25, 1.0, 4.0]),
    num_allowed=st.sampled_from([VOCAB_SIZE, 30]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=120)
def test_distribution(chosen, spread, num_allowed, seed):
    rng = np.random.default_rng(seed)
    logits = np.float32(np.round(rng.normal(0, 4 * spread, VOCAB_SIZE), 1))
    seen = rng.random(VOCAB_SIZE) < 0.2
    allowed = np.isin(np.arange(VOCAB_SIZE), rng.permutation(VOCAB_SIZE)[:num_allowed])
    allowed[EOS_ID] = True
    log_p = distribution(logits, sampling_arrays([chosen]), seen, allowed)
    assert log_p.dtype == jnp.float32
    expected = expected_distribution(logits, chosen, seen, allowed)
    found = np.exp(np.asarray(log_p, np.float64))
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
def test_only_bytes_and_eos_can_be_drawn(temperature):
    logits = np.zeros(VOCAB_SIZE, np.float32)
    logits[WITHOUT_BYTES] = 50
    logits[EOS_ID] = 1
    chosen = sampling_arrays([Sampling(temperature=temperature)])
    p = np.exp(distribution(logits, chosen, ~ALL, ALL))
    assert not p[WITHOUT_BYTES].any()
    assert p.argmax() == EOS_ID and p[EOS_ID] == (1 if temperature < 1 else p.max())


def test_no_limit_takes_nothing_away():
    """Rounding in sums of probabilities must not cut the tail where only another limit is set."""
    chosen = sampling_arrays([Sampling(temperature=1, min_p=1e-30)])
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 3, VOCAB_SIZE).astype(np.float32)
        drawable = np.isfinite(distribution(logits, chosen, ~ALL, ALL)).sum()
        assert drawable == VOCAB_SIZE - len(WITHOUT_BYTES)


def test_rows_of_a_batch_are_their_own():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 3, VOCAB_SIZE)).astype(np.float32)
    seen = rng.random(logits.shape) < 0.1
    chosen = sampling_arrays([Sampling(1.5, 0.7, 20, 0.9, 0.01)])
    found = distribution(logits, chosen, seen, np.ones_like(seen))
    for i in np.ndindex(2, 3):
        np.testing.assert_allclose(found[i], distribution(logits[i], chosen, seen[i], ALL), 1e-6)


SMALL, LARGE = (1e-45, 1e-300, 5e-324), (1e30, 1e38, 1e300)
ROWS, SCALES = (1, 2, 8, 32), (1e-3, 1.0, 15.0, 1e6, 1e38)


@jax.jit
def draw_rows(logits, chosen, seeds):
    seen = (jnp.arange(logits.size) % 3 == 0).reshape(logits.shape)
    log_p = sampling.distribution(logits, chosen, seen, jnp.ones_like(seen))
    ids = sampling.draw(log_p, row_keys(seeds))
    return log_p, ids, sampling.distribution(logits, greedy_like(chosen), seen, jnp.ones_like(seen))


def greedy_like(chosen):
    return sampling_arrays([Sampling()])._replace(repetition_penalty=chosen.repetition_penalty)


@pytest.mark.parametrize("rows", ROWS)
def test_extreme_temperatures_draw_what_they_mean(rows):
    """Logits of all scales, with NaN and infinities among them or without."""
    rng = np.random.default_rng(rows)
    seeds = jnp.arange(rows, dtype=jnp.uint32)
    filters = (
        {},
        dict(repetition_penalty=1e-6, top_k=2**40, top_p=1e-45, min_p=1e-300),
        dict(repetition_penalty=1e6, top_k=5, top_p=1 - 1e-12, min_p=1.0),
    )
    for scale in SCALES:
        logits = (rng.normal(size=(rows, VOCAB_SIZE)) * scale).clip(-3e38, 3e38)
        broken = logits.copy()
        broken[rng.random(broken.shape) < 0.02] = math.nan
        broken[rng.random(broken.shape) < 0.02] = math.inf
        broken[rng.random(broken.shape) < 0.02] = -math.inf
        broken[-1] = math.nan
        for values in (logits, broken):
            for temperature in (
                *SMALL,
                1e-12,
                1e-8,
                0.99 * GREEDY_BELOW,
                GREEDY_BELOW,
                1.0,
                *LARGE,
            ):
                for options in filters:
                    chosen = sampling_arrays([Sampling(temperature=temperature, **options)])
                    found = draw_rows(values.astype(np.float32), chosen, seeds)
                    log_p, ids, greedy = map(np.asarray, found)
                    assert not np.isnan(log_p).any()
                    assert (log_p.max(axis=-1) > -math.inf).all()
                    assert (log_p[:, WITHOUT_BYTES] == -math.inf).all()
                    assert is_drawable(ids).all()
                    if temperature < GREEDY_BELOW:
                        np.testing.assert_array_equal(log_p, greedy)
                        np.testing.assert_array_equal(ids, greedy.argmax(axis=-1))


def test_large_temperatures_draw_evenly():
    logits = np.random.default_rng(0).normal(0, 20, VOCAB_SIZE).astype(np.float32)
    drawable = is_drawable(np.arange(VOCAB_SIZE))
    for temperature in LARGE:
        log_p = distribution(
            logits, sampling_arrays([Sampling(temperature=temperature)]), ~ALL, ALL
        )
        np.testing.assert_allclose(np.exp(log_p), drawable / drawable.sum(), rtol=1e-5)


@pytest.mark.parametrize("top_p", [*SMALL, 1e-9, 1 - 1e-6, 1 - 1e-12, np.float32(0.5)])
def test_shares_that_float32_does_not_hold(top_p):
    """The tail that top_p leaves out is cut where its exact sum says so."""
    p = np.array([0.6, 0.4 - 1.1e-6, 1e-6, 1e-7])
    logits = np.full(VOCAB_SIZE, -1e30, np.float32)
    logits[BYTE_OFFSET : BYTE_OFFSET + 4] = np.log(p)
    log_p = distribution(logits, sampling_arrays([Sampling(temperature=1, top_p=top_p)]), ~ALL, ALL)
    before = np.cumsum(p) - p
    np.testing.assert_array_equal(
        np.isfinite(log_p)[BYTE_OFFSET : BYTE_OFFSET + 4], before < float(top_p)
    )


def test_where_nothing_is_allowed_the_text_ends():
    for temperature in (0.0, 1.0):
        chosen = sampling_arrays([Sampling(temperature=temperature)])
        p = np.exp(distribution(np.zeros(VOCAB_SIZE, np.float32), chosen, ~ALL, ~ALL))
        assert p[EOS_ID] == 1 == p.sum()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sampling)])
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1, "1", b"1", [1], 1j, np.int64(-3), -(2**40)]
)
def test_no_option_takes_what_is_no_number_of_its_kind(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* must be "):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "top_k"])
def test_true_is_no_number(name):
    for value in (True, np.True_):
        with pytest.raises(ValueError, match=f"{name}=True must be "):
            Sampling(**{name: value})


@pytest.mark.parametrize("penalty", [*SMALL, *LARGE, 2**40])
def test_penalties_that_overflow_are_refused(penalty):
    with pytest.raises(ValueError, match=r"repetition_penalty=.* from 1e-06 to 1e"):
        Sampling(repetition_penalty=penalty)


def test_numbers_of_numpy_are_numbers():
    assert Sampling(np.float32(1.5), np.array(0.5), np.int64(3), np.float16(0.5)) == Sampling(
        1.5, 0.5, 3, 0.5
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=-0.5), "temperature=-0.5 must be a number 0 or more"),
        (dict(temperature=math.inf), "temperature=inf must be"),
        (dict(temperature=math.nan), "temperature=nan must be"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0 must be a number above 0"),
        (dict(top_p=0.0), "top_p=0.0 must be a number above 0, at most 1"),
        (dict(top_p=1.5), "top_p=1.5 must be a number above 0, at most 1"),
        (dict(min_p=-1.0), "min_p=-1.0 must be a number above 0, at most 1"),
        (dict(top_k=0), "top_k=0 must be a whole number from 1, or None"),
        (dict(top_k=2.5), "top_k=2.5 must be a whole number from 1, or None"),
    ],
)
def test_errors_name_the_value_and_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Sampling(**settings)


def test_other_values_compile_nothing():
    for value in (0.5, 0.7):
        distribution(
            np.zeros(VOCAB_SIZE, np.float32),
            sampling_arrays([Sampling(temperature=value)]),
            ALL,
            ALL,
        )
        if value == 0.5:
            compiled = distribution._cache_size()
    assert distribution._cache_size() == compiled
    assert len(sampling_arrays([Sampling()])) == len(dataclasses.fields(Sampling))


def assert_drawn_from(counts, p):
    """Pearson's test: counts of ids [V] at odds of 1 to 10,000 against the probabilities p [V]."""
    expected = counts.sum() * p
    assert counts[p == 0].sum() == 0
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = (x[expected > 0] for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(1 - 1e-4, max(len(counts) - 1, 1))


@pytest.mark.parametrize("chosen", [Sampling(temperature=0.9), Sampling(1.2, 1.3, 50, 0.9, 0.02)])
def test_draws(chosen):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, VOCAB_SIZE).astype(np.float32)
    seen = rng.random(VOCAB_SIZE) < 0.3
    log_p = distribution(logits, sampling_arrays([chosen]), seen, ALL)
    keys = row_keys(jnp.arange(DRAWS, dtype=jnp.uint32), jnp.full(DRAWS, 7))
    ids = draw(jnp.broadcast_to(log_p, (DRAWS, VOCAB_SIZE)), keys)
    assert ids.dtype == jnp.int32
    expected = expected_distribution(logits, chosen, seen, ALL)
    assert_drawn_from(np.bincount(ids, minlength=VOCAB_SIZE), expected)


def test_a_row_draws_the_same_in_any_batch():
    log_p = jnp.zeros((8, VOCAB_SIZE))
    seeds, numbers = jnp.arange(8, dtype=jnp.uint32), jnp.arange(8) * 3
    ids = draw(log_p, row_keys(seeds, numbers))
    order = np.array([5, 2, 7])
    alone = draw(log_p[:3], row_keys(seeds[order], numbers[order]))
    np.testing.assert_array_equal(alone, ids[order])
    others = [row_keys(seeds + 1, numbers), row_keys(seeds, numbers + 1)]
    assert all((draw(log_p, keys) != ids).any() for keys in others)


def random_p(rng, *shape):
    """Probabilities, some of them 0."""
    p = rng.dirichlet(np.full(shape[-1], 0.7), shape[:-1]) * (rng.random(shape) < 0.8)
    p[..., 0] += 0.01
    return p / p.sum(-1, keepdims=True)


def log(p):
    with np.errstate(divide="ignore"):
        return np.log(p).astype(np.float32)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_what_is_taken_and_what_is_left_over_make_the_target(seed):
    rng = np.random.default_rng(seed)
    target, draft = random_p(rng, 2, 9)
    taken = np.minimum(target, draft)
    left = np.exp(np.asarray(leftover(log(target), log(draft)), np.float64))
    np.testing.assert_allclose(left.sum(), 1, atol=1e-5)
    np.testing.assert_allclose(taken + (1 - taken.sum()) * left, target, atol=1e-6)


def test_nothing_is_left_over_where_both_agree():
    p = log(random_p(np.random.default_rng(0), 9))
    np.testing.assert_array_equal(leftover(p, p), p)


@pytest.mark.parametrize("greedy", [False, True])
def test_drafts_leave_the_target_distribution(greedy):
    """Two ids in a row, each probable after the one before; some rows draft one id, or none.

    As many drafts stand as can: with probability sum of min(target, draft).
    """
    vocab, num_drafts = 7, 2
    rng = np.random.default_rng(0)
    target_p, draft_p = random_p(rng, 2, vocab + 1, vocab)  # after each id; first, after none
    if greedy:
        target_p = np.eye(vocab)[target_p.argmax(-1)]
    after = {name: jnp.asarray(log(p)) for name, p in dict(t=target_p, d=draft_p).items()}

    @jax.jit
    def run(seeds, drafts):
        first, none = jnp.zeros_like(drafts), jnp.full_like(drafts, vocab)
        ids = [none]
        for i in range(num_drafts):
            ids.append(draw(after["d"][ids[-1]], row_keys(seeds, first + i, first + 11)))
        before = jnp.stack(ids, axis=1)
        accepted, left = accept(
            before[:, 1:],
            after["t"][before],
            after["d"][before[:, :-1]],
            below(drafts, num_drafts),
            seeds,
            first,
            first,
        )
        return before[:, 1:], accepted, draw(left, row_keys(seeds, first + 3, first + 12))

    drafts = np.arange(DRAWS, dtype=np.int32) % (num_drafts + 1)
    ids, accepted, drawn = map(np.asarray, run(np.arange(DRAWS, dtype=np.uint32), drafts))
    assert ((accepted >= 0) & (accepted <= drafts)).all()
    for number in range(num_drafts + 1):
        rows = drafts == number
        first_id = np.where(accepted > 0, ids[:, 0], drawn)[rows]
        assert_drawn_from(np.bincount(first_id, minlength=vocab), target_p[-1])
    second = np.where(accepted > 1, ids[:, 1], drawn)
    for id_ in range(vocab):
        found = second[(accepted > 0) & (ids[:, 0] == id_)]
        if len(found):
            assert_drawn_from(np.bincount(found, minlength=vocab), target_p[id_])
    stood = (accepted > 0)[drafts > 0]
    most = np.minimum(target_p[-1], draft_p[-1]).sum()
    assert abs(stood.mean() - most) < 5 * math.sqrt(most * (1 - most) / len(stood)) + 1e-9

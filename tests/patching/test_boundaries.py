"""Patch starts against published patch lengths, and the properties every rule must have."""

import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import vocabulary
from bltjax.config import PatchingConfig
from bltjax.patching import boundaries
from bltjax.patching.boundaries import RULES, check_rule, patch_starts
from bltjax.vocabulary import encode

GOLDEN = pathlib.Path(__file__).parents[1] / "golden_data" / "golden"
CASES = json.loads((GOLDEN / "meta_tokenizer_hash_patch_cases.json").read_text())["patch"]
RELEASED_THRESHOLD = 1.335442066192627

# Every rule, and settings that change what a rule does: what holds for all must hold for these.
CONFIGS = {name: PatchingConfig(name, threshold=1.0, threshold_add=0.5) for name in RULES} | {
    "entropy, at most 3": PatchingConfig(threshold=1.5, max_patch_length=3),
    "published global_monotonic": PatchingConfig(
        "global_monotonic", threshold=0.5, published_skip_at_3=True
    ),
    "space, at most 2": PatchingConfig("space", max_patch_length=2),
    "falling, at most 3": PatchingConfig("falling", threshold=2.5, max_patch_length=3),
}

S = 16
# Few values, so that entropies often equal a threshold and each other.
ENTROPIES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 2.25]), min_size=S, max_size=S)
INTERESTING = [[0], [1], [2], [3]] + [[b + 4] for b in b" .\nazAZ09@[`{/:\x7f\x80\xbf\xc0\xff"]
INTERESTING += [[b + 4 for b in c.encode()] for c in "\u00e9\u043c\u5b57\U0001f600"] * 2
TOKENS = st.lists(st.sampled_from(INTERESTING), min_size=S, max_size=S).map(
    lambda characters: list(itertools.chain(*characters))[:S]
)


def starts_of(rule, tokens=None, entropies=None, **settings):
    """Starts under a rule; any tokens will do where only the entropies matter."""
    tokens = np.zeros_like(entropies, int) if tokens is None else tokens
    return patch_starts(PatchingConfig(rule, **settings), tokens, entropies)


def padded_lengths(starts):
    """Patch lengths [B][P] of starts [B, S'], zeros on the right."""
    rows = [boundaries.lengths_from_starts(row).tolist() for row in starts]
    return [row + [0] * (max(map(len, rows)) - len(row)) for row in rows]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_published_cases(case):
    args = dict(case["args"])
    rule = case["mode"]
    if args.pop("monotonicity", False):
        rule = "monotonic"
    elif "threshold_add" in args:
        rule = "global_monotonic"
    tokens = np.array(case["tokens"])
    entropies = np.array(case["entropies"], np.float32) if "entropies" in case else None
    starts = starts_of(rule, tokens, entropies, published_skip_at_3=True, **args)
    assert starts.dtype == bool
    if not case["include_next_token"]:
        starts = starts[:, :-1]
    assert padded_lengths(starts) == case["patch_lengths"]


def test_published_entropy_model():
    golden = np.load(GOLDEN / "meta_entropy.npz")
    threshold = float(golden["threshold"])
    starts = starts_of("entropy", entropies=golden["entropies"], threshold=threshold)
    assert padded_lengths(starts) == golden["patch_lengths_next"].tolist()
    assert padded_lengths(starts[:, :-1]) == golden["patch_lengths_nonext"].tolist()
    flattened = golden["entropies_calculate_entropies_flattened"]
    starts = starts_of("entropy", entropies=flattened, threshold=threshold)
    assert padded_lengths(starts) == golden["patch_lengths_next_flattened"].tolist()


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(tokens=TOKENS, entropies=ENTROPIES)
def test_rules_are_causal(name, tokens, entropies):
    """The starts of a prefix are a prefix of the starts."""
    config = CONFIGS[name]
    tokens, entropies = np.array(tokens), np.array(entropies, np.float32)
    starts = patch_starts(config, tokens, entropies)
    assert starts.shape == (S + 1,)
    assert starts[:2].all()
    for i in range(1, S):
        prefix = patch_starts(config, tokens[:i], entropies[:i])
        np.testing.assert_array_equal(prefix, starts[: i + 1])


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=10, deadline=None)
@given(tokens=TOKENS, entropies=ENTROPIES)
def test_numpy_and_jax_agree(name, tokens, entropies):
    config = CONFIGS[name]
    tokens = np.array([tokens, tokens[::-1]], np.int32)
    entropies = np.array([entropies, entropies[::-1]], np.float32)
    on_host = patch_starts(config, tokens, entropies)
    on_device = patch_starts(config, jnp.asarray(tokens), jnp.asarray(entropies))
    assert isinstance(on_host, np.ndarray)
    assert isinstance(on_device, jnp.ndarray)
    assert on_host.dtype == on_device.dtype == bool
    np.testing.assert_array_equal(on_host, on_device)


@settings(max_examples=50, deadline=None)
@given(entropies=ENTROPIES, threshold=st.sampled_from([0.0, 0.5, 1.0, 1.5]))
def test_entropy_rules_against_loops(entropies, threshold):
    """The table of model.md#rules, position by position."""
    h = np.array(entropies, np.float32)
    rest = range(3, S + 1)
    expected = [h[s - 1] > threshold for s in range(2, S + 1)]
    assert starts_of("entropy", entropies=h, threshold=threshold)[2:].tolist() == expected
    rises = {s: h[s - 1] - h[s - 2] for s in rest}
    expected = [True] + [rises[s] > threshold for s in rest]
    assert starts_of("monotonic", entropies=h, threshold=threshold)[2:].tolist() == expected
    expected = [True] + [h[s - 1] > threshold and rises[s] > 0.5 for s in rest]
    both = functools.partial(
        starts_of, "global_monotonic", entropies=h, threshold=threshold, threshold_add=0.5
    )
    assert both()[2:].tolist() == expected
    expected[1] = False
    assert both(published_skip_at_3=True)[2:].tolist() == expected


@settings(max_examples=50, deadline=None)
@given(entropies=ENTROPIES, threshold=st.sampled_from([-1.0, 0.0, 1.0, 2.0, 4.5, 7.0, 1e9]))
def test_falling_against_a_loop(entropies, threshold):
    h, expected, last = np.array(entropies, np.float32), [0, 1], 1
    for s in range(2, S + 1):
        if h[s - 1] > threshold * 4096 // (s - last) / 4096:
            expected.append(s)
            last = s
    found = starts_of("falling", entropies=h, threshold=threshold)
    assert np.flatnonzero(found).tolist() == expected


def test_even_patches_of_even_entropies():
    """Where the score is the same at each byte, four times as hard is half as long."""
    easy, hard = np.full(400, 0.25, np.float32), np.full(400, 1.0, np.float32)
    lengths = [
        boundaries.lengths_from_starts(starts_of("falling", entropies=h, threshold=3.875))[2:-1]
        for h in (easy, hard)
    ]
    assert set(lengths[0]) == {16} and set(lengths[1]) == {4}


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_a_falling_threshold_goes_on_with_an_open_patch(array):
    h = np.random.default_rng(0).uniform(0, 3, (2, 40)).astype(np.float32)
    config = PatchingConfig("falling", threshold=6.0)
    whole = patch_starts(config, np.zeros((2, 40), int), h)
    places = np.broadcast_to(np.arange(40), (2, 40))
    for cut in (1, 7, 20):
        opened = cut - np.maximum.accumulate(np.where(whole, np.arange(41), 0), axis=1)[:, cut]
        rest = boundaries.starts_after(
            config, array(places), array(h[:, cut:]), array(places[:, cut:]), True, array(opened)
        )
        np.testing.assert_array_equal(rest, whole[:, cut + 1 :])


def test_the_threshold_is_strict_and_compared_in_float32():
    # 1e-5 is below half a float16 step here: a comparison in float16 would find the two equal.
    entropies = np.full(4, 1.335, np.float16)
    threshold = float(entropies[0])
    assert not starts_of("entropy", entropies=entropies, threshold=threshold)[2:].any()
    for array in (entropies, jnp.asarray(entropies)):
        assert starts_of("entropy", array, array, threshold=threshold - 1e-5)[2:].all()


def test_shortest_rows():
    for name, config in CONFIGS.items():
        starts = patch_starts(config, np.ones(1, int), np.ones(1, np.float32))
        assert starts.tolist() == [True, True], name


def test_space_starts_on_text():
    tokens = vocabulary.encode("Hi, caf\u00e9 x2!", add_eos=False)
    starts = starts_of("space", tokens.astype(np.uint16))
    pieces = np.split(tokens, np.flatnonzero(starts)[1:])
    assert [vocabulary.decode(piece) for piece in pieces] == [
        b"",
        b"Hi,",
        b" caf\xc3",  # A leading byte is not a continuation: it ends the word before it.
        b"\xa9 ",
        b"x2!",
        b"",
    ]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_space_starts_for_every_pair_of_bytes(dtype):
    ids = np.arange(vocabulary.VOCAB_SIZE)
    is_word = [chr(i - 4).isalnum() and i < 132 if i >= 4 else False for i in ids]
    outside = np.array(
        [not word and not 132 <= i < 196 for i, word in zip(ids, is_word, strict=True)]
    )
    before, last = (grid.ravel() for grid in np.meshgrid(ids, ids, indexing="ij"))
    tokens = np.stack([np.ones_like(before), before, last], axis=-1).astype(dtype)
    expected = outside[last] & ~outside[before] | (last < 4)
    np.testing.assert_array_equal(starts_of("space", tokens)[:, 3], expected)


def test_static_starts():
    tokens = np.zeros(9, int)
    lengths = boundaries.lengths_from_starts(starts_of("static", tokens, patch_size=4))
    assert lengths.tolist() == [1, 3, 4, 2]
    assert starts_of("static", tokens, patch_size=1).all()
    for wrong in (4.5, 0):
        with pytest.raises(ValueError, match=f"patch_size is {wrong}"):
            starts_of("static", tokens, patch_size=wrong)


def test_bpe_delimiter_is_the_last_byte_of_its_patch():
    tokens = np.array([1, 101, 3, 102, 103, 3])
    starts = starts_of("bpe", tokens)
    assert boundaries.lengths_from_starts(starts[:-1]).tolist() == [1, 2, 3]
    assert boundaries.lengths_from_starts(starts).tolist() == [1, 2, 3, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=S, max_size=S), st.integers(1, S + 2))
def test_limit_patch_length_against_a_loop(flags, limit):
    starts = np.array([True, *flags])
    expected = []
    for length in boundaries.lengths_from_starts(starts).tolist():
        while length > 0:
            expected.append(min(length, limit))
            length -= limit
    limited = boundaries.limit_patch_length(starts, limit)
    assert boundaries.lengths_from_starts(limited).tolist() == expected
    np.testing.assert_array_equal(limited, boundaries.limit_patch_length(jnp.array(starts), limit))


@given(st.lists(st.booleans(), min_size=0, max_size=S))
def test_lengths_sum_to_the_positions(flags):
    starts = np.array([True, *flags])
    lengths = boundaries.lengths_from_starts(starts)
    assert lengths.dtype == np.int32
    assert lengths.min() >= 1
    assert lengths.sum() == starts.size
    np.testing.assert_array_equal(np.cumsum(lengths) - lengths, np.flatnonzero(starts))


@pytest.mark.parametrize(
    ("text", "patches"),
    [
        ("ab12 cd", "ab1|2 |c|d"),
        ("мир, 42!", "мир,| |4|2!|"),
        ("naïve café", "naïve |c|afé"),
        ("abмир日本語かな한글", "abм|ир日|本語か|な한|글"),  # noqa: RUF001
        ("عربي עברית ελ", "عربي |ע|ברית |ε|λ"),
        ("ok👍🏽!x", "ok👍|🏽!|x|"),
    ],
)
def test_script_starts_after_the_first_character_of_another_script(text, patches):
    """That character ends the patch before it, as a start depends on earlier bytes alone."""
    starts = starts_of("script", encode(text, add_eos=False))[1:]  # of each byte, and the end
    cuts = np.flatnonzero(starts)[1:]
    pieces = np.split(np.frombuffer(text.encode(), np.uint8), cuts)
    assert "|".join(piece.tobytes().decode() for piece in pieces) == patches


def test_script_starts_of_bytes_that_are_no_text():
    """They go with what is before them; the next character is of another class."""
    ids = encode(b"ab\xff\x80cd\xc3", add_eos=False)
    assert np.flatnonzero(starts_of("script", ids)).tolist() == [0, 1, 6]


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_segments(array):
    tokens = array([[1, 101, 14, 14, 102, 2, 1, 103]])
    documents = boundaries.document_segments(tokens)
    lines = boundaries.newline_segments(tokens)
    assert documents.dtype == lines.dtype == np.int32
    assert documents.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]]
    assert lines.tolist() == [[0, 0, 0, 1, 2, 2, 3, 3]]


@pytest.mark.parametrize("rule", ["entropy", "monotonic", "global_monotonic", "falling"])
def test_missing_entropies(rule):
    with pytest.raises(ValueError, match=f"'{rule}' needs the entropies .* run the entropy model"):
        starts_of(rule, np.ones(4, int))


def test_bad_settings():
    with pytest.raises(ValueError, match=r"rule='spaces' is unknown: choose one of .*, space,"):
        starts_of("spaces", np.ones(4, int))
    with pytest.raises(ValueError, match="max_patch_length is 0"):
        starts_of("byte", np.ones(4, int), max_patch_length=0)


def test_only_a_rule_of_one_threshold_reaches_a_mean_patch():
    for name in RULES:
        check_rule(PatchingConfig(name, target_patch_bytes=None))
        if name != "global_monotonic":
            check_rule(PatchingConfig(name, target_patch_bytes=4.5))
    wrong = r"target_patch_bytes=4\.5 .* patching\.rule='global_monotonic', .* threshold_add"
    with pytest.raises(ValueError, match=wrong):
        check_rule(PatchingConfig("global_monotonic", target_patch_bytes=4.5))


def test_data_workers_do_not_load_jax():
    program = """
import sys, numpy as np
from bltjax.patching import boundaries, calibrate
from bltjax.config import PatchingConfig
for rule in boundaries.RULES:
    config = PatchingConfig(rule, max_patch_length=2)
    starts = boundaries.patch_starts(config, np.ones(8, int), np.ones(8))
    boundaries.lengths_from_starts(starts)
assert "jax" not in sys.modules
"""
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


@given(st.lists(st.floats(0, 6, width=32), min_size=1, max_size=40))
def test_bf16_compat_compares_as_the_published_demo_does(values):
    """Both sides rounded: the released threshold means H >= 1.34375 there (model.md#rounding)."""
    entropies = np.array([1.3354420, 1.3359375, 1.340, 1.3437, 1.344, *values], np.float32)
    config = PatchingConfig(target_patch_bytes=None, bf16_compat=True)
    tokens = np.full(entropies.shape, 65, np.int32)
    rounded = entropies.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = np.concatenate([[True, True], rounded[1:] >= 1.34375])
    np.testing.assert_array_equal(patch_starts(config, tokens, entropies), expected)
    on_device = patch_starts(config, jnp.asarray(tokens), jnp.asarray(entropies))
    np.testing.assert_array_equal(np.asarray(on_device), expected)

"""What callers ask: stop strings and numbers of any kind, memory, and settings of JAX."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from bltjax import sharding, vocabulary
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    HashConfig,
    PatchingConfig,
    TransformerConfig,
)
from bltjax.evaluation.score import BLTScoring, score_documents
from bltjax.inference import engine, jobs, loops, memory
from bltjax.inference.decoders import BLTDecoder, for_generation
from bltjax.inference.requests import configure, make_requests
from bltjax.inference.sampling import Sampling
from bltjax.model import functional
from bltjax.runtime import free_memory
from tests.inference.test_engine import Tiny


@pytest.fixture(scope="module")
def tiny():
    return Tiny("meta_A_1b_like")


def stops(tiny, stop):
    return configure(tiny._decoder(), Sampling(), stop)[1]


@pytest.mark.parametrize(
    "stop, expected",
    [
        (b"s\xff", [b"s\xff"]),
        ("s\udcff", [b"s\xff"]),  # as it comes from a command line
        ("\udcc3\udca9", ["é".encode()]),  # the same in a C locale
        (["é", b"\x00", bytearray(b"x"), memoryview(b"y")], ["é".encode(), b"\x00", b"x", b"y"]),
        ((), []),
    ],
)
def test_stop_strings_are_the_bytes_that_were_typed(tiny, stop, expected):
    assert stops(tiny, stop) == expected


@pytest.mark.parametrize(
    "stop", ["", b"", ["a", b""], "\ud800", ["a\udfffb"], None, 5, [5], [None]]
)
def test_what_ends_no_text_is_refused(tiny, stop):
    with pytest.raises(ValueError, match=r"^stop (holds|is)"):
        stops(tiny, stop)


def test_prompts_are_the_bytes_that_were_typed(tiny):
    for prompt in (b"s\xff", "s\udcff", bytearray(b"s\xff"), memoryview(b"s\xff")):
        (request,) = make_requests(tiny._decoder(), [prompt], 1, 0, None)
        assert vocabulary.decode(request.ids) == b"s\xff"


@pytest.mark.parametrize("name", ["max_new_bytes", "seed"])
@pytest.mark.parametrize(
    "value",
    [
        -1,
        2**64,
        -(2**40),
        10**400,
        pytest.param(10**5000, id="5001 digits"),
        1.0,
        True,
        np.True_,
        "5",
        "55",
        b"5",
        None,
        [2, None],
    ],
)
def test_numbers_of_requests_are_whole_and_fit(tiny, name, value):
    numbers = dict(max_new_bytes=1, seed=0) | {name: value}
    with pytest.raises(ValueError, match=f"{name}=.{{1,80}} must be a whole number from 0, below"):
        make_requests(tiny._decoder(), [b"a", b"b"], **numbers, trained=None)


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), [3, 3], np.array([3, 3]), np.array(3)])
def test_whole_numbers_of_numpy_are_whole_numbers(tiny, value):
    requests = make_requests(tiny._decoder(), [b"a", b"b"], value, value, None)
    assert [request[1:] for request in requests] == [(3, 3), (3, 3)]


@pytest.mark.parametrize("value", [True, "1", 1.5, 10**400, -1, None])
@pytest.mark.parametrize("name", ["batch_size", "max_drafts", "quorum", "min_patch_bytes"])
def test_options_of_speed_are_numbers_of_their_kind(name, value):
    allowed = (name, value) in [
        ("min_patch_bytes", 1.5),
        ("batch_size", 10**400),
        ("min_patch_bytes", 10**400),
    ]
    with (
        contextlib.nullcontext()
        if allowed
        else pytest.raises(ValueError, match=f"{name}=.* must be")
    ):
        jobs.Decoding(**{name: value})


@pytest.mark.parametrize("threshold", [True, "1", float("inf"), float("nan"), [1.0]])
def test_a_threshold_is_a_finite_number(tiny, threshold):
    with pytest.raises(ValueError, match=r"threshold=.* must be finite"):
        configure(tiny._decoder(), Sampling(), threshold=threshold)
    for large in (1e300, 10**400):
        assert configure(tiny._decoder(), Sampling(), threshold=large)[0].patching.threshold > 1e38


@pytest.mark.parametrize("drafts", [0, 3])
def test_more_than_memory_holds_is_refused_before_anything_is_allocated(tiny, monkeypatch, drafts):
    monkeypatch.setattr(loops, "new_reading", None)
    texts = [b"abc", b"a"]
    with pytest.raises(ValueError, match=r"max_new_bytes=1073741823 .* one has 1073741824 at most"):
        tiny.generate(texts, 2**30 - 1, max_drafts=drafts)
    said = r"max_new_bytes=1073741000 after a prompt of 4 ids needs \d+\.\d GiB .* are free: lower"
    with pytest.raises(ValueError, match=said):
        tiny.generate(texts, 2**30 - 824, max_drafts=drafts)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"max_new_bytes=5000 after a prompt of 4 ids needs .*GiB"):
        tiny.generate(texts, [5000, 7])


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:   50 kB\n")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_LIMITS", (limit, tmp_path / "missing"))
    (device,) = jax.devices()[:1]
    for text, expected in (("max\n", 50 * 1024), ("7000\n", 7000)):
        limit.write_text(text)
        assert free_memory.free_bytes(device) == expected
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "missing")
    limit.unlink()
    assert free_memory.free_bytes(device) is None


@contextlib.contextmanager
def strictest_jax():
    """64-bit numbers, no implicit promotion of types or ranks, and NaN is an error."""
    promotion = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with jax.enable_x64(True), jax.debug_nans(True), promotion[0], promotion[1]:
        yield


@pytest.mark.slow
def test_settings_of_jax_change_nothing():
    """Drafts run all that plain decoding runs; the second text is done before the first."""
    stack = TransformerConfig(dim=8, num_layers=1, num_heads=1, window=4, ffn_multiple_of=8)
    config = BLTConfig(
        stack, dataclasses.replace(stack, window=None), stack, hash=HashConfig((3,), vocab=11)
    )
    config = dataclasses.replace(config, cross_attention=CrossAttentionConfig(num_heads=1))
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        params = functional.init(config, jax.random.key(0))
        patching = PatchingConfig(rule="space")
        scoring = BLTScoring(config, params, None, None, patching)
        sampling = Sampling(1.1, 0.8, 50, 0.9, 0.01, valid_utf8=True)
        decoder = BLTDecoder(config, None, patching)

        def run():
            requests = make_requests(decoder, [b"a b", "日本".encode()], [9, 3], [1, 2], None)
            texts, _ = engine.generate(
                decoder,
                for_generation(decoder, dict(blt=params)),
                requests,
                sampling,
                [b"\xff"],
                jobs.Decoding(max_drafts=2),
            )
            return texts, score_documents(scoring, [b"a b", b"\xff" * 70])

        expected = run()
        with strictest_jax():
            assert run() == expected

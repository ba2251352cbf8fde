"""Cached generation against recomputation, byte for byte, and all that is around it."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import bltjax
from bltjax import sharding
from bltjax.checkpoints.weights import Lengths
from bltjax.config import MeshConfig, PatchingConfig
from bltjax.evaluation.text_model import TextModel
from bltjax.inference.decoders import BLTDecoder, for_generation
from bltjax.inference.loops import decode, read
from bltjax.model import functional
from bltjax.patching.boundaries import patch_starts
from bltjax.patching.entropy import next_byte_entropy
from bltjax.vocabulary import encode
from tests import golden
from tests.inference.reference import generate_by_recompute

PATCHING = PatchingConfig(threshold=float(golden.arrays("meta_entropy")["threshold"]))
TEXTS = "The quick brown fox", "naïve café", "日本語のテキスト", "Привет, мир", "if x:\n  y"
MODELS = "meta_A_1b_like", "meta_B_7b_like"


def prompts(count: int, seed: int = 0, window: int = 8) -> list[bytes]:
    """Empty, one byte, of several scripts, random, longer than the window, half characters."""
    rng = np.random.default_rng(seed)
    kinds = (
        lambda: b"",
        lambda: rng.bytes(1),
        lambda: rng.choice(TEXTS).encode(),
        lambda: rng.bytes(int(rng.integers(2, 30))),
        lambda: (" ".join(rng.permutation(TEXTS)) * 2).encode()[: int(window * rng.uniform(3, 4))],
        lambda: "é".encode()[:1] + "語".encode()[: int(rng.integers(1, 3))],
    )
    return [kinds[i % len(kinds)]() for i in range(count)]


class Tiny(TextModel):
    """A golden model with the options of `Model.generate`, on the mesh that is set."""

    def __init__(self, name: str, patching: PatchingConfig = PATCHING):
        self.config, self.entropy_config = golden.blt_config(name), golden.entropy_config()
        self.patching = patching
        self.params = dict(blt=golden.params(name), entropy_model=golden.params("meta_entropy"))

    @classmethod
    def loaded(cls, directory):
        """The models of a directory, in the place of golden ones."""
        model, self = bltjax.load(directory, mesh=jax.sharding.get_mesh()), cls.__new__(cls)
        self.config, self.entropy_config = model.config, model.entropy_config
        self.patching, self.params = model.patching, model.params
        return self

    lengths = Lengths(row_bytes=2**30)
    mesh = property(lambda self: jax.sharding.get_mesh())
    _generation_params = property(lambda self: for_generation(self._decoder(), self.params))
    generate = TextModel.generate_and_count

    def _decoder(self):
        return BLTDecoder(self.config, self.entropy_config, self.patching)

    _scoring = None  # nothing is scored here

    def recompute(self, text, max_new_bytes, **options):
        models = self.config, self.params["blt"], self.entropy_config, self.params["entropy_model"]
        return generate_by_recompute(
            *models, self.patching, text, max_new_bytes=max_new_bytes, **options
        )


@pytest.fixture(scope="module")
def tiny():
    return Tiny("meta_A_1b_like")


def check_exact(model, texts, max_new_bytes, options):
    """Alone and in random batches, each text is that of the oracle."""
    expected = [model.recompute(text, max_new_bytes) for text in texts]
    order = np.random.default_rng(1).permutation(len(texts))
    for chosen in options:
        found, _ = model.generate([texts[i] for i in order], max_new_bytes, **chosen)
        assert found == [expected[i] for i in order], chosen


@pytest.mark.long
@pytest.mark.parametrize("name", [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)])
def test_greedy_text_is_that_of_recomputation(name):
    check_exact(Tiny(name), prompts(8), 32, [dict(batch_size=4), dict(batch_size=4, max_drafts=3)])


@pytest.mark.long
def test_greedy_text_on_a_mesh():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])):
        check_exact(Tiny(MODELS[1]), prompts(8), 32, [dict(batch_size=8, max_drafts=3)])


@pytest.mark.long
@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_greedy_text_as_accelerators_compute_it(device, formulated_for):
    texts = [*prompts(6), *prompts(2, window=80)]
    expected = Tiny(MODELS[0]).generate(texts, 32)
    with formulated_for(device):
        model = Tiny(MODELS[0])
        assert model.generate(texts, 32) == expected
        drafted = model.generate(texts, 32, batch_size=1, max_drafts=3)
        assert drafted[0] == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_of_two_hundred_prompts(name, mesh):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*mesh), jax.devices()[: np.prod(mesh)])):
        options = itertools.product((1, 7, 32), (0, 5))
        options = (dict(batch_size=size, max_drafts=drafts) for size, drafts in options)
        check_exact(Tiny(name), prompts(200), 48, options)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The directory that `make train` leaves; trained anew where there is none."""
    root = Path(__file__).parents[2]
    if (root / "runs" / "quickstart" / "result.json").exists():
        return root / "runs" / "quickstart"
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    command = [sys.executable, "-m", "bltjax.train", "--config=configs/quickstart.py"]
    stages = "--config.stages=('entropy_model','entropies','blt')"
    one_device = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu")
    subprocess.run([*command, f"--workdir={workdir}", stages], check=True, cwd=root, env=one_device)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)])
def test_greedy_text_of_the_trained_quickstart(quickstart, mesh):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*mesh), jax.devices()[: np.prod(mesh)])):
        options = itertools.product((1, 7, 32), (0, 5))
        options = (dict(batch_size=size, max_drafts=drafts) for size, drafts in options)
        check_exact(Tiny.loaded(quickstart), prompts(200, window=64), 48, options)


@pytest.mark.long
@pytest.mark.parametrize(
    "name, changes",
    [
        ("meta_C_windows_alllayers", dict(rule="monotonic", threshold=0.1, max_patch_length=3)),
        pytest.param("meta_D_no_cross_attn_maxpool", dict(rule="space"), marks=pytest.mark.slow),
    ],
)
def test_other_models_and_rules(name, changes):
    model = Tiny(name, dataclasses.replace(PATCHING, **changes))
    check_exact(model, prompts(4, seed=2), 24, [dict(batch_size=4, max_drafts=2)])


def test_drawn_text_is_that_of_recomputation_whatever_the_batch(tiny):
    texts = prompts(4, seed=3)
    found, _ = tiny.generate(texts, 16, seed=[7, 8, 9, 10], temperature=0.9, batch_size=4)
    expected = [
        tiny.recompute(text, 16, temperature=0.9, seed=seed) for seed, text in enumerate(texts, 7)
    ]
    assert found == expected


@pytest.mark.long
def test_drawn_text_with_drafts_does_not_depend_on_the_batch(tiny):
    texts, options = prompts(4, seed=4), dict(temperature=1.2, top_k=40, max_drafts=3)
    together, counts = tiny.generate(texts, 20, seed=5, batch_size=4, **options)
    alone = [tiny.generate([text], 20, seed=5, batch_size=1, **options)[0][0] for text in texts]
    assert together == alone
    assert 0 < counts.accepted < counts.drafted


@pytest.mark.long
def test_a_seed_gives_the_texts_of_the_first_release(tiny):
    """Texts of earlier code, with drafts. Greedy and plain texts are held by recomputation."""
    texts, options = [b"a", "naïve café"], dict(temperature=1.2, top_k=40, max_drafts=3)
    found, _ = tiny.generate(texts, 40, seed=[2, 3], batch_size=4, **options)
    assert [text.hex() for text in found] == [
        "086bd36839fb9b6a91b5fefe9255e7744e891cedbe1358429bd2492d28b838e9a547b6c76175d5d6",
        "d22d716da84662b8d512104f8665aeeb9264832819abb60b78d26f89a46733e7ff20ac51e9fc7a66",
    ]


@pytest.mark.long
def test_the_global_stack_runs_once_for_each_closed_patch(tiny):
    text, new = b"some text to go on with", 40
    (written,), counts = tiny.generate([text], new)
    ids = encode(text + written, add_eos=False)[None, :-1]  # nothing is predicted from the last
    logits = functional.apply(tiny.entropy_config, tiny.params["entropy_model"], ids)
    starts = patch_starts(PATCHING, ids, np.array(next_byte_entropy(logits)))[0]
    assert counts.patches == starts.sum() - 1
    assert counts.steps == new and counts.global_calls == counts.patches - counts.prompt_patches
    many, of_many = tiny.generate([text] * 3 + [b"more"], new, batch_size=4)
    (_, more), alone = tiny.generate([text, b"more"], new, batch_size=1)
    assert many[0] == written and many[3] == more
    assert of_many.patches == 2 * counts.patches + alone.patches


@pytest.mark.long
def test_one_compilation_for_a_batch_and_a_size_of_room(tiny):
    drawn = dict(temperature=0.7, top_p=0.9)
    tiny.generate([b"a", b"b", b"c"], 10, batch_size=4, **drawn)
    tiny.generate([b"a"], 10, **drawn)
    tiny.generate([b"a"], 10)
    before = read._cache_size(), decode._cache_size()
    tiny.generate([b"another prompt"] * 9, 30, seed=3, temperature=0.5, top_k=9, batch_size=4)
    assert len(list(tiny.stream(b"text", 40))) > 2
    assert (read._cache_size(), decode._cache_size()) == before


@pytest.mark.long
def test_budgets_eos_and_stop_strings_end_a_text(tiny):
    whole, _ = tiny.generate([b"abc"], 30)
    assert tiny.generate([b"abc"] * 3, [0, 7, 30], batch_size=4)[0] == [b"", whole[0][:7], *whole]
    stops = [whole[0][9:12], whole[0][20:21] + b"never", b"abc"]
    for drafts in (0, 3):
        found, counts = tiny.generate([b"abc"], 30, stop=stops, max_drafts=drafts)
        assert found == [whole[0][: whole[0].index(stops[0])]]
        assert counts.steps < 30
    pieces = [piece for piece, _ in tiny.stream(b"abc", 30, stop=stops)]
    assert b"".join(pieces) == found[0]


def test_a_stream_is_the_text_in_pieces(tiny):
    (text,), counts = tiny.generate([b"abc"], 50)
    pieces = list(tiny.stream(b"abc", 50, stop=[text[30:31] + b"?!"]))
    assert b"".join(piece for piece, _ in pieces) == text and len(pieces) > 2
    assert pieces[-1][1].new_bytes == 50 and pieces[-1][1].patches == counts.patches
    assert list(tiny.stream(b"abc", 0)) == [(b"", tiny.generate([b"abc"], 0)[1])]


def test_valid_text_is_valid(tiny):
    rows = ["ab", "日本"]
    found, _ = tiny.generate(rows, 23, seed=[1, 2], temperature=1.5, valid_utf8=True, batch_size=1)
    assert all(text.decode() for text in found)
    finished, _ = tiny.generate(["é".encode()[:1]], 9, temperature=1.5, valid_utf8=True)
    assert ("é".encode()[:1] + finished[0]).decode()


@pytest.mark.slow
def test_a_higher_threshold_makes_fewer_patches(tiny):
    counts = [tiny.generate([b"abc"], 30, threshold=t)[1] for t in (PATCHING.threshold, 9.0)]
    assert counts[0].patches > counts[1].patches == 1


@pytest.mark.slow
def test_a_text_that_runs_out_of_room_for_patches_is_refused(tiny):
    text = bytes(range(180))  # 181 ids in room for 256 positions and 128 patches
    with pytest.raises(ValueError, match=r"more than the 128 patches .* min_patch_bytes"):
        tiny.generate([text], 1, threshold=1.0, min_patch_bytes=2.0)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(max_new_bytes=-1), "max_new_bytes=-1 must be a whole number"),
        (dict(max_new_bytes=[1, 2]), "max_new_bytes has 2 values for 1 prompts"),
        (dict(max_new_bytes=1, seed=2**32), "seed=4294967296 must be"),
        (dict(max_new_bytes=1, stop=["a", ""]), "stop holds an empty string"),
        (dict(max_new_bytes=1, threshold=float("nan")), "threshold=nan must be finite"),
        (dict(max_new_bytes=1, batch_size=0), "batch_size=0 must be a whole number from 1"),
        (dict(max_new_bytes=1, max_drafts=128), "max_drafts=128 must be less than 128"),
        (dict(max_new_bytes=1, quorum=0.0), "quorum=0.0 must be above 0"),
        (dict(max_new_bytes=1, min_patch_bytes=0.5), "min_patch_bytes=0.5 must be 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, wrong, said):
    with pytest.raises(ValueError, match=said):
        tiny.generate([b"a"], **wrong)

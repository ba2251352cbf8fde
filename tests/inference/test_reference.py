"""Generation by recomputation, against a plain loop on the host."""

import jax
import numpy as np
import pytest

from bltjax.config import PatchingConfig
from bltjax.model import functional
from bltjax.patching.boundaries import patch_starts
from bltjax.patching.buffers import buffers_from_starts
from bltjax.patching.entropy import next_byte_entropy
from bltjax.vocabulary import BYTE_OFFSET, encode
from tests import golden
from tests.inference.reference import generate_by_recompute

CONFIG, ENTROPY_CONFIG = golden.blt_config("meta_A_1b_like"), golden.entropy_config()
PATCHING = PatchingConfig(threshold=float(golden.arrays("meta_entropy")["threshold"]))


@pytest.fixture(scope="module")
def params():
    return golden.params("meta_A_1b_like"), golden.params("meta_entropy")


def generate(params, prompt, patching=PATCHING, **settings):
    return generate_by_recompute(
        CONFIG, params[0], ENTROPY_CONFIG, params[1], patching, prompt, max_new_bytes=12, **settings
    )


def test_greedy_equals_a_plain_loop_over_exact_prefixes(params):
    """Each prefix alone, without a buffer around it, gives the same next byte."""
    tokens = encode(b"byte \xff\x00 latent", add_eos=False)
    prompt = len(tokens)

    @jax.jit
    def logits(tokens):
        entropies = next_byte_entropy(functional.apply(ENTROPY_CONFIG, params[1], tokens))
        starts = patch_starts(PATCHING, tokens, entropies)
        return functional.apply(
            CONFIG, params[0], tokens, buffers_from_starts(starts, tokens.shape[1] + 1)
        )

    for _ in range(3):
        last = np.array(logits(tokens[None]))[0, -1]
        last[[0, 1, 3]] = -np.inf  # ids without bytes, EOS aside
        tokens = np.append(tokens, np.int32(last.argmax()))
    expected = (tokens[prompt:] - BYTE_OFFSET).astype(np.uint8).tobytes()
    assert generate(params, b"byte \xff\x00 latent")[:3] == expected


def test_seeds_reproduce_and_differ(params):
    one = generate(params, "a", temperature=1.0, seed=1)
    assert one == generate(params, "a", temperature=1.0, seed=1)
    assert one != generate(params, "a", temperature=1.0, seed=2)


def test_rules_without_entropies_need_no_entropy_model(params):
    found = generate_by_recompute(
        CONFIG, params[0], None, None, PatchingConfig(rule="space"), "a b", max_new_bytes=3
    )
    assert len(found) == 3


def test_generation_ends_at_eos(params):
    always_eos = dict(params[0])
    decoder = dict(always_eos["local_decoder"])
    decoder["norm"] = {"weight": np.zeros_like(decoder["norm"]["weight"])}  # all logits equal
    always_eos["local_decoder"] = decoder
    assert generate((always_eos, params[1]), "text") == b""  # EOS is the first id that may be drawn

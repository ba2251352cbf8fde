"""Ten thousand prompts of random bytes: no crash, no NaN, and memory that does not grow."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.inference.test_engine import Tiny

PROMPTS, BATCH, WARM = 320 * 32, 32, 2_000  # whole batches: another size would be compiled
GROWTH = 20e6  # bytes, a thirtieth of what the process holds


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("VmRSS"))
    return 1024 * int(found.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3])
def test_soak(drafts):
    model = Tiny("meta_A_1b_like")
    rng, written = np.random.default_rng(drafts), 0
    prompts = [rng.bytes(int(rng.integers(0, 100))) for _ in range(PROMPTS)]
    with jax.debug_nans(True):
        for start in range(0, PROMPTS, BATCH):
            if start <= WARM:
                held = resident_bytes()
            seeds = list(range(start, min(start + BATCH, PROMPTS)))
            texts, _ = model.generate(
                prompts[start : start + BATCH], 24, seed=seeds, temperature=1.0, max_drafts=drafts
            )
            written += sum(map(len, texts))
    assert written > 20 * PROMPTS
    assert resident_bytes() - held < GROWTH

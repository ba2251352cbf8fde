"""The numbers of the published code, computed on this device in float32."""

import functools

import jax
import numpy as np
from accelerator.notes import Notes

from bltjax.model import functional
from bltjax.patching.buffers import buffers_from_lengths

CLOSE = 1e-5  # as in tests/model/test_golden.py, on CPUs


def measure(notes: Notes):
    """Notes the largest difference of any logit, of each golden model."""
    from tests import golden

    # Accelerators multiply float32 in fewer bits unless they are told otherwise.
    with jax.default_matmul_precision("highest"):
        for name in golden.MODELS[:1] if notes.tiny else golden.MODELS:
            _compare(notes, name, golden.blt_config(name), golden.params(name), golden.arrays(name))
        name = "meta_entropy"
        _compare(notes, name, golden.entropy_config(), golden.params(name), golden.arrays(name))


def _compare(notes: Notes, name: str, config, params: dict, expected: dict):
    try:
        tokens, more = expected["tokens"], []
        if "patch_lengths" in expected:
            more = [
                buffers_from_lengths(jax.numpy.asarray(expected["patch_lengths"]), tokens.shape[1])
            ]
        logits = jax.jit(functools.partial(functional.apply, config))(params, tokens, *more)
        difference = float(np.abs(np.asarray(logits) - expected["logits"]).max())
        notes.write("golden", model=name, difference=difference, close=difference <= CLOSE)
    except Exception as error:
        notes.failed(error, model=name)

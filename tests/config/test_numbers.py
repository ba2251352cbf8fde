"""Every number of the settings, far out: it is refused in one line that names it, or computes."""

import math
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.config import OptimizerConfig, RunConfig, default_config, from_config_dict
from bltjax.config.names import settings
from bltjax.config.training import SCHEDULES
from bltjax.training.optimizer import schedule_multiplier
from tests.config.test_config import with_settings

INTEGERS = (0, -1, 2**31, 2**40, 2**62, 2**63, -(2**63), 10**5000)
MAY_ROUND_TO_0 = ("threshold", "threshold_add", "beta1", "beta2", "min_ratio", "above")
FLOATS = (0.0, -1.0, 1e-300, -1e-300, 1e300, -1e300, math.nan, math.inf, -math.inf)


def types_of(hint):
    return {hint, *typing.get_args(hint)}


def config_with(**changes):
    """The default config with settings like {"blt.hash.vocab": 3}, as a config file has them."""
    return from_config_dict(RunConfig, with_settings(default_config().to_dict(), changes))


NUMBERS = [
    (name, value)
    for name, setting in settings().items()
    for kind, values in ((int, INTEGERS), (float, FLOATS))
    if kind in types_of(setting.hint)
    for value in values
]


def test_all_numbers_are_here():
    assert len({name for name, _ in NUMBERS}) > 120


def get(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_a_number_is_refused_by_name_or_fits_float32_and_int32():
    for name, value in NUMBERS:
        try:
            found = get(config_with(**{name: value}), name)
        except ValueError as error:
            said = str(error)
            group, _, last = name.rpartition(".")
            assert (name in said) or (group in said and last in said) or name.startswith("mesh")
            assert "\n" not in said and len(said) < 600, (name, said)
            assert value == 10**5000 or str(value) in said, (name, value, said)
            continue
        assert math.isfinite(np.float32(found)), (name, value)
        # Only what Python counts may be larger than int32: bytes of a corpus, and seeds.
        if isinstance(found, int) and not -(2**31) <= found < 2**31:
            assert "bytes" in name or "seed" in name, (name, value)
        if isinstance(found, float) and not name.endswith(MAY_ROUND_TO_0):
            assert found == 0 or abs(np.float32(found)) > 0, (name, value)


@pytest.mark.parametrize("name", [n for n, s in settings().items() if "tuple" in str(s.hint)])
def test_huge_lists(name):
    """A list of text may have any length; what is refused is shown in part."""
    for entry in (7, "x", {"name": "x"}):
        try:
            config_with(**{name: (entry,) * 20_000})
        except ValueError as error:
            assert name in str(error) and len(str(error)) < 3000


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_settings_that_pass_are_finite(schedule):
    extremes = (0.0, 1e-30, 1e-3, 1.0, 1e30)
    names = ("min_ratio", "cycle_length", "cosine_theta", "decay_fraction", "exp_factor")
    passed = 0
    for name in names:
        for value in extremes:
            for warmup in (0, 5):
                changes = {name: value, "schedule": schedule, "warmup_steps": warmup}
                config = OptimizerConfig(**changes)
                if config.problems("optimizer"):
                    continue
                passed += 1
                steps = jnp.arange(12)
                rates = np.array([schedule_multiplier(config, step, 10) for step in steps])
                assert np.isfinite(rates).all() and (rates >= 0).all(), (changes, rates)
    assert passed > 10

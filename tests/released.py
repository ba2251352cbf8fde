"""The released models: their settings in configs/, and the published names and shapes."""

import json
from pathlib import Path

from bltjax.config import read_config
from tests import golden

CONFIGS = Path(__file__).parents[1] / "configs"


def released(name):
    """The RunConfig of a file in configs/."""
    return read_config(CONFIGS / f"{name}.py")


def expected_shapes(style, size):
    shapes = json.loads((golden.GOLDEN / f"{style}_param_shapes.json").read_text())
    return {name: tuple(shape) for name, shape in shapes[size].items()}

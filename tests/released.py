"""The released models: their settings in configs/, and the published names and shapes."""

import importlib.util
import json
from pathlib import Path

from bltjax.config import RunConfig, from_config_dict
from tests import golden

CONFIGS = Path(__file__).parents[1] / "configs"


def released(name):
    """The RunConfig of a file in configs/."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(RunConfig, module.get_config())


def expected_shapes(style, size):
    shapes = json.loads((golden.GOLDEN / f"{style}_param_shapes.json").read_text())
    return {name: tuple(shape) for name, shape in shapes[size].items()}

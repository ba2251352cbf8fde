"""A run of seconds that starts from the model which `start_from` names."""

from bltjax.config import default_config
from tests.configs import tiny


def get_config():
    config = tiny.get_config()
    for name in ("entropy_model", "blt", "patching"):
        config[name] = default_config()[name]
    config.stages = ("entropies", "blt", "evaluate")
    return config

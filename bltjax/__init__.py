"""The Byte Latent Transformer for JAX: raw bytes in, no tokenizer.

    model = bltjax.load(path)

See `bltjax.api` for what a model can do.
"""

import importlib
import os

from bltjax.runtime import endings

# `python -m bltjax.train` runs bltjax/commands/train.py, and so for each command.
__path__.append(os.path.join(os.path.dirname(__file__), "commands"))

if endings.is_command():  # before the imports of the command, which take a second
    endings.install()

_FROM_API = ("Model", "Score", "load")


def __getattr__(name: str):
    """`bltjax.load` and its classes, imported when they are asked for: JAX takes seconds."""
    if name in _FROM_API:
        return getattr(importlib.import_module("bltjax.api"), name)
    if name == "convert":  # bltjax.convert.convert(source, target, format)
        return importlib.import_module("bltjax.checkpoints.pytorch.convert")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("bltjax")
    raise AttributeError(f"module 'bltjax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_FROM_API])

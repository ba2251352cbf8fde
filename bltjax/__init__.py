"""The Byte Latent Transformer for JAX: raw bytes in, no tokenizer.

    model = bltjax.load(path)

See `bltjax.api` for what a model can do.
"""

import importlib

__version__ = "0.1.0"

_FROM_API = ("Model", "Score", "load")


def __getattr__(name: str):
    """`bltjax.load` and its classes, imported when they are asked for: JAX takes seconds."""
    if name in _FROM_API:
        from bltjax import api

        return getattr(api, name)
    if name == "convert":  # the module: bltjax.convert.convert(source, target, format)
        return importlib.import_module("bltjax.convert")
    raise AttributeError(f"module 'bltjax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_FROM_API])

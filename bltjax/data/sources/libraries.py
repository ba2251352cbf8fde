"""Imports the libraries that only some sources need."""

import importlib


def need(module: str, extra: str):
    """Imports an optional library; raises ValueError with the remedy where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ValueError(
            f"{library} is needed and missing ({error}): pip install 'bltjax[{extra}]'"
        ) from error

"""Parameters with each layer on its own and matrices transposed, for generation on CPUs.

In a loop on a CPU each step copies the layer that it needs out of a stack, and a product with few
rows is faster where a matrix lies [in, out]. Measured on 2 cores, 96 bytes a row after prompts of
64, `small` of benchmarks/generate.py, against stacked layers, in turns, median of 5: 2.1 times as
fast with 1 row and 1.5 times with 8, of which the transposed matrices give 1.09 and 1.19. A model
of the size of configs/quickstart.py gains 1.07 and 1.2.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from bltjax.model.transformer import each_layer

_STACKED = {"layers", "cross_attn_layers"}  # parameters with a leading layer axis


def unstacked(params: dict) -> dict:
    """Splits stacked layers into a tuple of layers, whose matrices lie [in, out]."""

    def split(name, tree):
        if name in _STACKED:
            return tuple(jax.tree.map(_transposed, layer) for layer in each_layer(tree))
        if isinstance(tree, dict):
            return {name: split(name, part) for name, part in tree.items()}
        return tree

    return split(None, params)


def merge(graphdef, params: dict) -> nnx.Module:
    """Returns the module with these parameters, whose layers may be `unstacked`."""
    # Back to [out, in]; a module is made of the first layers, and gets all of them then.
    params = _map_unstacked(lambda layers: jax.tree.map(_transposed, layers), params)
    model = nnx.merge(graphdef, _map_unstacked(lambda layers: layers[0], params))
    _put_layers(model, params)
    return model


def _transposed(w):
    return jnp.swapaxes(w, 0, 1) if w.ndim == 2 else w


def _map_unstacked(function, params):
    """Maps the tuples of unstacked layers, and leaves all else."""
    if isinstance(params, dict):
        return {name: _map_unstacked(function, part) for name, part in params.items()}
    return function(params) if isinstance(params, tuple) else params


def _put_layers(module, params: dict):
    """Puts all unstacked layers where `merge` put the first."""
    for name, part in params.items():
        if isinstance(part, dict):
            _put_layers(getattr(module, name), part)
        elif isinstance(part, tuple):
            graphdef = nnx.graphdef(getattr(module, name))
            setattr(module, name, nnx.List([nnx.merge(graphdef, layer) for layer in part]))

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

_STACKED = {"layers", "cross_attn_layers"}  # parameters with a leading layer axis


def unstacked(params: dict) -> dict:
    """Splits stacked layers into a tuple of layers, whose matrices lie [in, out]."""

    def split(name, tree):
        if name in _STACKED:
            num_layers = len(jax.tree.leaves(tree)[0])
            layers = (jax.tree.map(lambda w, i=i: w[i], tree) for i in range(num_layers))
            return tuple(jax.tree.map(_transposed, layer) for layer in layers)
        if isinstance(tree, dict):
            return {name: split(name, part) for name, part in tree.items()}
        return tree

    return split(None, params)


def merge(graphdef, params: dict) -> nnx.Module:
    """Returns the module with these parameters, whose layers may be `unstacked`."""
    params = _published(params)
    model = nnx.merge(graphdef, _with_first_layers(params))
    _put_layers(model, params)
    return model


def _published(params):
    """Transposes matrices of unstacked layers back to [out, in]."""
    if isinstance(params, tuple):
        return tuple(jax.tree.map(_transposed, layer) for layer in params)
    if isinstance(params, dict):
        return {name: _published(part) for name, part in params.items()}
    return params


def _transposed(w):
    return jnp.swapaxes(w, 0, 1) if w.ndim == 2 else w


def _with_first_layers(params):
    """Puts the first layer in the place of unstacked layers, for a module to be made of it."""
    if isinstance(params, dict):
        return {name: _with_first_layers(part) for name, part in params.items()}
    return params[0] if isinstance(params, tuple) else params


def _put_layers(module, params: dict):
    """Puts all unstacked layers where `_with_first_layers` put the first."""
    for name, part in params.items():
        if isinstance(part, dict):
            _put_layers(getattr(module, name), part)
        elif isinstance(part, tuple):
            graphdef = nnx.graphdef(getattr(module, name))
            setattr(module, name, nnx.List([nnx.merge(graphdef, layer) for layer in part]))

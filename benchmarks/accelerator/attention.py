"""Every attention backend: its error beside float32, its speed with few and with many documents."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from accelerator.notes import Notes
from accelerator.timing import seconds_of

from bltjax.config.model import ATTENTION_KERNELS
from bltjax.ops import attention
from bltjax.ops.kernels.tiled_attention import tiled_attention

LOOPS = "tiles in loops"  # those of CPUs, which accelerators are measured against
NEEDED = 20  # seconds, for another case
# Products of a query and a key, of both passes: two forward and five backward.
FORWARD, BOTH = 4, 14  # FLOPs a pair of visible positions and a feature of a head


class Case(NamedTuple):
    """Shapes of attention."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    width: int  # of a head
    window: int | None
    dtype: str = "bfloat16"


# 1 and 5 documents a row, and more than a kernel that takes a fixed number of them does.
EXACT = {  # small enough for a plain softmax in float32
    "window": (Case(2, 1024, 4, 4, 64, 256), (1, 5, 40)),
    "causal, grouped heads": (Case(2, 1024, 8, 2, 128, None), (1, 5, 40)),
    "odd length": (Case(2, 1001, 4, 4, 64, 256), (5,)),
    "float32": (Case(2, 1024, 4, 4, 64, 256, "float32"), (5,)),
}
TIMED = {  # of blt_1b at 8 rows of 8192 bytes and at one
    "local": (Case(8, 8192, 16, 16, 64, 512), (1, 5, 40)),
    "global": (Case(8, 1792, 16, 16, 128, None), (1, 5, 40)),
    "one row": (Case(1, 8192, 16, 16, 64, 512), (1, 5)),
}
TINY_EXACT = {
    "window": (Case(2, 64, 2, 2, 16, 16), (1, 5, 40)),
    "odd length, grouped heads": (Case(1, 37, 4, 2, 16, None, "float32"), (5,)),
}
TINY_TIMED = {"local": (Case(2, 128, 2, 2, 16, 32), (1, 5))}


def measure(notes: Notes):
    """Notes errors and times of all backends, the local stack's times before the rarer shapes."""
    exact, timed = (TINY_EXACT, TINY_TIMED) if notes.tiny else (EXACT, TIMED)
    work = [(_exact, *item) for item in exact.items()]
    work[1:1] = [(_timed, *item) for item in timed.items()]
    told = set()
    for function, name, (case, documents) in work:
        for backend in backends():
            if reason := why_not(backend, case):
                if (backend, reason) not in told:
                    notes.impossible(reason, backend=backend)
                told.add((backend, reason))
            elif notes.left < NEEDED and not notes.tiny:
                notes.late(f"no time for {name}", backend=backend)
            else:
                try:
                    function(notes, name, case, documents, backend)
                except Exception as error:
                    notes.failed(error, case=name, backend=backend)


def _exact(notes: Notes, name: str, case: Case, documents, backend: str):
    """Notes relative errors of outputs and gradients."""
    q, k, v, gradient = draw(case)
    attend, plain = jax.jit(_with_gradients(backends()[backend], case.window)), _plain(case.window)
    for count in documents:
        segments = draw_segments(case.rows, case.length, count)
        found = attend(q, k, v, segments, gradient)
        with jax.default_matmul_precision("highest"):
            exact = (x.astype(jnp.float32) for x in (q, k, v))
            wanted = jax.jit(_with_gradients(plain))(*exact, segments, gradient)
        errors = {
            n: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
            for n, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True)
        }
        about = dict(case=name, documents=count, dtype=case.dtype, backend=backend)
        notes.write("attention error", **about, **errors, worst=max(errors.values()))


def _timed(notes: Notes, name: str, case: Case, documents, backend: str):
    """Notes milliseconds and TFLOP/s of visible pairs."""
    q, k, v, gradient = draw(case)
    attend = backends()[backend]
    forward = jax.jit(lambda q, k, v, s: attend(q, k, v, s, case.window))
    both = jax.jit(_with_gradients(attend, case.window))
    few = dict(calls=2, repeats=2) if backend == LOOPS else {}
    for count in documents:
        segments = draw_segments(case.rows, case.length, count)
        seconds = seconds_of(forward, q, k, v, segments, **few)
        both_seconds = seconds_of(both, q, k, v, segments, gradient, **few)
        flops = visible_pairs(np.asarray(segments), case.window) * case.heads * case.width
        notes.write(
            "attention",
            case=name,
            documents=count,
            backend=backend,
            forward_ms=1e3 * seconds,
            both_ms=1e3 * both_seconds,
            forward_tflops=FORWARD * flops / seconds / 1e12,
            both_tflops=BOTH * flops / both_seconds / 1e12,
        )


def backends() -> dict:
    """Returns (q, k, v, segments, window) -> out of each backend, by its name in settings."""
    found = {
        name: functools.partial(attention.self_attention, setting=name)
        for name in ATTENTION_KERNELS
        if name != "auto"
    }
    if jax.devices()[0].platform != "cpu":  # there they are what "tiles" means
        found[LOOPS] = tiled_attention
    return found


def why_not(backend: str, case: Case) -> str | None:
    """Returns why a backend cannot compute a case here; None where it can."""
    if backend != LOOPS:
        try:
            attention.choose_attention(backend, case.dtype, case.width)
        except ValueError as error:
            return str(error)
    return None


def draw(case: Case):
    """Returns random queries, keys, values, and the gradient of the output."""
    own, shared = (
        (case.rows, case.length, heads, case.width) for heads in (case.heads, case.kv_heads)
    )
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = own, shared, shared, own
    return [jax.random.normal(key, s, case.dtype) for key, s in zip(keys, shapes, strict=True)]


def draw_segments(rows: int, length: int, documents: int):
    """Returns int32 [rows, length]: numbers of documents, at most so many, with random ends."""
    rng = np.random.default_rng(documents)
    ends = rng.integers(1, length, (rows, documents - 1))
    return jnp.asarray((np.arange(length)[None, :, None] >= ends[:, None]).sum(-1), jnp.int32)


def visible_pairs(segments: np.ndarray, window: int | None) -> int:
    """Counts pairs of a query and a key that it sees, in all rows."""
    positions = np.arange(segments.shape[1])
    opens = np.diff(segments, axis=1, prepend=-1) != 0
    starts = np.maximum.accumulate(np.where(opens, positions, 0), axis=1)
    seen = positions - starts + 1
    return int(seen.sum() if window is None else np.minimum(seen, window).sum())


def _with_gradients(attend, *static):
    """Returns (q, k, v, segments, gradient of the output) -> output and gradients of q, k, v."""

    def both(q, k, v, segments, gradient):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, segments, *static), q, k, v)
        return out, *pull_back(gradient.astype(out.dtype))

    return both


def _plain(window: int | None):
    """Returns attention as one softmax over a row, written independently of the backends."""

    def attend(q, k, v, segments):
        repeats = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])[None]
        near = (distance >= 0) & (distance < (window or q.shape[1]))
        visible = near[None] & (segments[:, :, None] == segments[:, None])
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    return attend

"""Where patches start: the rules of the published patcher, one code for NumPy and JAX.

Every rule returns bool `starts [..., S+1]` for S tokens: starts[..., s] says that a patch starts at
position s, and position S is the byte that follows the last token ("N+1" convention of spec 2.1).
`starts[..., :S]` are the starts of a whole document. A start at s depends on tokens[..., :s] and
entropies[..., :s] only, so the starts of a prefix are a prefix of the starts.

Rows need at least one token. The arrays may be NumPy's (data pipeline; JAX is not imported then) or
JAX's (inside a jitted step); the result is of the same kind and, on a mesh, sharded alike.
"""

import ml_dtypes
import numpy as np

from bltjax.vocabulary import BPE_ID, BYTE_OFFSET, EOS_ID

NEWLINE_ID = ord("\n") + BYTE_OFFSET


def patch_starts(config, tokens, entropies=None):
    """Returns bool starts [..., S+1] under a PatchingConfig. Spec 2.

    tokens: integers [..., S]. entropies: nats [..., S], entropies[..., i] being the uncertainty
    after tokens[..., :i+1]; needed by the entropy rules only. Raises ValueError where they are
    missing, and for an unknown rule.
    """
    starts = rule_starts(config, tokens, entropies)
    if config.max_patch_length is not None:
        starts = limit_patch_length(starts, config.max_patch_length)
    return starts


def num_forced(rule):
    """How many positions at the start of a text start patches in any case. Spec 2.3, 2.4."""
    return 3 if rule in ("monotonic", "global_monotonic") else 2


def rule_starts(config, tokens, entropies):
    """`patch_starts` without the limit on a patch's length."""
    if config.rule == "space":
        return space_starts(tokens)
    if config.rule == "static":
        return static_starts(tokens, config.patch_size)
    if config.rule == "byte":
        return byte_starts(tokens)
    if config.rule == "bpe":
        return bpe_starts(tokens)
    if config.rule not in ("entropy", "monotonic", "global_monotonic"):
        raise ValueError(f"unknown patching rule {config.rule!r}")
    if entropies is None:
        raise ValueError(
            f"patching rule {config.rule!r} needs the entropies of the tokens: store them with the "
            "data or run the entropy model first, or choose the rule space, static, byte or bpe"
        )
    threshold, threshold_add = config.threshold, config.threshold_add
    if config.bf16_compat:
        entropies = _bf16(entropies)
        threshold, threshold_add = (float(_bf16(np.float32(t))) for t in (threshold, threshold_add))
    if config.rule == "entropy":
        return entropy_starts(entropies, threshold)
    if config.rule == "monotonic":
        return monotonic_starts(entropies, threshold)
    return global_monotonic_starts(entropies, threshold, threshold_add, config.published_skip_at_3)


def entropy_starts(entropies, threshold):
    """Starts where the next byte is hard: at s >= 2 where entropies[s-1] > threshold. Spec 2.3."""
    return _with_forced_starts(_float32(entropies) > threshold)


def monotonic_starts(entropies, threshold):
    """Starts where entropy rises by more than the threshold in nats; always at 2. Spec 2.4."""
    return _with_forced_starts(_rise(_float32(entropies)) > threshold, num_forced=3)


def global_monotonic_starts(entropies, threshold, threshold_add, published_skip_at_3=False):
    """Starts where entropy is over a threshold and rises by more than another. Spec 2.4.

    entropies, threshold, threshold_add: nats. Position 2 always starts. `published_skip_at_3`
    reproduces a quirk of the published code: position 3 never starts.
    """
    entropies = _float32(entropies)
    opens = (entropies > threshold) & (_rise(entropies) > threshold_add)
    if published_skip_at_3:
        never = _namespace(opens).zeros_like(opens[..., 2:3])
        opens = _concatenate(opens[..., :2], never, opens[..., 3:])
    return _with_forced_starts(opens, num_forced=3)


def space_starts(tokens):
    """Starts after each byte that ends a word, and after each special token. Spec 2.6.

    A byte ends a word if it is neither an ASCII letter or digit nor a UTF-8 continuation byte, and
    the byte before it is either.
    """
    byte = tokens.astype(np.int32) - BYTE_OFFSET
    letter = (byte >= ord("A")) & (byte <= ord("Z")) | (byte >= ord("a")) & (byte <= ord("z"))
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    continuation = (byte >= 0x80) & (byte < 0xC0)
    inside_word = letter | digit | continuation
    ends = ~inside_word & _previous(inside_word) | (byte < 0)
    return _with_forced_starts(ends)


def static_starts(tokens, patch_size, split_first=True):
    """Starts every `patch_size` bytes, whatever they are. Spec 2.7.

    Only the shape of tokens [..., S] matters. `split_first` makes byte 0 a patch of its own, as the
    model wants it: lengths 1, p-1, p, p, ...; without it they are p, p, ... Raises ValueError for a
    patch size that is not a positive whole number.
    """
    if patch_size < 1 or patch_size != int(patch_size):
        raise ValueError(f"static patch_size is {patch_size}; it must be a whole number >= 1")
    xp = _namespace(tokens)
    grid = xp.arange(1, tokens.shape[-1] + 1) % int(patch_size) == 0
    sharded_like_tokens = xp.zeros_like(tokens, dtype=bool)
    opens = sharded_like_tokens | xp.broadcast_to(grid, tokens.shape)
    return _with_forced_starts(opens, num_forced=2 if split_first else 1)


def byte_starts(tokens):
    """Starts at every byte of tokens [..., S]. Spec 2.7."""
    return _with_forced_starts(_namespace(tokens).ones_like(tokens, dtype=bool))


def bpe_starts(tokens):
    """Starts after each BPE delimiter of tokens [..., S]. Spec 2.7.

    The published code never starts a patch at position S, which would make a boundary depend on
    later bytes; here a delimiter that comes last does open one there.
    """
    return _with_forced_starts(tokens == BPE_ID)


def limit_patch_length(starts, max_patch_length):
    """Cuts longer patches every `max_patch_length` bytes, from their left end. Spec 2.5.

    starts: bool [..., S+1], with position 0 set. Raises ValueError for a limit below 1.
    """
    if max_patch_length < 1:
        raise ValueError(f"max_patch_length is {max_patch_length}; it must be at least 1")
    xp = _namespace(starts)
    positions = xp.broadcast_to(xp.arange(starts.shape[-1], dtype=np.int32), starts.shape)
    patch_start = _cumulative_max(xp.where(starts, positions, 0))
    return (positions - patch_start) % max_patch_length == 0


def lengths_from_starts(starts: np.ndarray) -> np.ndarray:
    """Returns the patch lengths int32 [P] of one row of starts, bool [S'], NumPy only.

    They sum to S'. starts[0] must be set.
    """
    return np.diff(np.flatnonzero(starts), append=starts.size).astype(np.int32)


def document_segments(tokens, eos_id=EOS_ID):
    """Returns int32 [..., S], the number of documents that ended before each token. Spec 5.9.

    An EOS belongs to the document that it ends.
    """
    return _segments(tokens == eos_id)


def newline_segments(tokens, eos_id=EOS_ID):
    """Returns int32 [..., S], the number of lines and documents that ended before each token.

    For an entropy model whose context is reset at newlines (paper 4.4, spec 2.10). A newline byte
    belongs to the line that it ends, as an EOS does.
    """
    return _segments((tokens == eos_id) | (tokens == NEWLINE_ID))


def entropy_segments(tokens, reset_at_newlines):
    """Context segments of the entropy model: documents, or lines of documents."""
    return newline_segments(tokens) if reset_at_newlines else document_segments(tokens)


def _segments(ends):
    ends = ends.astype(np.int32)
    return _namespace(ends).cumsum(ends, axis=-1, dtype=np.int32) - ends


def _with_forced_starts(opens, num_forced=2):
    """Returns starts [..., S+1] from opens [..., S], whose entry i says "a patch starts at i+1".

    The first `num_forced` positions (at least one) start in any case.
    """
    forced = _namespace(opens).ones_like(opens[..., : num_forced - 1])
    first = _namespace(opens).ones_like(opens[..., :1])
    return _concatenate(first, forced, opens[..., num_forced - 1 :])


def _bf16(x):
    """Rounded to bfloat16: the published demo compares in it, threshold included (spec 2.9)."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _float32(entropies):
    # Stored entropies are float16: compared as they are, they would round the threshold (spec 2.9).
    return entropies.astype(np.float32)


def _rise(entropies):
    return entropies - _previous(entropies)


def _previous(x):
    """Shifts x [..., S] right by one; the first entry stays and is its own predecessor."""
    return _concatenate(x[..., :1], x[..., :-1])


def _concatenate(*parts):
    return _namespace(parts[0]).concatenate(parts, axis=-1)


def _cumulative_max(x):
    if isinstance(x, np.ndarray):
        return np.maximum.accumulate(x, axis=-1)
    from jax import lax  # Here, so that a data worker with NumPy arrays never loads JAX.

    return lax.cummax(x, axis=x.ndim - 1)


def _namespace(x):
    """Returns `numpy` or `jax.numpy`, whichever x belongs to."""
    return x.__array_namespace__()

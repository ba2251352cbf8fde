"""Patching rules: where patches start. One table, one code for NumPy and JAX.

`RULES` holds all that is known of each rule, and everything else asks it. A new rule is one entry
there: a function that says after which positions a patch starts. They are defined in
model.md#rules.

Starts are bool [..., S+1] for S tokens: starts[..., s] says that a patch starts at position s, and
position S is the byte that follows the last token ("N+1" convention of model.md#patches).
`starts[..., :S]` are the starts of a whole document. A start at s depends on tokens[..., :s] and
entropies[..., :s] only, so the starts of a prefix are a prefix of the starts.

Rows need at least one token. The arrays may be NumPy's (data pipeline; JAX is not imported then) or
JAX's (inside a jitted step); the result is of the same kind and, on a mesh, sharded alike.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from bltjax.config.chat import TURN_BYTES
from bltjax.patching import falling
from bltjax.vocabulary import BPE_ID, BYTE_OFFSET, EOS_ID

NEWLINE_ID = ord("\n") + BYTE_OFFSET
TURNS = sorted(b"".join(TURN_BYTES.values()))  # four bytes in a row


class Context(NamedTuple):
    """S positions as a rule sees them; arrays are [..., S], NumPy's or JAX's."""

    tokens: np.ndarray  # ids, integers
    entropies: np.ndarray | None  # float32, nats: of the byte that follows
    positions: np.ndarray  # int32, in their document; what is before 0 is no part of it
    from_start: np.ndarray | bool  # False: the document began before its position 0
    open_bytes: np.ndarray | int  # int32 [...], of the patch that is open before all of them
    opened: np.ndarray | bool = False  # bool [..., S]: a patch starts after it whatever the rule


@dataclasses.dataclass(frozen=True)
class Rule:
    """A patching rule. Under every rule a document's first two positions start patches."""

    name: str  # of PatchingConfig.rule
    # (PatchingConfig, Context) -> bool [..., S]: whether a patch starts after each position. It may
    # look at that position and at the `looks_back` before it in the same document, at none after.
    opens: Callable
    # Of a rule by entropies: (score, name of its threshold in PatchingConfig). A score is that of
    # each of the entropies [..., S] and looks at the one before it at most.
    scores: tuple[tuple[Callable, str], ...] = ()
    looks_back: int = 0
    by_length: bool = False  # it looks at the length of the open patch too
    num_forced: int = 2  # positions at the start of a document that start patches in any case
    fixed_mean: Callable | None = None  # PatchingConfig -> mean bytes of a patch, whatever the text
    needs_delimiters: bool = False  # id 3 among the tokens, which raw bytes do not have

    @property
    def needs_entropies(self) -> bool:
        return bool(self.scores)

    @property
    def can_be_calibrated(self) -> bool:
        """Returns whether its threshold can be set for a wanted mean patch."""
        return len(self.scores) == 1

    @property
    def has_histogram(self) -> bool:
        """Returns whether counts of its scores tell the mean patch at any threshold."""
        return self.can_be_calibrated and not self.by_length


def _previous(x):
    """Shifts x [..., S] right by one; the first entry stays and is its own predecessor."""
    return _concatenate(x[..., :1], x[..., :-1])


def _entropy(entropies):
    return entropies


def _rise(entropies):
    return entropies - _previous(entropies)


def _above_thresholds(config, context):
    """Starts a patch where each score of the entropy is above its threshold."""
    scores = rule_of(config).scores
    above = [score(context.entropies) > getattr(config, name) for score, name in scores]
    return functools.reduce(operator.and_, above)


def _above_two_thresholds(config, context):
    """Starts a patch as `_above_thresholds` does, but for a quirk of the published code.

    With `published_skip_at_3` no patch starts at position 3.
    """
    opens = _above_thresholds(config, context)
    if config.published_skip_at_3:
        opens &= ~(context.from_start & (context.positions == 2))
    return opens


def _above_falling_threshold(config, context):
    """Starts a patch where the entropy times the bytes of the patch so far is above the threshold.

    The longer a patch is, the less uncertainty ends it: text of any script then has patches of
    similar lengths, which still start at its harder bytes.
    """
    begins = (context.positions == 0) | context.opened
    return falling.opens(config.threshold, context.entropies, begins, context.open_bytes)


def _word_ends(config, context):
    """Starts a patch after each byte that ends a word, and each special token.

    A byte ends a word if it is neither an ASCII letter or digit nor a UTF-8 continuation byte, and
    the byte before it is either.
    """
    byte = context.tokens.astype(np.int32) - BYTE_OFFSET
    letter = (byte >= ord("A")) & (byte <= ord("Z")) | (byte >= ord("a")) & (byte <= ord("z"))
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    continuation = (byte >= 0x80) & (byte < 0xC0)
    inside_word = letter | digit | continuation
    return ~inside_word & _previous(inside_word) | (byte < 0)


def _every_patch_size(config, context):
    """Starts a patch every `patch_size` bytes, whatever they are.

    Byte 0 is a patch of its own, so lengths are 1, p-1, p, p, ... Raises ValueError for a patch
    size that is not a positive whole number.
    """
    size = config.patch_size
    if size < 1 or size != int(size):
        raise ValueError(f"static patch_size is {size}; it must be a whole number >= 1")
    return (context.positions + 1) % int(size) == 0


def _every_byte(config, context):
    """Starts a patch at every byte."""
    return context.positions >= 0


def _delimiters(config, context):
    """Starts a patch after each BPE delimiter.

    The published code never starts a patch at position S, which would make a boundary depend on
    later bytes; here a delimiter that comes last does open one there.
    """
    return context.tokens == BPE_ID


# Classes of characters by the first byte of their UTF-8: each from that byte on to the next.
_SCRIPTS = {
    0x00: "symbol", 0x09: "space", 0x0E: "symbol", 0x20: "space", 0x21: "symbol",
    0x30: "digit", 0x3A: "symbol", 0x41: "latin", 0x5B: "symbol", 0x61: "latin", 0x7B: "symbol",
    0x80: "stray", 0xC2: "symbol", 0xC3: "latin", 0xCE: "greek", 0xD0: "cyrillic",
    0xD4: "armenian", 0xD6: "hebrew", 0xD8: "arabic", 0xDC: "syriac", 0xE0: "indic",
    0xE1: "other", 0xE2: "symbol", 0xE3: "kana", 0xE4: "han", 0xEA: "hangul", 0xEE: "other",
    0xF0: "emoji", 0xF5: "stray",
}  # fmt: skip
_SCRIPT_NAMES = sorted(set(_SCRIPTS.values()))


def _script_changes(config, context):
    """Starts a patch after the first character of another script or class than the one before.

    A start depends on earlier bytes only, so that character still ends the patch before; no
    character is cut. Bytes that are no UTF-8 go with what is before them. The first byte of a
    character tells its class, which is approximate: accented letters, combining marks and letters
    of phonetic alphabets are Latin, but the Vietnamese ones of U+1E00 on are "other", with
    Georgian, Khmer and full-width forms; all punctuation and symbols below U+3000 are one class,
    kana includes CJK punctuation, Hangul U+A000 to U+ABFF, and "emoji" is all above U+FFFF.
    """
    xp, byte = _namespace(context.tokens), context.tokens.astype(np.int32) - BYTE_OFFSET
    first, distance = byte, xp.zeros_like(byte)
    for k in (1, 2, 3):
        inside = (first >= 0x80) & (first < 0xC0)
        first = xp.where(inside, _before(context, byte, k), first)
        distance += inside
    script = xp.full_like(byte, -1)  # of special tokens, and of what is before the document
    for start, name in _SCRIPTS.items():
        script = xp.where(first >= start, _SCRIPT_NAMES.index(name), script)
    rest = sum((first >= start).astype(np.int32) for start in (0xC0, 0xE0, 0xF0))
    opens = xp.zeros_like(inside)
    for k in (0, 1, 2, 3):
        previous = _before(context, script, k + 1)
        opens |= (rest == k) & (distance == k) & (previous >= 0) & (previous != script)
    return opens


def _before(context, x, k):
    """Returns x [..., S] of the position k earlier in the document; -1 where there is none."""
    shifted = _concatenate(x[..., :k], x[..., :-k])
    return _namespace(x).where(context.positions < k, -1, shifted)


_TABLE = (
    Rule("entropy", _above_thresholds, ((_entropy, "threshold"),)),
    Rule("monotonic", _above_thresholds, ((_rise, "threshold"),), looks_back=1, num_forced=3),
    Rule(
        "global_monotonic",
        _above_two_thresholds,
        ((_entropy, "threshold"), (_rise, "threshold_add")),
        looks_back=1,
        num_forced=3,
    ),
    Rule("falling", _above_falling_threshold, ((_entropy, "threshold"),), by_length=True),
    Rule("space", _word_ends, looks_back=1),
    Rule("static", _every_patch_size, fixed_mean=lambda config: float(config.patch_size)),
    Rule("byte", _every_byte, fixed_mean=lambda config: 1.0),
    Rule("bpe", _delimiters, needs_delimiters=True),
    Rule("script", _script_changes, looks_back=7),
)
RULES = {rule.name: rule for rule in _TABLE}
WITHOUT_ENTROPIES = ", ".join(rule.name for rule in RULES.values() if not rule.needs_entropies)


def rule_of(config) -> Rule:
    """Returns the rule that a PatchingConfig names. Raises ValueError for an unknown name."""
    if config.rule not in RULES:
        known = ", ".join(RULES)
        raise ValueError(f"patching.rule={config.rule!r} is unknown: choose one of {known}")
    return RULES[config.rule]


def needs_entropies(config) -> bool:
    """Returns whether the rule of a PatchingConfig needs entropies, and so has a threshold."""
    return rule_of(config).needs_entropies


def row_threshold(config, threshold: float) -> float:
    """Returns a threshold of a PatchingConfig's rule as float32 [..., 1] of rows can hold it.

    The rule then opens the patches that it opens with the number itself.
    """
    if config.bf16_compat:
        threshold = _bf16_threshold(threshold)
    return falling.in_steps(threshold) if rule_of(config).by_length else threshold


def check_rule(config):
    """Raises ValueError for an unknown rule, or a mean patch that it cannot be calibrated to."""
    rule = rule_of(config)
    if len(rule.scores) > 1 and config.target_patch_bytes is not None:
        raise ValueError(
            f"patching.target_patch_bytes={config.target_patch_bytes} cannot be reached with "
            f"patching.rule={rule.name!r}, which has two thresholds: set target_patch_bytes to "
            "None in the config file, and threshold and threshold_add"
        )


def patch_starts(config, tokens, entropies=None):
    """Returns bool starts [..., S+1] of whole documents under a PatchingConfig.

    tokens: integers [..., S]. entropies: nats [..., S], entropies[..., i] being the uncertainty
    after tokens[..., :i+1]; only rules that need them look at them. Raises ValueError where they
    are missing, and for an unknown rule.
    """
    xp = _namespace(tokens)
    positions = xp.broadcast_to(xp.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
    sharded_like_tokens = xp.zeros_like(tokens, dtype=np.int32)
    opens = starts_after(config, tokens, entropies, positions + sharded_like_tokens)
    starts = _concatenate(xp.ones_like(opens[..., :1]), opens)
    if config.max_patch_length is not None:
        starts = limit_patch_length(starts, config.max_patch_length)
    return starts


def starts_after(config, tokens, entropies, positions, from_start=True, open_bytes=0):
    """Returns whether a patch starts after each position, bool [..., S], without max_patch_length.

    The arguments are those of `Context`; entropies may be of any float type. Raises ValueError as
    `patch_starts` does.
    """
    rule = rule_of(config)
    if rule.needs_entropies:
        if entropies is None:
            raise ValueError(
                f"patching rule {rule.name!r} needs the entropies of the tokens: store them with "
                "the data or run the entropy model first, or choose one of the rules "
                f"{WITHOUT_ENTROPIES}"
            )
        # Stored entropies are float16: compared as they are, they would round the threshold.
        entropies = entropies.astype(np.float32)
        if config.bf16_compat:
            entropies = _bf16(entropies)
            names = ("threshold", "threshold_add")
            rounded = {name: _bf16_threshold(getattr(config, name)) for name in names}
            config = dataclasses.replace(config, **rounded)
    opened = _at_turns(tokens) if config.turns else False
    context = Context(tokens, entropies, positions, from_start, open_bytes, opened)
    num_forced = _namespace(positions).where(from_start, rule.num_forced, 2)
    return rule.opens(config, context) | (positions + 1 < num_forced) | opened


def _at_turns(tokens):
    """Returns which of tokens [..., S] begin or end a turn of a conversation."""
    return (tokens >= TURNS[0] + BYTE_OFFSET) & (tokens <= TURNS[-1] + BYTE_OFFSET)


def limit_patch_length(starts, max_patch_length):
    """Cuts longer patches every `max_patch_length` bytes, from their left end.

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


def document_segments(tokens):
    """Returns int32 [..., S], the number of documents that ended before each token.

    See model.md#masks. An EOS belongs to the document that it ends.
    """
    return _segments(tokens == EOS_ID)


def newline_segments(tokens):
    """Returns int32 [..., S], the number of lines and documents that ended before each token.

    For an entropy model whose context is reset at newlines (paper 4.4). A newline byte belongs
    to the line that it ends, as an EOS does.
    """
    return _segments((tokens == EOS_ID) | (tokens == NEWLINE_ID))


def entropy_segments(tokens, reset_at_newlines):
    """Returns the context segments of the entropy model: documents, or lines of documents."""
    return newline_segments(tokens) if reset_at_newlines else document_segments(tokens)


def _segments(ends):
    ends = ends.astype(np.int32)
    return _namespace(ends).cumsum(ends, axis=-1, dtype=np.int32) - ends


def _bf16(x):
    """Rounds to bfloat16: the published demo compares in it, threshold too (model.md#rounding)."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _bf16_threshold(threshold):
    """Rounds a number, or thresholds of rows, to bfloat16."""
    if hasattr(threshold, "astype"):
        return _bf16(threshold)
    return _bf16(np.float32(threshold)).item()


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

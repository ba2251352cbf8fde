"""UTF-8 as a machine of eight states (Unicode 15, table 3-7), for text that must stay valid.

The state after some bytes says how the character that they end in may go on. It depends on four
bytes at most, so it is found from the text and need not be kept.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.vocabulary import BYTE_OFFSET, EOS_ID, VOCAB_SIZE

START = 0  # between two characters
LONGEST = 4  # bytes of a character
_TAIL = range(0x80, 0xC0)
_RULES = {  # state: {bytes that may come: state after them}
    0: {
        range(0x80): 0,
        range(0xC2, 0xE0): 1,
        range(0xE0, 0xE1): 4,
        range(0xE1, 0xED): 2,
        range(0xED, 0xEE): 5,
        range(0xEE, 0xF0): 2,
        range(0xF0, 0xF1): 6,
        range(0xF1, 0xF4): 3,
        range(0xF4, 0xF5): 7,
    },
    1: {_TAIL: 0},
    2: {_TAIL: 1},
    3: {_TAIL: 2},
    4: {range(0xA0, 0xC0): 1},
    5: {range(0x80, 0xA0): 1},
    6: {range(0x90, 0xC0): 2},
    7: {range(0x80, 0x90): 2},
}
_TO_COME = [0, 1, 2, 3, 2, 2, 3, 3]  # bytes that complete the character


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns the state after each id, and bytes that are then to come (-1: it may not follow)."""
    after = np.zeros((len(_RULES), VOCAB_SIZE), np.int32)
    to_come = np.full((len(_RULES), VOCAB_SIZE), -1, np.int32)
    for state, rules in _RULES.items():
        # A byte that may not follow starts anew, as decoders that replace bad bytes have it.
        for bytes_, then in (_RULES[START] | rules if state else rules).items():
            after[state, [b + BYTE_OFFSET for b in bytes_]] = then
        for bytes_, then in rules.items():
            to_come[state, [b + BYTE_OFFSET for b in bytes_]] = _TO_COME[then]
    to_come[START, EOS_ID] = 0
    return after, to_come


_AFTER, _BYTES_TO_COME = _tables()


def state_after(last: jax.Array) -> jax.Array:
    """Returns states int32 [...] after the last LONGEST ids of a text, int32 [..., LONGEST]."""
    table, state = jnp.asarray(_AFTER), jnp.zeros_like(last[..., 0])
    for i in range(LONGEST):
        state = table[state, last[..., i]]
    return state


def may_follow(state: jax.Array, room: jax.Array) -> jax.Array:
    """Returns bool [..., V]: ids that may come in states [...], with `room` for bytes [...].

    A character that has begun may go on, even where the room does not hold it.
    """
    to_come = jnp.asarray(_BYTES_TO_COME)[state]
    fits = (to_come < room[..., None]) | (state[..., None] != START)
    return (to_come >= 0) & fits

"""Adds the noise of the paper's robustness test to texts (section 5.1, table 3).

The noise of a text depends on the seed and the text alone, not on other texts. Noise works on
characters; a byte that is no UTF-8 counts as a character, and is not changed.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from bltjax.evaluation.multiple_choice import ACCURACIES, Choice, accuracy, bits_per_byte

DROPPED = 0.1  # share of the characters
REPEATED = 0.2
MAX_COPIES = 4  # of a repeated character
WHERE = ("prompt", "completion", "both")


def antspeak(text: str, rng: np.random.Generator) -> str:
    """Writes text in upper case, with a space between characters."""
    return " ".join(text.upper())


def drop(text: str, rng: np.random.Generator) -> str:
    """Drops each character with a probability of 10%."""
    kept = rng.random(len(text)) >= DROPPED
    return "".join(c for c, keep in zip(text, kept, strict=True) if keep)


def random_case(text: str, rng: np.random.Generator) -> str:
    """Writes each character in upper or lower case with equal probability."""
    is_upper = rng.random(len(text)) < 0.5
    return "".join(
        c.upper() if upper else c.lower() for c, upper in zip(text, is_upper, strict=True)
    )


def repeat(text: str, rng: np.random.Generator) -> str:
    """Repeats each character with a probability of 20%, so that there are two to four of it."""
    is_repeated = rng.random(len(text)) < REPEATED
    copies = np.where(is_repeated, rng.integers(2, MAX_COPIES + 1, len(text)), 1)
    return "".join(c * int(n) for c, n in zip(text, copies, strict=True))


def upper(text: str, rng: np.random.Generator) -> str:
    """Writes text in upper case."""
    return text.upper()


KINDS: dict[str, Callable[[str, np.random.Generator], str]] = {
    kind.__name__: kind for kind in (antspeak, drop, random_case, repeat, upper)
}


def noisy(text: str | bytes, kind: str, seed: int = 0) -> str | bytes:
    """Adds noise of one of KINDS to a text, str or bytes. Raises ValueError for other kinds."""
    if kind not in KINDS:
        raise ValueError(f"noise {kind!r} is not known: give one of {', '.join(KINDS)}")
    if isinstance(text, bytes):
        characters = text.decode("utf-8", "surrogateescape")
        return noisy(characters, kind, seed).encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return KINDS[kind](text, np.random.default_rng([seed, int.from_bytes(digest, "big")]))


def noisy_items(
    items: Iterable[Choice], kind: str, where: str = "both", seed: int = 0
) -> list[Choice]:
    """Adds noise to the prompt of items, to all choices ("completion"), or to both.

    Raises ValueError for another `where`.
    """
    check_where(where)
    found = []
    for prompt, choices, answer in items:
        if where != "completion":
            prompt = noisy(prompt, kind, seed)
        if where != "prompt":
            choices = tuple(noisy(choice, kind, seed) for choice in choices)
        found.append(Choice(prompt, choices, answer))
    return found


def check_where(where: str):
    """Raises ValueError unless `where` is one of WHERE."""
    if where not in WHERE:
        raise ValueError(f"where={where!r} must be one of {', '.join(WHERE)}")


def robustness(model, items: Sequence[Choice], seed: int = 0) -> dict:
    """Measures a model on multiple-choice items without noise and with each kind of it.

    Returns dict(clean: result of `multiple_choice.accuracy`; noisy: {kind: {where: the same}};
    mean: each accuracy averaged over kinds and places, as in the paper's table 3; bits_per_byte:
    {"clean" or kind: of prompts with their right completion}). Raises ValueError without items.
    """
    noisy_results = {
        kind: {where: accuracy(model, noisy_items(items, kind, where, seed)) for where in WHERE}
        for kind in KINDS
    }
    found = [result for by_place in noisy_results.values() for result in by_place.values()]
    texts = [item.prompt + item.choices[item.answer] for item in items]
    corpora = {"clean": texts} | {
        kind: [noisy(text, kind, seed) for text in texts] for kind in KINDS
    }
    return dict(
        clean=accuracy(model, items),
        noisy=noisy_results,
        mean={name: sum(result[name] for result in found) / len(found) for name in ACCURACIES},
        bits_per_byte={n: bits_per_byte(model.score(corpus)) for n, corpus in corpora.items()},
    )

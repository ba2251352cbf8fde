"""Multiple choice: a model picks the most likely of several continuations of a prompt.

Items come from a task, or are made from any corpus: the true continuation of a passage is put among
continuations of other passages.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bltjax.runtime.progress import OnProgress
from bltjax.vocabulary import text_bytes

ACCURACIES = ("accuracy", "accuracy_per_byte", "accuracy_mutual")
_SPACE = b" \n\t"
_SEARCH = 24  # bytes within which a space is searched to cut a passage there


class Choice(NamedTuple):
    """An item: a prompt and its possible continuations, of which choices[answer] is right."""

    prompt: str | bytes
    choices: tuple[str | bytes, ...]
    answer: int


def accuracy(model, items: Sequence[Choice], on_progress: OnProgress = None) -> dict:
    """Measures how often a model gives the right choice the highest score.

    Returns dict(items, accuracy: choices scored by their log-likelihood; accuracy_per_byte: by its
    mean over bytes; accuracy_mutual: by log p(choice | prompt) - log p(choice), which is the most
    sensitive for small models; bits_per_byte: of the right choices after their prompts; chance:
    accuracy of guessing). Of equal scores the first counts. Raises ValueError without items, and
    for an answer that is no choice.
    """
    if not items:
        raise ValueError("there are no items: give at least one")
    for i, item in enumerate(items):
        if not 0 <= item.answer < len(item.choices):
            raise ValueError(
                f"items[{i}] has answer={item.answer} and {len(item.choices)} choices: count from 0"
            )
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    scores = iter(model.score_continuations(pairs, on_progress=on_progress))
    priors = iter(
        model.score_continuations([("", choice) for _, choice in pairs], on_progress=on_progress)
    )
    right, answers = np.zeros(3), []
    for item in items:
        of_choices = [next(scores) for _ in item.choices]
        nats = np.array([score.nats for score in of_choices])
        sizes = np.array([max(score.num_bytes, 1) for score in of_choices])
        alone = np.array([next(priors).nats for _ in item.choices])
        right += [x.argmin() == item.answer for x in (nats, nats / sizes, nats - alone)]
        answers.append(of_choices[item.answer])
    return dict(
        items=len(items),
        **dict(zip(ACCURACIES, map(float, right / len(items)), strict=True)),
        bits_per_byte=bits_per_byte(answers),
        chance=sum(1 / len(item.choices) for item in items) / len(items),
    )


def bits_per_byte(scores: Sequence) -> float:
    """Returns the bits per byte of several scores together; NaN without bytes."""
    num_bytes = sum(score.num_bytes for score in scores)
    nats = math.fsum(score.nats for score in scores)
    return nats / math.log(2) / num_bytes if num_bytes else math.nan


def items_from_documents(
    documents: Iterable[str | bytes],
    num_items: int,
    *,
    num_choices: int = 4,
    prompt_bytes: int = 160,
    completion_bytes: int = 48,
    seed: int = 0,
) -> list[Choice]:
    """Makes items of non-overlapping passages, drawn uniformly from all documents.

    Prompts and completions have about the given lengths: they are cut at a space if one is near,
    else between characters, and a completion begins with its space. The same documents and seed
    give the same items. Raises ValueError where the documents have too few passages.
    """
    passages = {}  # by completion, so that no two choices are equal
    for document in documents:
        data = text_bytes(document)
        for prompt, completion in _passages(data, prompt_bytes, completion_bytes):
            passages.setdefault(completion, prompt)
    if len(passages) < max(num_items, num_choices):
        raise ValueError(
            f"the documents have {len(passages)} passages of {prompt_bytes} + {completion_bytes} "
            f"bytes, and {num_items} items of {num_choices} choices are asked for: ask for fewer "
            "or shorter ones, or give more text"
        )
    completions = list(passages)
    rng = np.random.default_rng(seed)
    items = []
    for right in rng.choice(len(completions), num_items, replace=False):
        # Drawn from all but the right one: numbers from it on move up by one.
        others = rng.choice(len(completions) - 1, num_choices - 1, replace=False)
        chosen = [completions[i + (i >= right)] for i in others]
        answer = int(rng.integers(num_choices))
        chosen.insert(answer, completions[right])
        items.append(Choice(passages[completions[right]], tuple(chosen), answer))
    return items


def _passages(data: bytes, prompt_bytes: int, completion_bytes: int):
    """Yields (prompt, completion) for consecutive passages of a document."""
    size = prompt_bytes + completion_bytes
    for start in range(0, len(data) - size - 2 * _SEARCH + 1, size + 2 * _SEARCH):
        middle = _cut(data, start + prompt_bytes)
        prompt, completion = data[_character(data, start) : middle], data[middle:]
        completion = completion[: _cut(data, middle + completion_bytes) - middle]
        if prompt.strip() and completion.strip():
            yield prompt, completion


def _cut(data: bytes, near: int) -> int:
    """Returns the first space within _SEARCH bytes after `near`, else the next character start."""
    found = [at for space in _SPACE if (at := data.find(space, near, near + _SEARCH)) >= 0]
    return min(found) if found else _character(data, near)


def _character(data: bytes, near: int) -> int:
    """Returns the first of `near` .. `near` + 3 at which a UTF-8 character begins."""
    return next((at for at in range(near, near + 4) if data[at] & 0xC0 != 0x80), near)

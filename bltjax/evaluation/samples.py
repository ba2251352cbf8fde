"""Measures the share of generated text that is valid UTF-8."""

import math


def samples(model, num_samples: int, max_new_bytes: int = 256, seed: int = 0) -> dict:
    """Draws texts from BOS at temperature 1 and measures how many of them are valid UTF-8.

    Returns dict(samples, num_bytes, valid: share of the texts, where one that is cut at
    `max_new_bytes` may end in half a character; valid_bytes: share of the bytes that belong to
    valid characters; bits_per_byte: of the texts under the model, an estimate of its entropy rate).
    Raises ValueError for less than one sample.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    seeds = list(range(seed, seed + num_samples))
    texts = model.generate([b""] * num_samples, max_new_bytes, temperature=1.0, seed=seeds)
    scores = model.score(texts)
    num_bytes = sum(map(len, texts))
    num_valid = sum(len(text.decode("utf-8", "ignore").encode()) for text in texts)
    nats = math.fsum(score.nats for score in scores)
    return dict(
        samples=num_samples,
        num_bytes=num_bytes,
        valid=sum(is_valid(t, cut=len(t) >= max_new_bytes) for t in texts) / num_samples,
        valid_bytes=num_valid / num_bytes if num_bytes else math.nan,
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else math.nan,
    )


def is_valid(text: bytes, cut: bool = False) -> bool:
    """Returns True if a text is UTF-8; cut: its last character may be incomplete."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return cut and error.reason == "unexpected end of data"
    return True

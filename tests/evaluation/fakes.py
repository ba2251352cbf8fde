"""Models that cost nothing: what they answer is plain from their text."""

import math

from bltjax.evaluation.continuations import ContinuationScore
from bltjax.evaluation.score import Score


def as_bytes(text) -> bytes:
    return text.encode("utf-8", "ignore") if isinstance(text, str) else bytes(text)


class CaseModel:
    """A nat for each capital, and two for each byte of a continuation that the context has not."""

    def score(self, documents, row_bytes=None, on_progress=None):
        return [self._score(as_bytes(document)) for document in documents]

    def _score(self, data):
        nats = float(sum(65 <= byte < 91 for byte in data))
        return Score(nats, len(data), 0, nats / math.log(2) / len(data) if data else math.nan)

    def score_continuations(self, pairs, on_progress=None):
        return [self._continuation(*map(as_bytes, pair)) for pair in pairs]

    def _continuation(self, context, data):
        new = sum(byte not in context for byte in data)
        return ContinuationScore(self._score(data).nats + 2.0 * new, len(data), new == 0)


class Speller(CaseModel):
    """Answers every question that it is told the answer of, and keeps what it was asked."""

    def __init__(self, answers=None):
        self.answers, self.asked = answers or {}, []

    def generate(self, prompts, max_new_bytes=64, temperature=0.0, seed=0, stop=(), **options):
        asked = dict(max_new_bytes=max_new_bytes, temperature=temperature, seed=seed, stop=stop)
        self.asked.append((list(prompts), asked | options))
        return [self.answers.get(as_bytes(p), b"") for p in prompts]

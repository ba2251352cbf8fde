"""Measures a source on bytes, at each of which it is told whether a token ended there.

The likelihood of a token pays for its bytes, and for that it ends with them. A byte model whose
patches are tokens (benchmarks/token_patches.py) is told the latter, and pays for bytes alone. To be
compared with it the source must be told too. Let S(x) be the likelihood of all tokens that begin
with the bytes x, and p(x) that of the token x itself. Then the bytes b_1 ... b_n of a token cost

    -log S(b_1) - sum over k < n of log S(b_1 ... b_k+1) / (S(b_1 ... b_k) - p(b_1 ... b_k))
"""

import bisect

import numpy as np


class ToldEnds:
    """The tokens of a source in the order of their bytes.

    pieces: the bytes of each id that has some.
    """

    def __init__(self, pieces: dict[int, bytes]):
        ordered = sorted(pieces.items(), key=lambda item: item[1])
        self._pieces = pieces
        self._ids = np.array([number for number, _ in ordered])
        self._texts = [text for _, text in ordered]
        self._ranges: dict[bytes, list[tuple[int, int, int]]] = {}

    def nats(self, logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Returns what the bytes of tokens cost, float64 [N]; an id without bytes costs itself.

        logits: [N, T], of the source, at the place of each token. ids: [N], of these tokens.
        """
        shares = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        rows = zip(shares, shares[:, self._ids], ids.tolist(), strict=True)
        return np.array([self._nats(*row) for row in rows])

    def _nats(self, shares: np.ndarray, in_order: np.ndarray, number: int) -> float:
        if number not in self._pieces:
            return -np.log(shares[number])
        nats, longer = 0.0, 1.0
        for begin, end_of_same, end in self._ranges_of(self._pieces[number]):
            nats -= np.log(in_order[begin:end].sum() / longer)
            longer = in_order[end_of_same:end].sum()
        return nats

    def _ranges_of(self, text: bytes) -> list[tuple[int, int, int]]:
        """Returns, of each prefix, where tokens that begin with it are; the token itself is first.

        (begin, end of the token itself, end)
        """
        if text not in self._ranges:
            self._ranges[text] = [self._range(text[:k]) for k in range(1, 1 + len(text))]
        return self._ranges[text]

    def _range(self, prefix: bytes) -> tuple[int, int, int]:
        begin, end_of_same = (
            find(self._texts, prefix) for find in (bisect.bisect_left, bisect.bisect_right)
        )
        size = len(prefix)
        end = bisect.bisect_left(self._texts, True, key=lambda text: text[:size] > prefix)
        return begin, end_of_same, end

"""Log-probabilities of every byte are those that scores are the sums of."""

import numpy as np
import pytest

import bltjax
from tests import directories

TEXTS = ["in a café on the road", b"\xff\x00 any bytes", "", "x" * 62, "x" * 63, "ខ្មែរ"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bltjax.load(directories.meta_with_entropy_model(tmp_path_factory.mktemp("log_p") / "m"))


def data_of(text):
    return text.encode() if isinstance(text, str) else text


def test_sums_are_the_scores_of_continuations(model):
    found = model.log_probs(TEXTS)
    scores = model.score_continuations([("", text) for text in TEXTS])
    for text, log_p, score in zip(TEXTS, found, scores, strict=True):
        data = np.frombuffer(data_of(text), np.uint8).astype(int)
        assert log_p.shape == (len(data) + 1, 260) and log_p.dtype == np.float32
        np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=1e-5)
        nats = -log_p[np.arange(len(data)), data + 4].sum(dtype=np.float64)
        assert nats == pytest.approx(score.nats, rel=1e-6, abs=1e-9)
        best = np.where(np.arange(260) >= 4, log_p, -np.inf)
        best[:, 2] = log_p[:, 2]  # EOS
        assert (best.argmax(1)[:-1] == data + 4).all() == score.is_greedy


def test_a_text_does_not_depend_on_the_others_nor_on_what_follows(model):
    (alone,) = model.log_probs([TEXTS[0]])
    together = model.log_probs(TEXTS)[0]
    np.testing.assert_array_equal(alone, together)
    (longer,) = model.log_probs([data_of(TEXTS[0]) + b"\xfe side"])
    np.testing.assert_allclose(longer[: len(alone)], alone, atol=1e-5)
    tokens = bltjax.vocabulary.encode(TEXTS[0], add_eos=False)[None]
    logits = model.logits(tokens)[0].astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(alone, exact, atol=1e-4)


def test_what_is_no_list_of_texts_is_refused(model):
    with pytest.raises(ValueError, match=r"documents\[1\] is int"):
        model.log_probs(["a", 3])
    with pytest.raises(ValueError, match="documents is one str"):
        model.log_probs("text")

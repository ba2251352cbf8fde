"""Valid UTF-8 by hand, and how samples are drawn."""

import math

import pytest

from bltjax.evaluation.samples import is_valid, samples
from tests.evaluation.fakes import CaseModel


@pytest.mark.parametrize(
    "text, whole, cut",
    [
        (b"", True, True),
        (b"plain", True, True),
        ("naïve 日本".encode(), True, True),
        ("日本".encode()[:-1], False, True),
        ("日本".encode()[:-2], False, True),
        ("😀".encode()[:1], False, True),
        (b"a\xe6\x97b", False, False),  # broken in the middle
        (b"a\xff", False, False),  # begins no character
        (b"\xed\xa0", False, False),  # a surrogate is none
    ],
)
def test_valid_utf8_by_hand(text, whole, cut):
    assert is_valid(text) == whole and is_valid(text, cut=True) == cut


class Writer(CaseModel):
    def generate(self, prompts, max_new_bytes, temperature, seed):
        assert (prompts, max_new_bytes, temperature) == ([b""] * 4, 4, 1.0)
        assert seed == [7, 8, 9, 10]
        return ["日".encode() + b"\xe6", b"AB\xe6", b"\xffabc", b"cd"]  # the second ended itself


def test_samples():
    found = samples(Writer(), 4, max_new_bytes=4, seed=7)
    assert found["valid"] == 2 / 4 and found["num_bytes"] == 13
    assert found["valid_bytes"] == (3 + 2 + 3 + 2) / 13
    assert found["bits_per_byte"] == pytest.approx(2 / math.log(2) / 13)
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        samples(Writer(), 0)

"""The model in the package: what its card says of it, and that it has learnt its sources."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import bltjax
from bltjax.checkpoints import formats
from bltjax.checkpoints.demo import DIRECTORY
from bltjax.checkpoints.pytorch import hf_config
from bltjax.checkpoints.weights import Lengths
from bltjax.config import read_config
from bltjax.data.sources.files import python_library_root
from bltjax.vocabulary import encode

ROOT = Path(__file__).parents[1]
CARD = (DIRECTORY / "README.md").read_text()
MOST_BYTES = 8_000_000

# Written for this test, in the manner of the sources.
CODE = b'''\
class Stack:
    """A stack of items, the last one first."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        self._items.append(item)

    def pop(self):
        if not self._items:
            raise IndexError("pop from an empty stack")
        return self._items.pop()

    def __len__(self):
        return len(self._items)
'''
DOCS = b"""\
.. function:: rotate(sequence, count=1)

   Return a new list with the items of *sequence* moved *count* places to the
   left.  If *count* is negative, they are moved to the right.  Raise
   :exc:`ValueError` if *sequence* is empty.

   .. versionadded:: 3.2
"""
VERSES = b"""\
4. And it came to pass on the third day, that the servant of the king went up unto the city, and \
spake unto the people, saying, 5. Thus saith the king, Let every man of you return unto his house, \
and unto his land: for I will be with you, and with your children after you.
"""
BITS = {CODE: 1.3, DOCS: 1.5, VERSES: 1.25}  # per byte at most; the card has those of whole sources


@pytest.fixture(scope="module")
def model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing about it has to be assumed
        return bltjax.load("demo")


def test_it_is_the_model_of_its_config(model):
    """As Hugging Face's format writes the settings of both, or says that it cannot."""
    config, weights = read_config("demo"), formats.read(DIRECTORY)
    lengths = Lengths(row_bytes=config.blt_training.row_bytes)
    wanted = weights._replace(
        blt=config.blt, entropy_model=config.entropy_model, lengths=lengths, params={}
    )
    problems, wanted_problems = [], []
    found = hf_config.write(weights, "bfloat16", problems)
    assert found == hf_config.write(wanted, "bfloat16", wanted_problems)
    assert problems == wanted_problems
    assert model.patching.rule == config.patching.rule
    assert {leaf.dtype.name for leaf in formats.flat(weights.params).values()} == {"bfloat16"}


def test_it_is_small_and_its_card_counts_it():
    files = [path for path in DIRECTORY.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    assert total <= MOST_BYTES
    (said,) = re.findall(r"in bfloat16, ([\d,]+) bytes of files", CARD)
    assert int(said.replace(",", "")) == total - (DIRECTORY / "README.md").stat().st_size


@pytest.mark.parametrize("text", BITS, ids=["code", "docs", "verses"])
def test_it_has_learnt_its_sources(model, text):
    (score,) = model.score([text])
    assert score.bits_per_byte < BITS[text]


def test_what_it_writes_is_made_of_words_of_its_sources(model):
    """Drawn text, so that no rounding decides; other words than theirs: see the test below."""
    prompts = ["import os\n\n\ndef ", "   Return ", "    The ", "And the king said unto "]
    options = dict(temperature=0.7, top_p=0.9, seed=1)
    written = model.generate(prompts, 200, **options)
    assert model.generate(prompts, 200, **options) == written
    text = b" ".join(written).decode(errors="replace")
    assert text.count("\ufffd") < 10  # UTF-8, but for a character that the end may cut
    assert len(text) > 400 and len(set(text)) > 20
    assert share_of_known_words(text) > 0.6


def share_of_known_words(text: str) -> float:
    """The share of the words of three letters or more that the standard library has, too."""
    library = b" ".join(path.read_bytes() for path in python_library_root().glob("*.py"))
    known = set(re.findall(rb"[a-zA-Z]{3,}", library.lower()))
    words = re.findall(rb"[a-zA-Z]{3,}", text.lower().encode())
    return sum(word in known for word in words) / len(words)


def test_other_text_is_not_made_of_them():
    assert share_of_known_words("hsdki wqp zzoer aosid qwept mnbvx rtyui lkjhg") < 0.2


def test_transformers_opens_it_and_computes_the_same(model):
    """Trained weights, whose logits are larger than those of random ones."""
    torch = pytest.importorskip("torch", reason="the oracle needs torch (CPU)")
    transformers = pytest.importorskip("transformers")
    theirs, told = transformers.BltForCausalLM.from_pretrained(
        DIRECTORY, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokens = encode("def push(self, item):  # And the king said")[None, :-1]  # without EOS
    with torch.no_grad():
        logits = theirs.eval()(torch.as_tensor(tokens, dtype=torch.long), use_cache=False).logits
    np.testing.assert_allclose(model.logits(tokens), logits.numpy(), rtol=0, atol=1e-4)

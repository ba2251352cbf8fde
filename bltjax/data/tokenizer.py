"""Byte-level BPE tokenizer for the token models that byte models are compared with.

Ids begin with those of `vocabulary`, 4 special ids and the 256 single bytes; merged pairs follow.
Before merging, text is cut by the regular expression of Llama 3, whose tokenizer the paper's
baselines use (section 4.2): words keep the space before them, digits come in threes, and line ends
stay with the blanks before them. That cuts words at combining marks, such as the vowel signs of
Hindi, Tamil or Thai, which a second pattern counts among the letters; text without spaces between
words, such as Thai and Khmer, then has whole phrases between its cuts. Bytes that are not UTF-8
become single bytes. Training needs the
`tokenizers` library (extra `tokens`); a tokenizer is saved as a file of that library.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bltjax.data.sources.libraries import need
from bltjax.runtime.files import replacing
from bltjax.runtime.paths import as_path, read_whole
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, VOCAB_SIZE, text_bytes

# No merge can produce these, since letters are cut from the characters around them.
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|spare|>")
CUTS = {  # by the pattern's name, config/run.py:PATTERNS
    name: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?" + word + r"+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for name, word in dict(letters=r"\p{L}", marks=r"[\p{L}\p{M}]").items()
}
LEAST_PAIRS = 2  # occurrences of a pair that is merged
# Longer texts are encoded in parts, since cutting takes memory in proportion to their length.
PART_CHARACTERS = 1_000_000
REMEDY = "train one with bltjax.data.tokenizer.train"
INVALID = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as surrogateescape maps them


class Tokenizer:
    """A tokenizer, from `train` or `load`. It can be pickled.

    text: the content of a tokenizer.json. Raises ValueError for one whose ids are not ours.
    """

    def __init__(self, text: str):
        self.text = text
        self._pieces = _pieces(text)

    def __reduce__(self):
        return Tokenizer, (self.text,)

    def __len__(self) -> int:
        return len(self._pieces)

    def __eq__(self, other) -> bool:
        return isinstance(other, Tokenizer) and self.text == other.text

    def __hash__(self) -> int:  # programs are compiled for a tokenizer
        return hash(self.text)

    @property
    def digest(self) -> str:
        """Hash that identifies the tokenizer: 16 hexadecimal digits."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()

    def byte_lengths(self, vocab_size: int | None = None) -> np.ndarray:
        """Returns the number of bytes that each id stands for, int32 [V]; 0 for special ids.

        vocab_size: V of a model, whose further ids stand for no bytes. Raises ValueError where it
        is less than the tokenizer's.
        """
        lengths = np.array([len(piece) for piece in self._pieces], np.int32)
        size = len(lengths) if vocab_size is None else vocab_size
        if size < len(lengths):
            raise ValueError(
                f"the tokenizer has {len(lengths)} ids and the model {size}: raise "
                "token_model.vocab_size, or bring a smaller tokenizer"
            )
        return np.pad(lengths, (0, size - len(lengths)))

    def encode(self, text: bytes | str, add_bos: bool = True, add_eos: bool = True) -> np.ndarray:
        """Returns the ids int32 [S] of a document. A str is encoded as in `vocabulary.encode`."""
        # Stretches of UTF-8 and of other bytes alternate; the first is UTF-8, maybe empty.
        stretches = INVALID.split(text_bytes(text).decode("utf-8", "surrogateescape"))
        ids = [BOS_ID] * add_bos
        for i, stretch in enumerate(stretches):
            if i % 2:
                ids += [ord(c) - 0xDC00 + BYTE_OFFSET for c in stretch]
                continue
            for start in range(0, len(stretch), PART_CHARACTERS):
                part = stretch[start : start + PART_CHARACTERS]
                (found,) = self._library.encode_batch_fast([part], add_special_tokens=False)
                ids += found.ids
        return np.array(ids + [EOS_ID] * add_eos, np.int32)

    def decode(self, ids) -> bytes:
        """Returns the bytes of ids [S], without special ids; inverts `encode`.

        Raises ValueError for ids that the tokenizer does not have.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise ValueError(
                f"ids lie in {ids.min()}..{ids.max()}: the tokenizer has 0..{len(self) - 1}"
            )
        return b"".join(self._pieces[i] for i in ids)

    def save(self, path: Path):
        """Writes a tokenizer.json, atomically."""
        with replacing(as_path(path)) as file:
            file.write(self.text.encode())

    @functools.cached_property
    def _library(self):
        return need("tokenizers", "tokens").Tokenizer.from_str(self.text)


def load(path: Path) -> Tokenizer:
    """Loads a tokenizer from a file that `save` wrote. Raises ValueError, or OSError."""
    try:
        return Tokenizer(read_whole(as_path(path)).decode())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def train(documents: Iterable[bytes], vocab_size: int, pattern: str = "letters") -> Tokenizer:
    """Trains a tokenizer of at most `vocab_size` ids by merging the most frequent pairs.

    pattern: of `CUTS`, which the tokenizer keeps. The result does not depend on the order of the
    documents. Raises ValueError for an unknown pattern, and for a vocabulary without room for every
    byte.
    """
    if pattern not in CUTS:
        raise ValueError(f"pattern={pattern!r} must be one of {', '.join(CUTS)}")
    if vocab_size < VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} must be at least {VOCAB_SIZE}: bytes take those")
    library = need("tokenizers", "tokens")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(CUTS[pattern]), "isolated"),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST_PAIRS,
        special_tokens=list(SPECIAL),
        initial_alphabet=list(byte_characters()),
        show_progress=False,
    )
    texts = (
        stretch[start : start + PART_CHARACTERS]
        for document in documents
        for stretch in INVALID.split(document.decode("utf-8", "surrogateescape"))[::2]
        for start in range(0, len(stretch), PART_CHARACTERS)
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(_in_our_order(json.loads(tokenizer.to_str())))


def _in_our_order(content: dict) -> str:
    """Returns the tokenizer.json with our ids for bytes and special ids, which no text can name."""
    vocab = content["model"]["vocab"]
    vocab |= {name: i for i, name in enumerate(SPECIAL)}
    vocab |= {c: BYTE_OFFSET + byte for c, byte in byte_characters().items()}
    content["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    content["added_tokens"] = []
    return json.dumps(content, ensure_ascii=False)


def _pieces(text: str) -> list[bytes]:
    """Returns the bytes of each id, none for special ids. Raises ValueError for ids not ours."""
    try:
        content = json.loads(text)
        vocab, added = content["model"]["vocab"], content["added_tokens"]
        by_id = sorted(vocab, key=vocab.get)
        ours = sorted(vocab.values()) == list(range(len(vocab))) and not added
        ours &= tuple(by_id[:BYTE_OFFSET]) == SPECIAL
        ours &= by_id[BYTE_OFFSET:VOCAB_SIZE] == list(byte_characters())
        byte_of = byte_characters()
        pieces = [bytes(byte_of[c] for c in token) for token in by_id[BYTE_OFFSET:]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no tokenizer of ours ({error!r}): {REMEDY}") from error
    if not ours:
        raise ValueError(
            f"a tokenizer with other ids than 4 special ones, 256 bytes and merges: {REMEDY}"
        )
    return [b""] * BYTE_OFFSET + pieces


@functools.cache
def byte_characters() -> dict[str, int]:
    """Returns {printable character: byte}, as byte-level BPE files (since GPT-2) write bytes."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = itertools.count(256)
    return {chr(byte if byte in plain else next(moved)): byte for byte in range(256)}

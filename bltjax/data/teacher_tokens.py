"""The tokenizer of a model that a byte model learns from: where its tokens end in a text.

Byte-level BPE of others, as GPT-2, Llama 3, Qwen and SmolLM have it, from a tokenizer.json. Tokens
cover the bytes of any text exactly: texts are not normalized, no space is put before them, and
special tokens are not looked for in them. Bytes that are not UTF-8, and those that have no token of
their own, are tokens alone.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator

import numpy as np

from bltjax.data.sources.libraries import need
from bltjax.data.tokenizer import INVALID, PART_CHARACTERS, byte_characters

KINDS = "give one of byte-level BPE, as of GPT-2, Llama 3, Qwen or SmolLM"


class TeacherTokenizer:
    """A tokenizer; it can be pickled.

    text: the content of a tokenizer.json. bos: id that begins each text; None: what the file says
    of it. Raises ValueError for one whose tokens are not of whole bytes.
    """

    def __init__(self, text: str, bos: int | None = None):
        self.text = text
        content = _parsed(text)
        self.bos = _first_id(text) if bos is None else bos
        self._plain = json.dumps(_without_specials(content))
        vocab, byte_of = content["model"]["vocab"], byte_characters()
        added = {token["id"] for token in content.get("added_tokens") or []}
        self._texts = {number: token for token, number in vocab.items() if number not in added}
        self._lengths = np.zeros(1 + max(vocab.values()), np.int64)
        for token, number in vocab.items():
            self._lengths[number] = len(token)
        alone = {byte: vocab.get(character) for character, byte in byte_of.items()}
        unknown = vocab.get(content["model"].get("unk_token"), 0)
        self._alone = np.array(
            [unknown if alone[b] is None else alone[b] for b in range(256)], np.int64
        )
        of_texts = itertools.chain(self._texts, self._alone.tolist(), [self.bos or 0])
        self.num_ids = 1 + max(of_texts)  # that a model of these tokens has, at least
        missing = bytes(byte for byte, number in alone.items() if number is None)
        self._missing = re.compile(b"([" + re.escape(missing) + b"]+)") if missing else None

    def __reduce__(self):
        return TeacherTokenizer, (self.text, self.bos)

    def __eq__(self, other) -> bool:
        return isinstance(other, TeacherTokenizer) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @functools.cached_property
    def pieces(self) -> dict[int, bytes]:
        """Bytes of each id that is not special."""
        byte_of = byte_characters()
        return {
            number: bytes(byte_of[character] for character in token)
            for number, token in sorted(self._texts.items())
            if set(token) <= byte_of.keys()
        }

    @functools.cached_property
    def digest(self) -> str:
        """Hash that identifies the tokenizer: 16 hexadecimal digits."""
        known = f"{self.bos} {self.text}"
        return hashlib.blake2b(known.encode(), digest_size=8).hexdigest()

    def encode(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids [N] of a text, without that of its beginning, and their bytes [N]."""
        parts = [self._encode_part(*part) for part in self._parts(data)]
        ids = np.concatenate([np.zeros(0, np.int64), *(found for found, _ in parts)])
        lengths = np.concatenate([np.zeros(0, np.int64), *(found for _, found in parts)])
        if lengths.sum() != len(data):
            raise ValueError(
                f"the teacher's tokens have {lengths.sum()} bytes of a text of {len(data)}: {KINDS}"
            )
        return ids, lengths

    def token_ends(self, data: bytes) -> np.ndarray:
        """Returns `Row.teacher_tokens` of a document: int32 [len(data) + 2], from BOS to EOS."""
        found = np.zeros(len(data) + 2, np.int32)
        ids, lengths = self.encode(data)
        found[np.cumsum(lengths)] = ids + 1
        if self.bos is not None:
            found[0] = self.bos + 1
        return found

    def _parts(self, data: bytes) -> Iterator[tuple[bytes | str, bool]]:
        """Yields texts to be encoded, and bytes of which each is a token (True)."""
        for i, stretch in enumerate(self._missing.split(data) if self._missing else [data]):
            if i % 2:
                yield stretch, True
                continue
            for k, text in enumerate(INVALID.split(stretch.decode("utf-8", "surrogateescape"))):
                if k % 2:
                    yield text.encode("utf-8", "surrogateescape"), True
                    continue
                for start in range(0, len(text), PART_CHARACTERS):
                    yield text[start : start + PART_CHARACTERS], False

    def _encode_part(self, part: bytes | str, alone: bool) -> tuple[np.ndarray, np.ndarray]:
        if alone:
            return self._alone[np.frombuffer(part, np.uint8)], np.ones(len(part), np.int64)
        (found,) = self._library.encode_batch_fast([part], add_special_tokens=False)
        ids = np.array(found.ids, np.int64)
        return ids, self._lengths[ids]

    @functools.cached_property
    def _library(self):
        return need("tokenizers", "tokens").Tokenizer.from_str(self._plain)


def _parsed(text: str) -> dict:
    """Returns the content of a tokenizer.json. Raises ValueError for other kinds of tokenizers."""
    try:
        content = json.loads(text)
        kind, vocab = content["model"]["type"], content["model"]["vocab"]
        told = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no tokenizer.json of the library tokenizers ({error!r})") from error
    if kind != "BPE" or not isinstance(vocab, dict) or '"ByteLevel"' not in told:
        raise ValueError(f"a tokenizer of the kind {kind!r} without whole bytes: {KINDS}")
    return content


def _without_specials(content: dict) -> dict:
    """Returns a tokenizer that splits and merges, and does nothing else with a text."""
    nothing = dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))
    return (
        content
        | nothing
        | dict(added_tokens=[], pre_tokenizer=_without_prefix(content.get("pre_tokenizer")))
    )


def _without_prefix(part):
    """Returns a part of a tokenizer that puts no space before a text."""
    if isinstance(part, list):
        return [_without_prefix(x) for x in part]
    if not isinstance(part, dict):
        return part
    off = dict(add_prefix_space=False) if "add_prefix_space" in part else {}
    return {name: _without_prefix(x) for name, x in part.items()} | off


def _first_id(text: str) -> int | None:
    """Returns the special id that a tokenizer puts before each text; None: it puts none."""
    library = need("tokenizers", "tokens").Tokenizer.from_str(text)
    plain, with_special = (
        library.encode("a", add_special_tokens=special).ids for special in (False, True)
    )
    return with_special[0] if with_special[:1] != plain[:1] else None

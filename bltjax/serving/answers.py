"""Answers in the shape that OpenAI's clients read, whole or in pieces.

Everything here is plain Python on the bytes that a model wrote.
"""

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bltjax.inference.jobs import Counts
from bltjax.serving import log_probs
from bltjax.serving.asked import Asked, Prompt
from bltjax.serving.log_probs import Entry
from bltjax.serving.text import ByteText
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, decode, is_drawable


class Delta(NamedTuple):
    """Growth of one of the texts."""

    index: int
    text: str
    entries: list[Entry]
    finish: str | None


class Choice:
    """One of the texts of an answer as it grows; index: its number among them."""

    def __init__(self, index: int, asked: Asked):
        self.index, self._num_top = index, asked.num_top
        self._text, self.counts, self.finish = ByteText(), Counts(), None

    def begin(self, prompt: Prompt, log_p: np.ndarray | None) -> Delta:
        """Returns the prompt as the beginning of the text; log_p: float32 [bytes + 1, num_ids]."""
        text, offsets = self._text.add(prompt.data)
        if log_p is None:
            return Delta(self.index, text, [], None)
        found = log_probs.entries(_ids(prompt.data), log_p[:-1], offsets, self._num_top)
        if prompt.shows_bos:
            found = [log_probs.unpredicted(BOS_ID, 0), *found]
        elif found:
            found[0] = log_probs.unpredicted(found[0].token, 0)
        return Delta(self.index, text, found, None)

    def add(self, data: bytes, log_p: np.ndarray | None, finish: str | None) -> Delta:
        """Returns what new bytes add; log_p: float32 [bytes, num_ids], one row more with EOS."""
        text, offsets = self._text.add(data, final=finish is not None)
        found = []
        if self._num_top is not None and log_p is not None:
            tokens = _ids(data)
            if len(log_p) > len(tokens):
                tokens, offsets = [*tokens, EOS_ID], [*offsets, self._text.num_characters]
            found = log_probs.entries(tokens, log_p, offsets, self._num_top)
        self.finish = finish
        return Delta(self.index, text, found, finish)


def most_probable(log_p: np.ndarray) -> tuple[bytes, str]:
    """Returns the most probable byte and "length", or nothing and "stop" where that is EOS.

    log_p: float32 [num_ids].
    """
    ids = np.arange(len(log_p))
    best = np.where(is_drawable(ids, len(ids)), log_p, -np.inf).argmax()
    return decode([best]), "stop" if best == EOS_ID else "length"


def _ids(data: bytes) -> list[int]:
    return [byte + BYTE_OFFSET for byte in data]


# ---- the objects


class Form:
    """The objects of one answer; chat: of `/v1/chat/completions`."""

    def __init__(self, model: str, chat: bool, asked: Asked):
        self.chat, self.asked = chat, asked
        prefix = "chatcmpl" if chat else "cmpl"
        self._head = dict(
            id=f"{prefix}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=model,
            system_fingerprint=None,
        )

    def whole(self, deltas: Iterable[Delta], usage: dict) -> dict:
        """Returns the answer of a request that is not streamed."""
        texts: list[list[Delta]] = [[] for _ in range(self.asked.num_texts)]
        for delta in deltas:
            texts[delta.index].append(delta)
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(i, parts) for i, parts in enumerate(texts)]
        return dict(self._head, object=kind, choices=choices, usage=usage)

    def _choice(self, index: int, parts: Sequence[Delta]) -> dict:
        text = "".join(part.text for part in parts)
        found = [entry for part in parts for entry in part.entries]
        choice = dict(index=index, finish_reason=parts[-1].finish, logprobs=self._logprobs(found))
        if self.chat:
            return choice | dict(message=dict(role="assistant", content=text, refusal=None))
        return choice | dict(text=text)

    def piece(self, delta: Delta) -> dict:
        """Returns one object of a stream."""
        choice = dict(index=delta.index, finish_reason=delta.finish)
        choice["logprobs"] = self._logprobs(delta.entries) if delta.entries else None
        if self.chat:
            choice["delta"] = dict(content=delta.text) if delta.text or not delta.finish else {}
        else:
            choice["text"] = delta.text
        return self._chunk([choice])

    def opening(self) -> list[dict]:
        """Returns the objects with which a stream begins: in a chat, who speaks."""
        if not self.chat:
            return []
        role = dict(role="assistant", content="")
        return [
            self._chunk([dict(index=i, delta=role, finish_reason=None, logprobs=None)])
            for i in range(self.asked.num_texts)
        ]

    def closing(self, usage: dict) -> list[dict]:
        """Returns the objects with which a stream ends: the usage, where it was asked for."""
        return [dict(self._chunk([]), usage=usage)] if self.asked.include_usage else []

    def _chunk(self, choices: list[dict]) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        usage = dict(usage=None) if self.asked.include_usage else {}
        return dict(self._head, object=kind, choices=choices, **usage)

    def _logprobs(self, found: Sequence[Entry]) -> dict | None:
        if self.asked.num_top is None:
            return None
        return log_probs.of_chat(found) if self.chat else log_probs.of_completions(found)


def usage(asked: Asked, counts: Iterable[Counts]) -> dict:
    """Returns the bytes of an answer, in the words for tokens, and the work that it took.

    patches: all that the global stack read. global_calls: after the prompts, of each text; a call
    serves all rows at once.
    """
    counts = sum(counts, Counts())
    read = sum(len(prompt.data) for prompt in asked.prompts)
    return dict(
        prompt_tokens=read,
        completion_tokens=counts.new_bytes,
        total_tokens=read + counts.new_bytes,
        patches=counts.patches,
        global_calls=counts.global_calls,
    )

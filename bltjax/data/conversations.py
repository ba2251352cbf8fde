"""Conversations as documents: turns between delimiters, and which of their bytes are to be learned.

    F8 system F9 user FA assistant       each turn ends with FB

What is learned is what an assistant says, and the end of its turns. The delimiters tell that of any
part of a document, so records hold nothing but the bytes.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bltjax.config.chat import ROLES, ChatConfig
from bltjax.vocabulary import text_bytes

FIELDS = ("messages", "prompt", "completion")  # of a record with a conversation


def of_record(record: Mapping, chat: ChatConfig) -> bytes:
    """Returns the document of a record with `messages`, or with `prompt` and `completion`.

    Raises ValueError for what is no conversation from which something can be learned.
    """
    messages = record.get("messages")
    if messages is None:
        both = [record.get(name) for name in ("prompt", "completion")]
        if None in both:
            there = ", ".join(map(repr, list(record)[:12])) or "none"
            raise ValueError(f"no field 'messages', nor 'prompt' and 'completion': it has {there}")
        messages = [
            turn
            for role, part in zip(("user", "assistant"), both, strict=True)
            for turn in (part if _is_list(part) else [dict(role=role, content=part)])
        ]
    data = to_bytes(messages, chat)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn of the assistant: there is nothing to learn")
    return data


def to_bytes(messages: Sequence[Mapping], chat: ChatConfig, answer: bool = False) -> bytes:
    """Returns a conversation as bytes; answer: up to where the assistant's next turn begins.

    messages: dicts with `role` (system, user or assistant) and `content`. Raises ValueError for
    other ones, for an assistant that speaks first, and for delimiters within a content.
    """
    turns = list(_turns(messages))
    opened = "".join(role[0] for role, _ in turns).lstrip("s")
    if opened.startswith("a"):
        raise ValueError("an assistant turn comes first: begin with one of the user")
    delimiters = [chat.delimiter(name) for name in (*ROLES, "end")]
    for i, (_, content) in enumerate(turns):
        for delimiter in delimiters:
            if delimiter in content:
                raise ValueError(
                    f"messages[{i}] holds {delimiter!r}, which is a delimiter of turns: take it "
                    "out, or choose other ones (data.chat)"
                )
    end = chat.delimiter("end")
    data = b"".join(chat.delimiter(role) + content + end for role, content in turns)
    return data + chat.delimiter("assistant") * answer


def _turns(messages) -> Iterator[tuple[str, bytes]]:
    """Yields role and content of each message."""
    if not _is_list(messages) or not len(messages):
        raise ValueError("messages must be a list of dicts with role and content, at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") is None:
            raise ValueError(f"messages[{i}] has no role: give dicts with role and content")
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{i}] has the role {role!r}: it must be one of {ROLES}")
        if _is_list(content):  # parts, as of clients of chat completions
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            content = "".join(parts) if all(isinstance(p, str) for p in parts) else None
        if not isinstance(content, (str, bytes)):
            raise ValueError(f"messages[{i}] has no text as its content: give a string")
        yield role, text_bytes(content)


def learned(data: bytes, chat: ChatConfig) -> np.ndarray:
    """Returns which bytes of a document are an assistant's, or end its turns: bool [len(data)]."""
    found = np.zeros(len(data), bool)
    opening, end = chat.delimiter("assistant"), chat.delimiter("end")
    at = data.find(opening)
    while at >= 0:
        start = at + len(opening)
        stop = data.find(end, start)
        stop = len(data) if stop < 0 else stop + len(end)
        found[start:stop] = True
        at = data.find(opening, stop)
    return found


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))

"""Bytes as text on the wire: valid UTF-8 that never ends in half a character."""

import codecs

from bltjax.vocabulary import BYTE_OFFSET, EOS_ID

BOS_NAME, EOS_NAME = "<|bos|>", "<|eos|>"
BOS_TOKEN = 256  # may begin a prompt of integers; the bytes are 0 to 255


class ByteText:
    """Decodes a text that comes in pieces.

    Half a character, at most three bytes, waits for its other half. Bytes that are part of no
    character become U+FFFD. The pieces add up to what decoding the whole gives.
    """

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.num_characters = 0  # of the text so far

    def add(self, data: bytes, final: bool = False) -> tuple[str, list[int]]:
        """Returns the text that is now whole, and for each byte the offset of its character.

        Offsets count characters from the beginning of the whole text; of bytes that turn out to be
        no character, that of the first one. final: nothing will follow.
        """
        shown, offsets = [], []
        for byte in data:
            text = self._decoder.decode(bytes([byte]))
            shown.append(text)
            self.num_characters += len(text)
            waits = bool(self._decoder.getstate()[0])
            offsets.append(self.num_characters - (not waits))
        if final:
            shown.append(self._decoder.decode(b"", True))
            self.num_characters += len(shown[-1])
        return "".join(shown), offsets


def name_of_byte(byte: int) -> str:
    r"""Returns a printable name that no other byte has: ASCII as itself, otherwise \xNN."""
    return chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}"


def name_of_id(token: int) -> str:
    """Returns the name of an id that can be drawn: a byte's, or that of EOS."""
    return EOS_NAME if token == EOS_ID else name_of_byte(token - BYTE_OFFSET)


def bytes_of_id(token: int) -> list[int]:
    """Returns the byte of an id in a list; none for EOS."""
    return [] if token == EOS_ID else [token - BYTE_OFFSET]

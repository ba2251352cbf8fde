"""What each byte of a file is (a low byte of a sample, red, a note, code), and what it costs."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bltjax.patching.boundaries import needs_entropies, patch_starts
from bltjax.vocabulary import BYTE_OFFSET, encode

WINDOW = 1024  # ids that are predicted together, as in training
BATCH = 8


class Costs(NamedTuple):
    """Of each byte of a file, [bytes]."""

    starts: np.ndarray  # bool, whether a patch starts with it
    entropies: np.ndarray | None  # bits, of the entropy model's prediction; None under other rules
    bits: np.ndarray  # -log2 p under the BLT


def costs(model, data: bytes) -> Costs:
    """What a BLT makes of a file; its rows do not see what is before them, as in training."""
    ids = encode(data)
    entropies = _entropies(model, ids) if needs_entropies(model.patching) else None
    starts = patch_starts(model.patching, ids, entropies)
    bits = _bits(model, ids, starts)
    own = slice(1, len(ids) - 1)  # neither BOS nor EOS
    if entropies is not None:
        entropies = entropies[: len(data)] / np.log(2)  # the first is after BOS, about byte 0
    return Costs(starts[own], entropies, bits[: len(data)])


def _entropies(model, ids: np.ndarray) -> np.ndarray:
    import jax  # late: it takes seconds

    from bltjax.evaluation.score import document_entropies

    with jax.set_mesh(model.mesh):
        entropy_model = model.entropy_config, model.params["entropy_model"]
        return document_entropies(*entropy_model, [ids], model.patching.reset_at_newlines)[0]


def _bits(model, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Bits of ids[1:] in windows of equal shape; the last one is filled up."""
    firsts = range(0, len(ids) - 1, WINDOW)
    size = WINDOW * len(firsts) + 1
    padded = np.pad(ids, (0, size - len(ids)), constant_values=BYTE_OFFSET)
    opens = np.pad(starts[: len(ids)], (0, size - len(ids)))
    # A patch may open after the last byte of a window too, which decides what that byte reads.
    rows = [np.flatnonzero(np.append(True, opens[i + 1 : i + WINDOW + 1])) for i in firsts]
    lengths = np.zeros((len(rows), 1 + max(map(len, rows))), np.int32)
    for row, at in zip(lengths, rows, strict=True):
        row[: len(at)] = np.diff([*at, WINDOW + 1])
    found = []
    for i in range(0, len(rows), BATCH):
        own = slice(i, i + BATCH)
        some = np.stack([padded[f : f + WINDOW] for f in firsts[own]])
        targets = np.stack([padded[f + 1 : f + 1 + WINDOW] for f in firsts[own]])
        found.append(_nats(model.logits(*_filled(some, lengths[own])), targets).ravel())
    return np.concatenate(found)[: len(ids) - 1] / np.log(2)


def _filled(*arrays: np.ndarray) -> list[np.ndarray]:
    """Batches of BATCH rows, the last of which is repeated where there are fewer."""
    return [np.concatenate([x, np.repeat(x[-1:], BATCH - len(x), axis=0)]) for x in arrays]


def _nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits[: len(targets)].astype(np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[..., 0]
    return total - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


# ---- what a byte is


def parts(kind: str, data: bytes) -> np.ndarray:
    """The name of the part to which each byte of a file belongs, str [bytes]."""
    return _LABELS[kind](data)


def _wav(data: bytes, cycle: tuple[str, ...]) -> np.ndarray:
    at = data.find(b"data")
    head = min(at + 8 if at >= 0 else len(data), len(data))
    return _headed(head, cycle, len(data))


def _ppm(data: bytes) -> np.ndarray:
    head = 0
    for _ in range(4):  # P6, width, height, 255: one blank ends the last
        while data[head : head + 1].isspace():
            head += 1
        while head < len(data) and not data[head : head + 1].isspace():
            head += 1
    return _headed(head + 1, ("red", "green", "blue"), len(data))


def _headed(head: int, cycle: tuple[str, ...], size: int) -> np.ndarray:
    found = np.full(size, "header", dtype="U16")
    for i, name in enumerate(cycle):
        found[head + i :: len(cycle)] = name
    return found


def _midi(data: bytes) -> np.ndarray:
    found = np.full(len(data), "header", dtype="U16")
    at = 14
    while at + 8 <= len(data):
        size = struct.unpack_from(">I", data, at + 4)[0]
        end = min(at + 8 + size, len(data))
        if data[at : at + 4] == b"MTrk":
            for first, last, name in _events(data, at + 8, end):
                found[first:last] = name
        at = end
    return found


def _events(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, str]]:
    """(first byte, byte after, name) of the parts of a track's events."""
    status = 0
    while at < end:
        after = _number_end(data, at, end)
        yield at, after, "time"
        at = after
        if at < end and data[at] >= 0x80:
            status = data[at]
            yield at, at + 1, "status"
            at += 1
        if status == 0xFF or status in (0xF0, 0xF7):
            kind = 1 if status == 0xFF else 0
            after = _number_end(data, at + kind, end)
            size = 0
            for byte in data[at + kind : after]:
                size = size << 7 | byte & 0x7F
            yield at, min(after + size, end), "meta"
            at = after + size
        elif status >> 4 in (8, 9):
            yield at, at + 1, "pitch"
            yield at + 1, at + 2, "loudness"
            at += 2
        elif status >> 4 in (12, 13):
            yield at, at + 1, "controller"
            at += 1
        else:
            yield at, at + 2, "controller"
            at += 2


def _number_end(data: bytes, at: int, end: int) -> int:
    """Where a number of seven bits a byte ends."""
    while at < end - 1 and data[at] & 0x80:
        at += 1
    return at + 1


_SECTIONS = {
    "code": (".text", ".plt", ".plt.got", ".plt.sec", ".init", ".fini"),
    "constants": (".rodata", ".data.rel.ro"),
    "data": (".data",),
    "names": (".dynstr", ".strtab", ".shstrtab"),
    "symbols": (".dynsym", ".symtab", ".gnu.version", ".gnu.version_r", ".gnu.hash", ".hash"),
    "relocations": (".rela.dyn", ".rela.plt", ".got", ".got.plt", ".dynamic"),
    "unwinding": (".eh_frame", ".eh_frame_hdr", ".gcc_except_table"),
}
_PART_OF = {section: part for part, own in _SECTIONS.items() for section in own}


def _elf(data: bytes) -> np.ndarray:
    found = np.full(len(data), "other", dtype="U16")
    for name, first, size in sections(data):
        found[first : first + size] = _PART_OF.get(name, "other")
    return found


def sections(data: bytes) -> list[tuple[str, int, int]]:
    """(name, first byte, bytes) of what lies in a program's file; none of one that is damaged."""
    try:
        wide, order = data[4] == 2, "<" if data[5] == 1 else ">"
        form, where = ("QQQQ", 0x28) if wide else ("IIII", 0x20)
        (table,) = struct.unpack_from(order + form[0], data, where)
        size, count, names = struct.unpack_from(order + "HHH", data, 0x3A if wide else 0x2E)
        found = []
        for i in range(count):
            name, kind = struct.unpack_from(order + "II", data, table + i * size)
            _, _, first, length = struct.unpack_from(order + form, data, table + i * size + 8)
            found.append((name, first, 0 if kind == 8 else length))  # 8: only in memory
        begin = found[names][1]
        return [(_name(data, begin + name), first, length) for name, first, length in found]
    except (struct.error, IndexError):
        return []


def _name(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode(errors="replace") if b"\0" in data[at:] else ""


_LABELS = {
    "wav16": lambda data: _wav(data, ("low byte", "high byte")),
    "wav8": lambda data: _wav(data, ("sample",)),
    "ppm": _ppm,
    "midi": _midi,
    "elf": _elf,
}

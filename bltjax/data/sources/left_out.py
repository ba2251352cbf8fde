"""Tells which files of a folder are not read, and how to have them."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.sources.formats import container_of, without_compression
from bltjax.runtime.terminal import printable

ENDING, EXCLUDED, HIDDEN, LINK, BROKEN = "ending", "excluded", "hidden", "link", "broken"
_SHOWN = 8  # endings, directories or files that are named


class LeftOut(NamedTuple):
    """A file or a directory that is not read."""

    name: str  # relative to the root of the source
    path: str
    rule: str  # why: one of the five above
    detail: str  # its ending, the excluded directory, or what it is


class _File(NamedTuple):
    name: str
    path: str
    rule: str
    detail: str
    size: int  # bytes


def described(left_out: Iterable[LeftOut], source: SourceConfig, data: DataConfig) -> list[str]:
    """Returns a line for each rule that left files out: how many, how large, how to have them."""
    by_rule: dict[str, list[_File]] = {}
    for file in {file.path: file for found in left_out for file in _files(found)}.values():
        by_rule.setdefault(file.rule, []).append(file)
    rules = [rule for rule in (ENDING, EXCLUDED, HIDDEN, LINK, BROKEN) if rule in by_rule]
    reasons = [_reason(rule, by_rule[rule], source, data) for rule in rules]
    return [
        f"left out of {source.name}: {_amount(by_rule[rule])} {reason}"
        for rule, reason in zip(rules, reasons, strict=True)
    ]


def _files(found: LeftOut) -> Iterator[_File]:
    """Yields the files of an entry; a remote directory counts as one, since listing it is slow."""
    name, path, rule, detail = found
    if rule in (HIDDEN, EXCLUDED) and "://" not in path and os.path.isdir(path):
        for directory, _, names in os.walk(path):
            for inner in (os.path.join(directory, name) for name in names):
                yield _File(name, inner, rule, detail, _size(inner))
    else:
        yield _File(name, path, rule, detail, 0 if "://" in path else _size(path))


def _size(path: str) -> int:
    try:
        found = os.stat(path)
        return found.st_size if stat.S_ISREG(found.st_mode) else 0
    except OSError:  # a link that leads nowhere, or a file that is gone
        return 0


def _reason(rule: str, files: list[_File], source: SourceConfig, data: DataConfig) -> str:
    if rule == ENDING:
        if source.kind not in ("auto", "text", "bytes"):
            return f"with other endings ({_groups(files)}); to have them: another kind"
        endings = [ending for ending in _largest(files) if ending]
        if source.kind != "bytes":  # an archive or a picture is no text, but it has bytes
            endings = [e for e in endings if not container_of(b"", without_compression(e))]
        wanted = (*source.text_suffixes(data), *endings)
        if source.suffixes:
            more = f"\"'suffixes': {wanted}\" of this source"
        else:
            more = _setting("suffixes", wanted)
        return f"with other endings ({_groups(files)}); to have them: {more}, or \"('',)\" for any"
    if rule == EXCLUDED:
        others = tuple(name for name in data.exclude if name not in _largest(files))
        more = _setting("exclude", others)
        return f"in directories of excluded names ({_groups(files)}); to have them: {more}"
    if rule == HIDDEN:
        return "whose names, or directories, begin with a dot; to have them: give their paths"
    named = [f"{printable(file.name)}: {file.detail}" for file in files[:_SHOWN]]
    return f"({'; '.join(named)}{_more(len(files))})"


def _setting(name: str, value: tuple[str, ...]) -> str:
    return f'--config.data.{name}="{value}"'


def _groups(files: list[_File]) -> str:
    of = {detail: [f for f in files if f.detail == detail] for detail in _largest(files)}
    shown = (f"{printable(detail) or 'no ending'} {_amount(some)}" for detail, some in of.items())
    return "; ".join(shown) + _more(len({file.detail for file in files}))


def _largest(files: list[_File]) -> list[str]:
    """Returns the endings or directories with the most bytes."""
    sizes: Counter = Counter()
    for file in files:
        sizes[file.detail] += file.size
    return [detail for detail, _ in sizes.most_common(_SHOWN)]


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""


def _amount(files: list[_File]) -> str:
    size = sum(file.size for file in files)
    shown = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"
    return f"{len(files)} file{'s' * (len(files) != 1)}, {shown}"

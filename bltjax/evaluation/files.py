"""Measures a model's bits per byte on the documents of files, by source and by language."""

import collections
import itertools
import lzma
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from bltjax.data.sources.readers import in_chunks
from bltjax.evaluation.texts import TextOfSource, Texts, find_texts, read_texts, told, unreadable
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import json_number, print_table

READ_BYTES = 16_000_000  # of documents in memory at a time
_COLUMNS = ("documents", "bytes", "bits/byte", "bytes/patch", "xz")
_REPORTED = ("documents", "num_bytes", "bits_per_byte", "mean_patch_bytes", "xz_bits_per_byte")


def evaluate(
    model, texts: Texts | str | Path, max_bytes: int | None = None, row_bytes: int | None = None
) -> dict:
    """Scores documents, prints a table of their sources, and returns its numbers.

    texts: of `find_texts`, or a path, of which `max_bytes` are taken. row_bytes: as in
    `model.score`. xz compresses the documents of each source as one stream. Files and records that
    cannot be read are left out and listed in `unreadable`, each reason once for a file. Raises
    ValueError where no byte of text can be read.
    """
    if not isinstance(texts, Texts):
        texts = find_texts(texts, max_bytes=max_bytes)
    bad = []
    bar = progress_bar("evaluating", texts.num_bytes())
    options = dict(row_bytes=row_bytes, on_progress=bar.update)
    by_source, by_language, xz_bytes = measure(model, texts, bad, options)
    bar.close()
    everything = [score for scores in by_source.values() for score in scores]
    if not any(score.num_bytes for score in everything):
        raise texts.without_text(bad)
    result = dict(
        sources={name: report(scores, xz_bytes[name]) for name, scores in by_source.items()},
        languages={name: report(scores) for name, scores in sorted(by_language.items())},
        **report(everything, xz_bytes.total()),
        bytes_per_source=texts.share,
        **unreadable(texts, bad),
    )
    _print_reports("source", result["sources"] | ({"all": result} if len(by_source) > 1 else {}))
    if by_language:
        print()
        _print_reports("language", result["languages"])
    told(texts, bad)
    return result


def measure(model, texts: Texts, bad: list, options: dict):
    """Scores documents; records that are none are added to `bad`.

    Returns scores by source, in order, scores by language where it is known, and the bytes of each
    source under xz.
    """
    by_source, by_language = collections.defaultdict(list), collections.defaultdict(list)
    xz_bytes = collections.Counter()
    documents = _compressed(read_texts(texts, bad), xz_bytes)
    for chunk in in_chunks(documents, lambda document: len(document.data), READ_BYTES):
        scores = model.score([document.data for document in chunk], **options)
        for document, score in zip(chunk, scores, strict=True):
            by_source[document.source].append(score)
            if document.language:
                by_language[document.language].append(score)
    return by_source, by_language, xz_bytes


def _compressed(documents: Iterable[TextOfSource], xz_bytes: dict) -> Iterator[TextOfSource]:
    """Yields documents, whose size under xz is added to that of their source.

    Those of a source follow each other, so only one dictionary, which is large, is in memory.
    """
    for source, group in itertools.groupby(documents, key=lambda document: document.source):
        xz = lzma.LZMACompressor(preset=9)
        for document in group:
            xz_bytes[source] += len(xz.compress(document.data))
            yield document
        xz_bytes[source] += len(xz.flush())


def report(scores: list, xz_bytes: int = 0) -> dict:
    """Returns sums over documents and their ratios. Patches include those of BOS and EOS."""
    num_bytes = sum(score.num_bytes for score in scores)
    nats = math.fsum(score.nats for score in scores)
    num_patches = sum(score.num_patches for score in scores)
    return dict(
        documents=len(scores),
        num_bytes=num_bytes,
        nats=nats,
        bits_per_byte=_ratio(nats / math.log(2), num_bytes),
        mean_patch_bytes=_ratio(num_bytes + 2 * len(scores), num_patches),
        xz_bits_per_byte=_ratio(8 * xz_bytes, num_bytes) if xz_bytes else None,
    )


def _print_reports(kind: str, reports: dict[str, dict]):
    rows = [(name, *(report[key] for key in _REPORTED)) for name, report in reports.items()]
    print_table((kind, *_COLUMNS), rows)


def _ratio(amount: float, of: int) -> float | None:
    return json_number(amount / of if of else math.nan)

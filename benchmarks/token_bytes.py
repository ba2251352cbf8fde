"""Mean bytes of a token by language: `python -m benchmarks.token_bytes --corpus=PATH`.

One tokenizer for each pattern of words (`tokenizer.pattern`), trained on one mixture of the
sources, as much of each as there is of the others; told are the mean bytes of its tokens in each
source, on every fifth document, which it was not trained on. Sources of fewer documents are left
out.
"""

import fnmatch
import json
import os

from absl import app, flags

from benchmarks.studies import pages
from benchmarks.studies.shared import chosen_sources, sample
from bltjax import cli
from bltjax.config.run import PATTERNS
from bltjax.data import tokenizer

HELD_OUT = 5  # each fifth document

FLAGS = flags.FLAGS
flags.DEFINE_string("corpus", "", "A file or directory, see configs/studies/entropy.py.")
flags.DEFINE_list("sources", "*", "Patterns of the names of the sources that train tokenizers.")
flags.DEFINE_list("shown", "*", "Patterns of the names of those that are shown.")
flags.DEFINE_integer("bytes", 12_000_000, "Of the mixture, held-out documents included.", 1)
flags.DEFINE_integer("vocab_size", 4096, "Ids of a tokenizer, at most.", 260)


def measure(documents: dict[str, list[bytes]], vocab_size: int) -> list[dict]:
    """A row for each source: the bytes of its held-out documents and of their mean tokens."""
    texts = [text for own in documents.values() for i, text in enumerate(own) if (i + 1) % HELD_OUT]
    held_out = {name: own[HELD_OUT - 1 :: HELD_OUT] for name, own in documents.items()}
    held_out = {name: own for name, own in held_out.items() if own}
    rows = {name: dict(source=name, bytes=sum(map(len, own))) for name, own in held_out.items()}
    for pattern in PATTERNS:
        made = tokenizer.train(texts, vocab_size, pattern)
        for name, own in held_out.items():
            tokens = sum(len(made.encode(text, add_bos=False, add_eos=False)) for text in own)
            rows[name][pattern] = rows[name]["bytes"] / tokens
    return list(rows.values())


def main(argv):
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}: give flags alone")
    try:
        corpus = os.path.abspath(FLAGS.corpus) if FLAGS.corpus else ""
        documents = sample(chosen_sources(corpus, FLAGS.sources), FLAGS.bytes, balanced=True)
        rows = measure(documents, FLAGS.vocab_size)
    except (ValueError, OSError) as error:
        cli.fail(error)
    shown = [r for r in rows if any(fnmatch.fnmatch(r["source"], p) for p in FLAGS.shown)]
    print(pages.table(shown, dict(source="", bytes=",", letters=".2f", marks=".2f")))
    print(json.dumps(rows))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)

"""Measures a model: `bltjax evaluate --checkpoint=DIR --data=PATH`, and named tasks.

PATH is a file, a glob, or a directory of which every file that is not hidden is read: as a text,
decompressed if need be, or, where it holds records (.jsonl, .parquet and others), as one for each.
Top-level directories, and files of records beside them, are the sources, with a result each; so are
languages, where records name theirs. Prints a table of bits per byte, with xz for scale, and how
much a BLT uses its patches. Further parts, with --data or without:

    --suites=characters,noise   questions about characters; multiple choice from --data, with noise
    --samples=N                 how much of what the model writes is valid UTF-8
    --tasks=a,b                 tasks of lm-evaluation-harness, of the hub or of --tasks_path=DIR

The last line is all of it as JSON.
"""

import json
import sys

from absl import flags

from bltjax import cli
from bltjax.evaluation import suites
from bltjax.evaluation.files import evaluate
from bltjax.evaluation.texts import find_texts, read_texts
from bltjax.runtime.terminal import json_number


def run(chosen) -> dict:
    """Runs the measurements that the flags ask for; returns their results."""
    texts = None
    if chosen.data is not None:  # a wrong path shows before the model is loaded
        options = dict(kind=chosen.kind, field=chosen.field, max_bytes=chosen.max_bytes)
        texts = find_texts(chosen.data, **options)
    model, result = cli.open_model(), {}
    if texts is not None:
        result |= evaluate(model, texts, row_bytes=chosen.row_bytes)
        result |= suites.patch_use_suite(model, texts, chosen.patch_use_rows, chosen.row_bytes)
    if "characters" in chosen.suites:
        result["characters"] = suites.character_suite(model, chosen.words, chosen.limit)
    if "noise" in chosen.suites:
        documents = [document.data for document in read_texts(texts, [])]
        result["noise"] = suites.noise_suite(model, documents, chosen.limit)
    if chosen.samples:
        result["samples"] = suites.sample_suite(model, chosen.samples)
    if chosen.tasks:
        asked = chosen.tasks, chosen.tasks_path, chosen.limit, chosen.noise
        result["tasks"] = suites.harness_suite(model, *asked)
    return result


def main(argv):
    cli.no_arguments(argv, "give --checkpoint and --data")
    chosen = flags.FLAGS
    parts = (chosen.data, chosen.suites, chosen.samples, chosen.tasks)
    if chosen.checkpoint is None or not any(parts):
        cli.fail("give --checkpoint=DIR and --data=PATH, or --suites, --samples or --tasks")
    if unknown := sorted(set(chosen.suites) - set(suites.SUITES)):
        cli.fail(f"--suites={unknown[0]} is none of {', '.join(suites.SUITES)}")
    if "noise" in chosen.suites and chosen.data is None:
        cli.fail("--suites=noise makes its items of text: give --data=PATH")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result = run(chosen)
    except (ValueError, KeyError, OSError, ImportError) as error:
        cli.fail(error)
    print(json.dumps(_without_nan(result)))


def _without_nan(value):
    """The same for JSON, which has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(inside) for name, inside in value.items()}
    return json_number(value) if isinstance(value, float) else value


def define_flags():
    cli.define_model_flags()
    cli.define_text_flags("data")
    cli.define_path("data", "A file, a directory of files, or a glob.")
    rows = "Rows of --data that the use of patches is measured on; 0: none."
    flags.DEFINE_integer("patch_use_rows", 64, rows, 0)
    flags.DEFINE_list("suites", [], f"Further parts, see above: {', '.join(suites.SUITES)}.")
    flags.DEFINE_integer("samples", 0, "Texts to draw from the model.", 0)
    flags.DEFINE_list("tasks", [], "Tasks of lm-evaluation-harness (pip install 'bltjax[eval]').")
    cli.define_path("tasks_path", "A directory of task files, instead of the harness's.")
    flags.DEFINE_string("noise", None, "Noise in --tasks: drop, or drop:prompt, and so on.")
    flags.DEFINE_integer("limit", None, "Questions of a task, at most.", 1)
    cli.define_path("words", "A file of words for --suites=characters.")
    flags.DEFINE_integer("row_bytes", None, "Bytes that the model sees at a time.", 8)


if __name__ == "__main__":
    cli.run(main, define_flags)

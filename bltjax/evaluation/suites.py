"""Measurements of `python -m bltjax.evaluate` beside bits per byte.

Each function measures a model, prints the result as a table, and returns it.
"""

from collections.abc import Sequence
from pathlib import Path

from bltjax.config import BLTConfig
from bltjax.evaluation import characters, multiple_choice, noise, samples
from bltjax.evaluation.related_words import WORDS
from bltjax.evaluation.texts import Texts, read_texts
from bltjax.runtime.terminal import print_table

SUITES = ("characters", "noise")
QUESTIONS = 50  # of each character task
ITEMS = 100  # of multiple choice


def patch_use_suite(model, texts: Texts, num_rows: int, row_bytes: int | None) -> dict:
    """Measures how much a BLT uses its patches, on the first texts of each source.

    Returns dict(patch_use), or an empty one of a model without patches.
    """
    if not num_rows or not isinstance(model.config, BLTConfig):
        return {}
    from bltjax.evaluation.patch_use import told  # late: it loads JAX

    row_bytes = model.lengths.row_bytes if row_bytes is None else row_bytes
    share = -(-num_rows * row_bytes // len(set(texts.sources)))
    sample = texts._replace(share=min(share, texts.share or share))
    documents = [document.data for document in read_texts(sample, [])]
    found = model.patch_use(documents, num_rows, row_bytes)
    print(f"\n{told(found)}")
    return dict(patch_use=found)


def character_suite(model, words: str | None, count: int | None, seed: int = 0) -> dict:
    """Asks questions of every character task. Returns dict(tasks, exact_match: their mean).

    words: a file of words, separated by blanks or line ends; None for a short list of ours. count:
    questions of each task, QUESTIONS by default.
    """
    # Bytes that are not UTF-8 stay what they are, see `vocabulary.text_bytes`.
    known = (
        WORDS
        if words is None
        else Path(words).read_bytes().decode(errors="surrogateescape").split()
    )
    source = characters.material(known)
    asked = [
        question
        for task in characters.TASKS
        for question in characters.questions(task, source, count or QUESTIONS, seed=seed)
    ]
    result = characters.evaluate(model, asked)
    mean = sum(found["exact_match"] for found in result.values()) / len(result)
    guessed = sum(found["chance"] for found in result.values()) / len(result)
    keys = ("questions", "exact_match", "chance", "bits_per_byte")
    rows = [(task, *map(found.get, keys)) for task, found in result.items()]
    print()
    print_table(
        ("characters", "questions", "exact match", "chance", "bits/byte"),
        [*rows, ("mean", "", mean, guessed, "")],
    )
    return dict(tasks=result, exact_match=mean)


def noise_suite(model, documents: Sequence[bytes], count: int | None, seed: int = 0) -> dict:
    """Measures multiple choice made of documents, and their bits per byte, with and without noise.

    count: items, ITEMS by default. The table shows accuracy_mutual, and the accuracy of guessing in
    its last row; the result also has the other accuracies, see `multiple_choice.accuracy`.
    """
    items = multiple_choice.items_from_documents(documents, count or ITEMS, seed=seed)
    result = noise.robustness(model, items, seed)
    bits, key = result["bits_per_byte"], "accuracy_mutual"
    rows = [
        (kind, *(by_place[where][key] for where in noise.WHERE), bits[kind])
        for kind, by_place in result["noisy"].items()
    ]
    clean = ("clean", "", "", result["clean"][key], bits["clean"])
    mean = ("mean with noise", "", "", result["mean"][key], "")
    chance = ("chance", "", "", result["clean"]["chance"], "")
    print()
    print_table(("accuracy", *noise.WHERE, "bits/byte"), [clean, *rows, mean, chance])
    return result


def sample_suite(model, num_samples: int, seed: int = 0) -> dict:
    """Measures the share of generated text that is valid UTF-8."""
    result = samples.samples(model, num_samples, seed=seed)
    print(
        f"\n{num_samples} samples, {result['num_bytes']} bytes: {result['valid']:.1%} are valid "
        f"UTF-8, {result['valid_bytes']:.1%} of the bytes"
    )
    return result


def harness_suite(
    model, tasks: Sequence[str], tasks_path: str | None, limit: int | None, noise_kind: str | None
) -> dict:
    """Runs tasks of lm-evaluation-harness. noise_kind: "KIND" or "KIND:WHERE", see `noise`."""
    from bltjax.evaluation.harness import run_tasks  # late: the library is optional, and slow

    options = {}
    if noise_kind is not None:
        kind, _, where = noise_kind.partition(":")
        options = dict(noise=kind, noise_where=where or "both")
    result = run_tasks(model, tasks, tasks_path, limit, **options)
    rows = [
        (task, name, float(x)) for task, metrics in result.items() for name, x in metrics.items()
    ]
    print()
    print_table(("task", "metric", "value"), rows)
    return result

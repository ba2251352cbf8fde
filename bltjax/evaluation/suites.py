"""What `python -m bltjax.evaluate` measures beside bits per byte, and how it is printed.

Each function runs one part on a model, prints it as a table, and returns it.
"""

from collections.abc import Sequence
from pathlib import Path

from bltjax.evaluation import characters, multiple_choice, noise, samples
from bltjax.evaluation.related_words import WORDS
from bltjax.runtime.terminal import printable

SUITES = ("characters", "noise")
QUESTIONS = 50  # of each character task
ITEMS = 100  # of multiple choice


def character_suite(model, words: str | None, count: int | None, seed: int = 0) -> dict:
    """Every character task, of the words of a file (one a line or more) or of a small list."""
    if words is None:
        source = characters.material(WORDS)
    else:
        source = characters.material(Path(words).read_text("utf-8", errors="ignore").split())
    asked = [
        question
        for task in characters.TASKS
        for question in characters.questions(task, source, count or QUESTIONS, seed=seed)
    ]
    result = characters.evaluate(model, asked)
    mean = sum(found["exact_match"] for found in result.values()) / len(result)
    print(f"\n{'characters':18}{'questions':>12}{'exact match':>13}{'bits/byte':>13}")
    for task, found in result.items():
        cells = f"{found['exact_match']:>13.3f}{found['bits_per_byte']:>13.4f}"
        print(f"{task:18}{found['questions']:>12}{cells}")
    print(f"{'mean':18}{'':12}{mean:>13.3f}")
    return dict(tasks=result, exact_match=mean)


def noise_suite(model, documents: Sequence[bytes], count: int | None, seed: int = 0) -> dict:
    """Multiple choice made of the documents, and their bits per byte, with noise and without.

    The table shows accuracy_mutual, the result also the others of `multiple_choice.accuracy`.
    """
    items = multiple_choice.items_from_documents(documents, count or ITEMS, seed=seed)
    result = noise.robustness(model, items, seed)
    print(f"\n{'accuracy':18}" + "".join(f"{w:>13}" for w in (*noise.WHERE, "bits/byte")))
    clean, bits = result["clean"]["accuracy_mutual"], result["bits_per_byte"]
    print(f"{'clean':18}{'':26}{clean:>13.3f}{bits['clean']:>13.4f}")
    for kind, by_place in result["noisy"].items():
        cells = [f"{by_place[w]['accuracy_mutual']:>13.3f}" for w in noise.WHERE]
        print(f"{kind:18}{''.join(cells)}{bits[kind]:>13.4f}")
    print(f"{'mean with noise':18}{'':26}{result['mean']['accuracy_mutual']:>13.3f}")
    return result


def sample_suite(model, num_samples: int, seed: int = 0) -> dict:
    """How much of what the model writes is valid UTF-8."""
    result = samples.samples(model, num_samples, seed=seed)
    print(
        f"\n{num_samples} samples, {result['num_bytes']} bytes: {result['valid']:.1%} are valid "
        f"UTF-8, {result['valid_bytes']:.1%} of the bytes"
    )
    return result


def harness_suite(
    model, tasks: Sequence[str], tasks_path: str | None, limit: int | None, noise_kind: str | None
) -> dict:
    """Tasks of lm-evaluation-harness; noise_kind: "KIND" or "KIND:WHERE"."""
    from bltjax.evaluation.harness import run_tasks  # late: the library is optional, and slow

    options = {}
    if noise_kind is not None:
        kind, _, where = noise_kind.partition(":")
        options = dict(noise=kind, noise_where=where or "both")
    result = run_tasks(model, tasks, tasks_path, limit, **options)
    print(f"\n{'task':30}{'metric':>20}{'value':>13}")
    for task, metrics in result.items():
        for metric, value in metrics.items():
            print(f"{printable(task):30}{metric:>20}{value:>13.4f}")
    return result

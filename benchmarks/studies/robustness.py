"""Noise and spelling: `python -m benchmarks.studies.robustness --workdir=DIR --corpus=PATH`.

A BLT and a transformer over BPE tokens of equal FLOPs per byte, trained on the same bytes, as in
the paper's table 3. One pair reads the corpus: both choose the true continuation of held-out
passages, with noise and without, have their bits per byte under noise, and answer questions about
characters. Another pair reads the corpus mixed with spelled words, and spells words that are not
among them.
"""

import collections
import json
import re
from collections.abc import Sequence
from pathlib import Path

from absl import app

import bltjax
from benchmarks.studies import pages, study
from benchmarks.studies import shared as sharing
from benchmarks.studies.points import Point, account, width_for, with_flops
from benchmarks.studies.shared import Shared
from bltjax import cli
from bltjax.evaluation import characters, multiple_choice, noise
from bltjax.runtime.files import replacing

BUDGETS = {  # training FLOPs of a point
    "plain": {"laptop": 2e13, "gpu": 2e17, "pod": 4e20},
    "spelling": {"laptop": 4e13, "gpu": 2e17, "pod": 4e20},
}
# At equal cost a smaller model reads more words.
LEVELS = {"plain": 1, "spelling": 0}
PATCH = 4.5
HELD_OUT_BYTES = 1_000_000  # of documents that items are made of
WORD_BYTES = 20_000_000  # of documents that words are taken from
WORDS = {"laptop": 20_000, "gpu": 50_000, "pod": 50_000}  # the commonest of the training text
HELD_OUT_WORDS = 0.1  # share of them
SPELLING = ("spelling", "spelling_inverse")
EXAMPLES = 40  # in a training document
SPELLING_BYTES = {"laptop": 9_000_000, "gpu": 100_000_000, "pod": 100_000_000}  # about
QUESTIONS, ITEMS = 100, 200
# By what the prompt adds to a choice: likelihoods of a small model tell little but the choice.
ACCURACY = "accuracy_mutual"
ITEMS_SAID = (
    f"{ITEMS} held-out passages, each with its own continuation and three of others. An answer is "
    "right if its prompt adds most to the likelihood of its own continuation. `chance` is what "
    "guessing would attain."
)


def plan(given: study.Settings, plain: Shared, spelling: Shared) -> list[Point]:
    found = []
    for mixture, shared in (("plain", plain), ("spelling", spelling)):
        level, about = LEVELS[mixture], dict(mixture=mixture)
        blt = shared.blt(f"BLT-{mixture}", level, target=PATCH, family="BLT", **about)
        bpe = width_for(
            lambda dim, shared=shared, level=level, about=about: shared.tokens(
                f"BPE-{about['mixture']}", level, dim, family="BPE", **about
            ),
            account(blt).model["total"],
        )
        found += [with_flops(point, BUDGETS[mixture][given.size]) for point in (blt, bpe)]
    return found


def spelling_text(words: Sequence[str], num_bytes: int) -> list[bytes]:
    """Documents of spelled training words, of about so many bytes in all."""
    source = characters.material(words)
    one = characters.training_examples(SPELLING, source, 2, shots=EXAMPLES)
    number = max(2, 2 * num_bytes // sum(map(len, one)))
    documents = characters.training_examples(SPELLING, source, number, shots=EXAMPLES)
    return [document.encode() for document in documents]


def split_words(shared: Shared) -> tuple[list[str], list[str]]:
    """(training words, held-out words): common words of letters from training text."""
    counts = collections.Counter()
    for text in sharing.training_text(shared, WORD_BYTES):
        counts.update(
            w.lower() for w in re.findall(r"\b[A-Za-z]{4,10}\b", text.decode("utf-8", "ignore"))
        )
    words = [word for word, _ in counts.most_common(WORDS[shared.size])]
    return characters.split_words(words, HELD_OUT_WORDS)


def measure(given: study.Settings, point: Point, shared: Shared, words) -> dict:
    """What a finished point can do, kept in its directory."""
    directory = given.directory / "points" / point.name
    path = directory / "robustness.json"
    if path.exists():
        return json.loads(path.read_text())
    print(f"{point.name}: measuring", flush=True)
    brought = {} if point.stage == "token_model" else dict(entropy_model=shared.entropy_model)
    model = bltjax.load(directory, **brought)
    if point.about["mixture"] == "plain":
        documents = sharing.held_out(shared, HELD_OUT_BYTES)
        items = multiple_choice.items_from_documents(documents, ITEMS)
        found = dict(
            noise=noise.robustness(model, items), tasks=ask(model, characters.TASKS, *words)
        )
    else:
        found = dict(tasks=ask(model, SPELLING, *words))
    with replacing(path) as file:
        file.write(json.dumps(found).encode())
    return found


def ask(model, tasks, training: Sequence[str], held_out: Sequence[str]) -> dict[str, dict]:
    """Exact matches of questions on held-out words after solved ones of training words."""
    source, solved = characters.material(held_out), characters.material(training)
    asked = [
        question
        for task in tasks
        for question in characters.questions(task, source, QUESTIONS, shots_from=solved)
    ]
    return characters.evaluate(model, asked)


def report(rows: Sequence[dict], found: dict[str, dict], out: Path):
    """Pictures and README.md of the rows of results.csv and of what each point can do."""
    families = {row["name"]: row["family"] for row in rows}
    plain = {families[n]: f for n, f in found.items() if "noise" in f}
    spelling = {families[n]: f["tasks"] for n, f in found.items() if "noise" not in f}
    parts = []
    if plain:
        pages.bars(
            out / "noise.png",
            {family: noise_accuracies(f["noise"]) for family, f in plain.items()},
            "share of right answers",
            chance=_chance(plain),
        )
        pages.bars(
            out / "bits.png",
            {family: f["noise"]["bits_per_byte"] for family, f in plain.items()},
            "bits per byte of texts with noise",
        )
        parts += ["## Noise", "![accuracy under noise](noise.png)", ITEMS_SAID]
        parts += ["![bits per byte under noise](bits.png)", noise_table(plain)]
        tasks = {family: f["tasks"] for family, f in plain.items()}
        parts += ["## Characters, without training on them", task_table(tasks)]
    if spelling:
        pages.bars(
            out / "spelling.png",
            {family: {t: r["exact_match"] for t, r in f.items()} for family, f in spelling.items()},
            "exact match, held-out words",
        )
        parts += ["## Spelling", "![exact match of spelling](spelling.png)", task_table(spelling)]
    columns = dict(family="", mixture="") | pages.QUALITY | pages.COST
    parts += ["## The models", pages.table(rows, columns)]
    pages.write_page(out / "README.md", "Noise and spelling", *parts)


def noise_accuracies(robustness: dict) -> dict[str, float]:
    """Of each kind of noise the mean over prompt, completion and both, as the paper has it."""
    found = {"clean": robustness["clean"][ACCURACY]}
    for kind, by_place in robustness["noisy"].items():
        found[kind] = sum(r[ACCURACY] for r in by_place.values()) / len(by_place)
    return found | {"mean with noise": robustness["mean"][ACCURACY]}


def _chance(plain: dict[str, dict]) -> float:
    """Accuracy of guessing; the items of all families are the same."""
    (chance,) = {f["noise"]["clean"]["chance"] for f in plain.values()}
    return chance


def noise_table(plain: dict[str, dict]) -> str:
    rows = []
    for kind in noise_accuracies(next(iter(plain.values()))["noise"]):
        row = dict(noise=kind)
        for family, f in plain.items():
            row[f"{family}_accuracy"] = noise_accuracies(f["noise"])[kind]
            row[f"{family}_bits_per_byte"] = f["noise"]["bits_per_byte"].get(kind)
        rows.append(row)
    rows.append(dict(noise="chance") | {f"{family}_accuracy": _chance(plain) for family in plain})
    return pages.table(rows, {name: "" if name == "noise" else ".3f" for name in rows[0]})


def task_table(families: dict[str, dict[str, dict]]) -> str:
    rows = []
    for task in next(iter(families.values())):
        row = dict(task=task, chance=characters.chance(task))
        for family, tasks in families.items():
            row[f"{family}_exact_match"] = tasks[task]["exact_match"]
            row[f"{family}_bits_per_byte"] = tasks[task]["bits_per_byte"]
        rows.append(row)
    return pages.table(rows, {name: "" if name == "task" else ".3f" for name in rows[0]})


def main(argv):
    study.check(argv)
    given = study.settings()
    with study.guarded():
        plain = study.prepare(given)
        if given.dry_run:
            words, extra = ([], []), None
        else:
            words = split_words(plain)
            extra = {"spelling": spelling_text(words[0], SPELLING_BYTES[given.size])}
        spelling = study.prepare(given, "shared-spelling", extra=extra)
        planned = plan(given, plain, spelling)
        rows = study.carry_out(given, planned)
        finished = {row["name"] for row in rows}
        found = {
            point.name: measure(given, point, shared, words)
            for point, shared in zip(planned, (plain, plain, spelling, spelling), strict=True)
            if point.name in finished
        }
        (given.out / "robustness.json").write_text(json.dumps(found, indent=1))
        report(rows, found, given.out)
        study.finish(given, rows)


if __name__ == "__main__":
    study.define_flags()
    app.run(main, flags_parser=cli.parse)

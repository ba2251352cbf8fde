"""What fine-tuning does: `python -m benchmarks.adaptation --workdir=DIR --start_from=RUN`.

Questions about a word (its last letter, whether it begins with a vowel, its length; how it is
spelled, its letters backwards, how often it has one) are asked of a model before and after it was
trained on such pairs, by all its parameters and by low-rank adapters: exact answers on words that
no pair holds. Words are those of Python's library. Pairs and runs are kept in DIR.
"""

import argparse
import collections
import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import bltjax
from bltjax.config.chat import ChatConfig
from bltjax.data import conversations
from bltjax.data.sources.files import python_library_root

ROOT = Path(__file__).parents[1]
TASKS = ("last", "vowel", "length", "spell", "backwards", "count")
HELD_OUT = 100  # words
OPTIMIZER = "blt_training.optimizer."
# n-gram tables stay in either way: they would learn the words by heart.
FULL = {f"{OPTIMIZER}matrices": "muon", f"{OPTIMIZER}hash_rate": 0}
LORA = {"blt.lora.rank": 8, "blt.lora.targets": "('*.w[qkvo123].weight','*projection.weight')"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--start_from", required=True, help="weights in any format")
    parser.add_argument("--pairs", type=int, default=200, help="of each task")
    parser.add_argument("--tasks", default="last,vowel,length", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--lora_steps", type=int, default=800)
    parser.add_argument("--lora_rate", type=float, default=2e-2)
    parser.add_argument("--only", default="full,lora", help="of full and lora")
    chosen = parser.parse_args()
    chosen.workdir.mkdir(parents=True, exist_ok=True)
    tasks = chosen.tasks.split(",")
    held, words = split(library_words())
    path = chosen.workdir / f"{'-'.join(tasks)}-{chosen.pairs}.jsonl"
    path.write_text("\n".join(map(json.dumps, made_pairs(tasks, words, chosen.pairs))))
    asked = {task: [pair(task, word) for word in held] for task in tasks}
    rows = [dict(model="before") | answers(bltjax.load(chosen.start_from), asked)]
    print(rows[-1], flush=True)
    ways = dict(
        full=(chosen.steps, chosen.rate, FULL), lora=(chosen.lora_steps, chosen.lora_rate, LORA)
    )
    for name in chosen.only.split(","):
        steps, rate, settings = ways[name]
        workdir = chosen.workdir / f"{name}-{path.stem}"
        result = train(workdir, path, chosen.start_from, steps, rate, settings)
        counts = result["parameters"]["blt"]
        learn = dict(
            learning=counts.get("learning", counts["total"]), minutes=result["seconds"] / 60
        )
        rows.append(dict(model=name) | answers(bltjax.load(workdir), asked) | learn)
        print(rows[-1], flush=True)
    print(json.dumps(dict(pairs=len(tasks) * chosen.pairs, rows=rows)))


def library_words() -> list[str]:
    """Returns words of Python's library of 3 to 8 letters, the most frequent first."""
    counts = collections.Counter()
    for path in sorted(python_library_root().glob("*.py")):
        counts.update(re.findall(r"\b[a-z]{3,8}\b", path.read_text(errors="replace")))
    return sorted(counts, key=lambda word: (-counts[word], word))


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns words that are held out, and the others, both in a drawn order."""
    words = list(words[:6000])
    random.Random(0).shuffle(words)
    return words[:HELD_OUT], words[HELD_OUT:]


def made_pairs(tasks: Sequence[str], words: Sequence[str], count: int) -> list[dict]:
    """Returns so many pairs of each task, words in turn."""
    return [pair(task, words[i % len(words)]) for i in range(count) for task in tasks]


def pair(task: str, word: str) -> dict:
    """Returns a question about a word, and its answer."""
    if task == "last":
        return dict(prompt=f"What is the last letter of {word}?", completion=word[-1])
    if task == "vowel":
        vowel = "yes" if word[0] in "aeiou" else "no"
        return dict(prompt=f"Does {word} begin with a vowel?", completion=vowel)
    if task == "length":
        return dict(prompt=f"How many letters has {word}?", completion=str(len(word)))
    if task == "spell":
        return dict(prompt=f"Spell {word}.", completion=" ".join(word))
    if task == "backwards":
        return dict(prompt=f"Write {word} backwards.", completion=word[::-1])
    letter = random.Random(word).choice(word)
    question = f"How many times is {letter} in {word}?"
    return dict(prompt=question, completion=str(word.count(letter)))


def train(workdir: Path, pairs: Path, start: str, steps: int, rate: float, settings: dict) -> dict:
    """Trains a run to its end; returns its result."""
    given = settings | {
        "start_from": start,
        "blt_training.steps": steps,
        f"{OPTIMIZER}learning_rate": rate,
    }
    command = [sys.executable, "-m", "bltjax.train"]
    command += [f"--config=configs/finetune.py:{pairs}", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in given.items()]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return json.loads((workdir / "result.json").read_text())


def answers(model, asked: dict[str, list[dict]]) -> dict:
    """Returns the share of exact answers of each task."""
    return {task: exact(model, pairs) for task, pairs in asked.items()}


def exact(model, pairs: Sequence[dict]) -> float:
    """Returns the share of questions that a model answers to the byte."""
    chat = ChatConfig()
    prompts = [
        conversations.to_bytes([dict(role="user", content=p["prompt"])], chat, answer=True)
        for p in pairs
    ]
    found = model.generate(prompts, max_new_bytes=24, stop=[chat.delimiter("end")])
    right = [text == p["completion"].encode() for text, p in zip(found, pairs, strict=True)]
    return sum(right) / len(pairs)


if __name__ == "__main__":
    main()

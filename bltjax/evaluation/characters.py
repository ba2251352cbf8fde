"""Asks questions about the characters and words of texts, like CUTE (Edman et al. 2024).

There are fourteen tasks, generated from any list of words with a seed. A task is a function from
words to a question and its answer. A few solved questions come before the one that is asked:

    Question: Spell the word "there".
    Answer: t h e r e

Words are any strings without spaces, in any script.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bltjax.evaluation.related_words import RELATED
from bltjax.vocabulary import text_bytes

MAX_WORDS = 6  # of a sentence that is made of words
_CANDIDATES = 20  # words that are drawn to find one that differs from another, or resembles it


class Question(NamedTuple):
    """An item. A model is to continue `prompt` with a space, `answer` and a newline."""

    task: str
    prompt: str
    answer: str

    @property
    def completion(self) -> str:
        return f" {self.answer}\n"


class Material(NamedTuple):
    """Words and sentences that questions are made of."""

    words: Sequence[str]  # without spaces or quotes, each with two different characters
    sentences: Sequence[str] = ()  # of three or more words
    related: Sequence[Sequence[str]] = RELATED  # groups of words of one kind


def material(
    words: Iterable[str],
    sentences: Iterable[str] = (),
    related: Sequence[Sequence[str]] = RELATED,
) -> Material:
    """Selects the words and sentences that questions can be made of, each once, in order.

    Without sentences, questions make some of words. Raises ValueError for less than four words, and
    for less than two groups of related words.
    """
    plain = (w for w in dict.fromkeys(words) if '"' not in w and not any(c.isspace() for c in w))
    usable = [w for w in plain if len(set(w)) > 1]
    if len(usable) < 4:
        raise ValueError(
            f"{len(usable)} of the words have two characters that differ, and neither spaces nor "
            "quotes: give at least 4"
        )
    if len(related) < 2 or min(map(len, related)) < 2:
        raise ValueError(f"related={related!r}: give two groups or more of two words or more")
    lines = [" ".join(s.split()) for s in sentences if '"' not in s]
    return Material(usable, [s for s in dict.fromkeys(lines) if len(set(s.split())) > 2], related)


def split_words(words: Iterable[str], held_out: float, seed: int = 0) -> tuple[list, list]:
    """Splits words into (training words, held-out words) by a hash of the word and the seed."""
    parts = [], []
    for word in dict.fromkeys(words):
        parts[_hash(f"{seed}:{word}") < held_out * 2**64].append(word)
    return parts


def questions(
    task: str,
    source: Material,
    num_questions: int,
    *,
    shots: int = 4,
    shots_from: Material | None = None,
    seed: int = 0,
) -> list[Question]:
    """Makes questions of one of TASKS, each after `shots` solved ones of the same task.

    shots_from: material of the solved ones; None: `source`. A question depends on its number and
    the seed, not on how many there are. Raises ValueError for another task.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not known: give one of {', '.join(TASKS)}")
    found = []
    for number in range(num_questions):
        rng = np.random.default_rng([seed, _hash(task), number])
        question, answer = TASKS[task](rng, source)
        solved = _solved(rng, task, shots_from or source, shots, unlike=question)
        found.append(Question(task, f"{solved}Question: {question}\nAnswer:", answer))
    return found


def training_examples(
    tasks: Sequence[str], source: Material, num_documents: int, *, shots: int = 4, seed: int = 0
) -> list[str]:
    """Makes documents of `shots` + 1 solved questions each, of the tasks in turn.

    Made of training words, they teach the tasks that `questions` asks of held-out words.
    """
    examples = [
        questions(task, source, -(-num_documents // len(tasks)), shots=shots, seed=seed)
        for task in tasks
    ]
    of_all = [question for several in zip(*examples, strict=True) for question in several]
    return [question.prompt + question.completion for question in of_all[:num_documents]]


def evaluate(model, asked: Sequence[Question]) -> dict[str, dict]:
    """Returns for each task: questions, exact_match, its `chance`, bits_per_byte of the answers.

    exact_match: share of questions whose answer greedy decoding writes. bits_per_byte: of the
    answer with the space before and the newline after it; it falls long before a small model is
    right. Raises ValueError without questions.
    """
    if not asked:
        raise ValueError("there are no questions: ask for at least one")
    prompts = [question.prompt for question in asked]
    longest = max(len(text_bytes(question.completion)) for question in asked)
    lines = model.generate(prompts, max_new_bytes=longest, stop="\n")
    scores = model.score_continuations([(q.prompt, q.completion) for q in asked])
    results = {}
    for task in dict.fromkeys(question.task for question in asked):
        own = [i for i, question in enumerate(asked) if question.task == task]
        answers = [text_bytes(asked[i].answer) for i in own]
        right = sum(lines[i].strip() == answer for i, answer in zip(own, answers, strict=True))
        nats, num_bytes = (sum(getattr(scores[i], f) for i in own) for f in ("nats", "num_bytes"))
        results[task] = dict(
            questions=len(own),
            exact_match=right / len(own),
            chance=chance(task),
            bits_per_byte=nats / math.log(2) / num_bytes,
        )
    return results


# ---- tasks: (random generator, material) -> (question, answer)


def spelling(rng, source):
    word = _word(rng, source)
    return f'Spell the word "{word}".', " ".join(word)


def spelling_inverse(rng, source):
    word = _word(rng, source)
    return f'Which word is spelled "{" ".join(word)}"?', word


def contains_char(rng, source):
    word = _word(rng, source)
    is_in = rng.random() < 0.5
    others = [c for other in _words(rng, source) for c in other if c not in word]
    character = _one_of(rng, others if others and not is_in else word)
    return f'Is there a "{character}" in "{word}"?', "Yes" if character in word else "No"


def contains_word(rng, source):
    sentence = _sentence(rng, source)
    is_in = rng.random() < 0.5
    inside = sentence.split()
    others = [word for word in _words(rng, source) if word not in inside]
    word = _one_of(rng, others if others and not is_in else inside)
    return f'Is there the word "{word}" in "{sentence}"?', "Yes" if word in inside else "No"


def orthography(rng, source):
    """Asks for the nearer of two words by edit distance (Levenshtein)."""
    for _ in range(100):
        word = _word(rng, source)
        by_edits = sorted((edits(word, w), w) for w in {*_words(rng, source)} - {word})
        if by_edits and by_edits[0][0] < by_edits[-1][0]:
            near, far = by_edits[0][1], by_edits[-1][1]
            return f'Which is closer in spelling to "{word}": {_either(rng, near, far)}?', near
    raise ValueError("all words are as far from each other: give more words for task 'orthography'")


def semantics(rng, source):
    """Asks for the word of the same group of related words."""
    own, other = rng.choice(len(source.related), 2, replace=False)
    word, near = rng.choice(source.related[own], 2, replace=False)
    far = _one_of(rng, [w for w in source.related[other] if w not in (word, near)])
    return f'Which is closer in meaning to "{word}": {_either(rng, near, far)}?', str(near)


class _Parts(NamedTuple):
    """A text in parts: the characters of a word or the words of a sentence."""

    text: str
    parts: list[str]
    joint: str
    others: Callable[[], Sequence[str]]  # draws parts of other texts

    def replaced(self, replace: Callable[[str], str]) -> str:
        """Returns the text with each part replaced; empty parts vanish."""
        return self.joint.join(filter(None, map(replace, self.parts)))


def _of_word(rng, source) -> _Parts:
    word = _word(rng, source)
    return _Parts(word, list(word), "", lambda: _word(rng, source))


def _of_sentence(rng, source) -> _Parts:
    sentence = _sentence(rng, source)
    return _Parts(sentence, sentence.split(), " ", lambda: _words(rng, source))


def insert(rng, text: _Parts):
    at = _one_of(rng, text.parts)
    new = _one_of(rng, [part for part in text.others() if part != at])
    answer = text.replaced(lambda part: part + text.joint + new if part == at else part)
    return f'Add "{new}" after every "{at}" in "{text.text}".', answer


def delete(rng, text: _Parts):
    at = _one_of(rng, text.parts)
    answer = text.replaced(lambda part: "" if part == at else part)
    return f'Delete every "{at}" in "{text.text}".', answer


def substitute(rng, text: _Parts):
    at = _one_of(rng, text.parts)
    new = _one_of(rng, [part for part in text.others() if part != at])
    answer = text.replaced(lambda part: new if part == at else part)
    return f'Replace every "{at}" with "{new}" in "{text.text}".', answer


def swap(rng, text: _Parts):
    a, b = rng.choice(sorted(set(text.parts)), 2, replace=False)
    answer = text.replaced(lambda part: {a: b, b: a}.get(part, part))
    return f'Swap "{a}" and "{b}" in "{text.text}".', answer


def _on(change: Callable, take: Callable) -> Callable:
    return lambda rng, source: change(rng, take(rng, source))


TASKS: dict[str, Callable] = {
    task.__name__: task
    for task in (spelling, spelling_inverse, contains_char, contains_word, orthography, semantics)
} | {
    f"{change.__name__}_{kind}": _on(change, take)
    for change in (insert, delete, substitute, swap)
    for kind, take in (("char", _of_word), ("word", _of_sentence))
}


def chance(task: str) -> float:
    """Returns the exact match of guessing: questions of some tasks name two possible answers."""
    two = ("contains_char", "contains_word", "orthography", "semantics")
    return 0.5 if task in two else 0.0


def edits(a: str, b: str) -> int:
    """Returns the edit distance of two words: characters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _solved(rng, task: str, source: Material, shots: int, unlike: str) -> str:
    """Returns the text of solved questions, other than the one to be asked if there are others."""
    text = ""
    for _ in range(shots):
        for _ in range(10):
            question, answer = TASKS[task](rng, source)
            if question != unlike:
                break
        text += f"Question: {question}\nAnswer: {answer}\n\n"
    return text


def _word(rng, source: Material) -> str:
    return _one_of(rng, source.words)


def _words(rng, source: Material) -> list[str]:
    """Draws _CANDIDATES words, with repetition."""
    return [_word(rng, source) for _ in range(_CANDIDATES)]


def _sentence(rng, source: Material) -> str:
    if source.sentences:
        return _one_of(rng, source.sentences)
    size = min(int(rng.integers(3, MAX_WORDS + 1)), len(source.words))
    return " ".join(source.words[i] for i in rng.choice(len(source.words), size, replace=False))


def _one_of(rng, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _either(rng, near: str, far: str) -> str:
    return f'"{near}" or "{far}"' if rng.random() < 0.5 else f'"{far}" or "{near}"'


def _hash(text: str) -> int:
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")

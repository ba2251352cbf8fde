"""Character tasks: each by hand, and answers that are right whatever was drawn."""

import re

import numpy as np
import pytest

from bltjax.evaluation import characters
from bltjax.evaluation.characters import TASKS, Material, Question, material, questions
from bltjax.evaluation.related_words import RELATED, WORDS
from tests.evaluation.fakes import Speller

WORDS_OF_ALL = material(WORDS)
# One word, or one sentence, to ask about; what is drawn from it follows from the seed.
BY_HAND = {
    "spelling": ('Spell the word "there".', "t h e r e"),
    "spelling_inverse": ('Which word is spelled "t h e r e"?', "there"),
    "contains_char": ('Is there a "t" in "there"?', "Yes"),
    "contains_word": ('Is there the word "dog" in "the dog and the cat"?', "Yes"),
    "insert_char": ('Add "h" after every "e" in "there".', "thehreh"),
    "insert_word": (
        'Add "there" after every "the" in "the dog and the cat".',
        "the there dog and the there cat",
    ),
    "delete_char": ('Delete every "e" in "there".', "thr"),
    "delete_word": ('Delete every "the" in "the dog and the cat".', "dog and cat"),
    "substitute_char": ('Replace every "e" with "r" in "there".', "thrrr"),
    "substitute_word": (
        'Replace every "the" with "there" in "the dog and the cat".',
        "there dog and there cat",
    ),
    "swap_char": ('Swap "e" and "t" in "there".', "ehtrt"),
    "swap_word": ('Swap "the" and "cat" in "the dog and the cat".', "cat dog and cat the"),
}


def asked(task, source, wanted):
    """The answer to a question that is among the first that are drawn."""
    for seed in range(300):
        question, answer = TASKS[task](np.random.default_rng(seed), source)
        if question == wanted:
            return answer
    pytest.fail(f"{task} never asked {wanted}; the last was {question}")


@pytest.mark.parametrize("task", BY_HAND)
def test_each_task_by_hand(task):
    wanted, answer = BY_HAND[task]
    assert asked(task, Material(["there"], ["the dog and the cat"]), wanted) == answer


def test_tasks_of_words_that_differ_by_hand():
    no = Material(["there", "dog", "and", "cat", "fly"], ["the dog and"])
    assert asked("contains_char", no, 'Is there a "o" in "there"?') == "No"
    assert asked("contains_word", no, 'Is there the word "fly" in "the dog and"?') == "No"
    like = Material(["happy", "glad", "apply"])
    wanted = 'Which is closer in spelling to "happy": "glad" or "apply"?'
    assert asked("orthography", like, wanted) == "apply"
    groups = Material(["word"], related=(("happy", "glad"), ("apply", "hammer")))
    wanted = 'Which is closer in meaning to "happy": "apply" or "glad"?'
    assert asked("semantics", groups, wanted) == "glad"
    assert set(TASKS) == {*BY_HAND, "orthography", "semantics"} and len(TASKS) == 14


def test_edits():
    assert characters.edits("happy", "apply") == 2
    assert characters.edits("kitten", "sitting") == 3
    assert characters.edits("", "abc") == 3


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_whatever_is_drawn(task):
    """Recomputed from the text of the question, on words of several scripts."""
    source = material([*WORDS[:40], "語学校", "ключ", "أزرق", "naïve"])
    found = questions(task, source, 30, shots=1, seed=5)
    answers = set()
    for question in found:
        body = question.prompt.split("Question: ")[-1]
        names = re.findall('"([^"]*)"', body)
        answers.add(question.answer)
        assert question.answer == right_answer(task, names, question.answer), body
    assert len(answers) > (1 if task.startswith("contains") else 10)


def right_answer(task, names, given):
    last = names[-1]
    if task == "spelling":
        return " ".join(last)
    if task == "spelling_inverse":
        return last.replace(" ", "")
    if task == "contains_char":
        return "Yes" if names[0] in last else "No"
    if task == "contains_word":
        return "Yes" if names[0] in last.split() else "No"
    if task == "orthography":
        return min(names[1:], key=lambda word: characters.edits(names[0], word))
    if task == "semantics":
        own = next(set(group) for group in RELATED if names[0] in group)
        (near,) = own & set(names[1:])
        return near
    verb, _, unit = task.partition("_")
    parts, gap = (last.split(), " ") if unit == "word" else (list(last), "")
    if verb == "insert":
        parts = [part + gap + names[0] if part == names[1] else part for part in parts]
    if verb == "delete":
        parts = [part for part in parts if part != names[0]]
    if verb == "substitute":
        assert names[0] != names[1]
        parts = [names[1] if part == names[0] else part for part in parts]
    if verb == "swap":
        a, b = names[:2]
        parts = [b if part == a else a if part == b else part for part in parts]
    return gap.join(parts)


def test_a_prompt_by_hand():
    """Solved questions first, in the words of the training list; never the one that is asked."""
    source, training = material(["there", "goes", "one", "word"]), material(WORDS[:20])
    (question,) = questions("spelling", source, 1, shots=2, shots_from=training, seed=4)
    pattern = (
        r'Question: Spell the word "(\w+)".\nAnswer: (\w( \w)+)\n\n'
        r'Question: Spell the word "(\w+)".\nAnswer: (\w( \w)+)\n\n'
        r'Question: Spell the word "(\w+)".\nAnswer:'
    )
    first, spelled, _, second, _, _, last = re.fullmatch(pattern, question.prompt).groups()
    assert spelled == " ".join(first) and {first, second} <= set(WORDS[:20])
    assert last in source.words and question.completion == f" {' '.join(last)}\n"
    alone = questions("spelling", source, 1, shots=0)
    assert re.fullmatch(r'Question: Spell the word "\w+".\nAnswer:', alone[0].prompt)
    for each in questions("spelling", source, 50, shots=4):
        asks = re.findall("Question: (.*)", each.prompt)
        assert asks[-1] not in asks[:-1]


def test_a_question_depends_on_its_number_and_the_seed():
    few, many = questions("swap_word", WORDS_OF_ALL, 3), questions("swap_word", WORDS_OF_ALL, 9)
    assert many[:3] == few and len({question.prompt for question in many}) == 9
    assert questions("swap_word", WORDS_OF_ALL, 3, seed=1) != few


def test_training_examples_hold_training_words_only():
    training, held_out = characters.split_words(WORDS, 0.25, seed=1)
    assert sorted(training + held_out) == sorted(WORDS) and 0.15 < len(held_out) / len(WORDS) < 0.35
    # Where a word goes depends on no other.
    assert characters.split_words(held_out[::-1], 0.25, seed=1) == ([], held_out[::-1])
    texts = characters.training_examples(
        ["spelling", "swap_char"], material(training), 5, shots=2, seed=7
    )
    assert len(texts) == 5
    assert [text.count("Spell the word") for text in texts] == [3, 0, 3, 0, 3]
    assert all(text.endswith("\n") and text.count("\nAnswer: ") == 3 for text in texts)
    named = {word for text in texts for word in re.findall('"(\\w\\w+)"', text)}
    assert named <= set(training) and len(named) > 5


@pytest.mark.parametrize("task", TASKS)
def test_chance_is_half_where_a_question_has_two_answers(task):
    asked = questions(task, WORDS_OF_ALL, 40, shots=0)
    two = [
        q.answer in ("Yes", "No") or bool(re.search(r': "\S+" or "\S+"\?', q.prompt)) for q in asked
    ]
    assert set(two) == {characters.chance(task) == 0.5}


def test_exact_match_and_bits_of_answers():
    pair = [Question("spelling", "ab:", "a b"), Question("spelling", "b a:", "b a")]
    model = Speller({b"ab:": b" a b", b"b a:": b" b aa"})
    found = characters.evaluate(model, [*pair, Question("delete_char", "de:", "dé")])
    assert found["spelling"]["questions"] == 2 and found["spelling"]["exact_match"] == 0.5
    assert found["delete_char"] == dict(
        questions=1, exact_match=0.0, chance=0.0, bits_per_byte=pytest.approx(8 / np.log(2) / 5)
    )
    # " a b\n" after "ab:": the spaces and the newline are new; after "b a:" the newline alone.
    assert found["spelling"]["bits_per_byte"] == pytest.approx((6 + 2) / np.log(2) / 10)
    (prompts, options), *more = model.asked
    assert prompts == ["ab:", "b a:", "de:"] and not more
    assert options == dict(max_new_bytes=5, temperature=0.0, seed=0, stop="\n")


def test_words_of_one_kind_stand_in_one_group():
    assert len(WORDS) == sum(map(len, RELATED)) and all(word.isalpha() for word in WORDS)


def test_what_gives_no_questions_is_refused():
    with pytest.raises(ValueError, match="1 of the words have two characters"):
        material(["aa", "ab", 'q"t', "two words", "ab"])
    with pytest.raises(ValueError, match="give two groups or more"):
        material(["ab", "cd", "ef", "gh"], related=(("one", "two"),))
    with pytest.raises(ValueError, match="task 'rhyme' is not known: give one of spelling"):
        questions("rhyme", WORDS_OF_ALL, 1)
    with pytest.raises(ValueError, match="there are no questions"):
        characters.evaluate(Speller(), [])
    equal = material(["ab", "cd", "ef", "gh"])
    with pytest.raises(ValueError, match="as far from each other: give more words"):
        questions("orthography", equal, 1)

"""The requests of the harness as plain data, on models of no weight."""

import pytest

from bltjax.evaluation import harness_requests
from tests.evaluation.fakes import Speller


def test_options_by_hand():
    options = harness_requests.generation_options
    assert options({}) == dict(max_new_bytes=1024, temperature=0.0, stop=[])
    given = dict(until=["\n", ""], max_gen_toks=5, do_sample=False, temperature=0.7, top_p=0.9)
    assert options(given) == dict(max_new_bytes=20, temperature=0.0, stop=["\n"])
    assert options(dict(until="Q:", do_sample=True)) == dict(
        max_new_bytes=1024, temperature=1.0, stop=["Q:"]
    )
    given = dict(temperature=0.5, top_k=3, min_p=None)
    assert options(given) == dict(max_new_bytes=1024, temperature=0.5, stop=[], top_k=3)
    assert options(dict(temperature=0.0, repetition_penalty=1.2))["repetition_penalty"] == 1.2
    with pytest.warns(UserWarning, match=r"\['num_beams'\] are not known, and left out"):
        options(dict(num_beams=2))
    for wrong in (0, -1, 2.5, "9"):
        with pytest.raises(ValueError, match=r"max_gen_toks=.* must be a whole number from 1"):
            options(dict(max_gen_toks=wrong))


def test_generation_in_groups_of_equal_options():
    model = Speller({b"one": b" 1\xff", b"two": b" 2", b"": b"x", b"caf\xc3\xa9": b"!"})
    lines, short = dict(until=["\n"]), dict(until=["\n"], max_gen_toks=1)
    asked = [("one", lines), ("two", short), ("", lines), ("café\ud800", short), ("one", lines)]
    found = harness_requests.generate_until(model, asked)
    assert found == [" 1\ufffd", " 2", "x", "!", " 1\ufffd"]
    batches = [
        (prompts, options["max_new_bytes"], options["stop"]) for prompts, options in model.asked
    ]
    assert batches == [
        ([b"one", b"", b"one"], 1024, [b"\n"]),
        ([b"two", b"caf\xc3\xa9"], 4, [b"\n"]),
    ]
    assert all(options["temperature"] == options["seed"] == 0 for _, options in model.asked)
    assert harness_requests.generate_until(model, []) == []


def test_what_is_sampled_twice_is_drawn_twice():
    model, draw = Speller(), dict(do_sample=True)
    harness_requests.generate_until(model, [("a", draw), ("b", draw), ("a", draw), ("a", draw)])
    assert [(prompts, options["seed"]) for prompts, options in model.asked] == [
        ([b"a", b"b"], 0),
        ([b"a"], 1),
        ([b"a"], 2),
    ]

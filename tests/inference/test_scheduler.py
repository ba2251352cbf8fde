"""Continuous batching: texts do not depend on who else is there, or on when they came."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from bltjax.inference.jobs import Decoding, Job, Request
from bltjax.inference.loops import decode, read
from bltjax.inference.sampling import Sampling
from bltjax.inference.scheduler import Scheduler
from bltjax.vocabulary import BYTE_OFFSET, encode
from tests.inference.test_engine import TEXTS, Tiny

LONGEST = 256
STOPS = (b"\x00\x01", b"e")


@pytest.fixture(scope="module")
def tiny():
    return Tiny("meta_A_1b_like")


@pytest.fixture
def params(tiny):
    return tiny._generation_params


def scheduler(tiny, params, rows=3, **options) -> Scheduler:
    """Rooms of few sizes, so that all tests share their programs."""
    return Scheduler(tiny._decoder(), params, Decoding(rows), sizes=(64, LONGEST), **options)


def job(text: bytes, new: int, seed=0, sampling=Sampling(), **options) -> Job:
    return Job(Request(encode(text, add_eos=False), new, seed), sampling, **options)


def random_job(chance: random.Random) -> Job:
    text = (chance.choice(TEXTS) * chance.choice([0, 1, 1, 4])).encode()
    sampling = chance.choice(
        [Sampling(), Sampling(temperature=1.0), Sampling(1.2, 0.8, 40, 0.9, valid_utf8=True)]
    )
    stops = chance.choice([(), STOPS])
    return job(text, chance.randint(0, 40), chance.randrange(2**32), sampling, stops=stops)


def alone(tiny, params, one: Job) -> tuple[bytes, str]:
    """The text of a job that has a scheduler for itself, and how it ends."""
    mine, text, finish = scheduler(tiny, params), b"", None
    mine.submit(one)
    while not mine.idle:
        for piece in mine.step():
            text, finish = text + piece.text, piece.finish
    return text, finish


@pytest.mark.long
def test_a_text_does_not_depend_on_who_comes_and_goes(tiny, params):
    """40 jobs come at random times and a third of them leave; each of the rest is as alone."""
    chance, mine = random.Random(0), scheduler(tiny, params, steps=5)
    jobs, texts, finish, left = {}, {}, {}, set()
    to_come = [random_job(chance) for _ in range(40)]
    while to_come or not mine.idle:
        for _ in range(min(chance.randint(0, 4), len(to_come))):
            key = mine.submit(to_come[-1])
            jobs[key], texts[key] = to_come.pop(), b""
        for piece in mine.step():
            assert piece.key not in left and piece.key not in finish
            texts[piece.key] += piece.text
            if piece.finish:
                finish[piece.key] = piece.finish
                assert piece.counts.new_bytes == len(texts[piece.key])
        if chance.random() < 0.3 and (at_work := sorted(jobs.keys() - finish.keys() - left)):
            gone = chance.choice(at_work)
            mine.cancel(gone)
            left.add(gone)
    assert len(left) > 5 and len(finish) == 40 - len(left)
    for key in finish:
        assert (texts[key], finish[key]) == alone(tiny, params, jobs[key]), jobs[key]
    assert set(finish.values()) == {"stop", "length"}


def test_a_slot_is_free_at_once_for_the_next(tiny, params):
    mine = scheduler(tiny, params)
    keys = [mine.submit(job(b"abc", 40)) for _ in range(5)]
    mine.step(2)
    assert (mine.num_running, mine.num_waiting) == (3, 2)
    for key in keys[:2]:
        mine.cancel(key)
    mine.cancel(keys[4])
    mine.step(2)
    assert (mine.num_running, mine.num_waiting) == (2, 0)
    texts = mine.run()
    assert set(texts) == set(keys[2:4]) and texts[keys[3]][1].new_bytes == 40
    mine.cancel(keys[2])  # one that is done


def test_one_prompt_is_read_once_for_all_that_share_it(tiny, params, monkeypatch):
    mine, chunks = scheduler(tiny, params), []
    real = Scheduler._advance
    monkeypatch.setattr(
        Scheduler, "_advance", lambda self, *x: (chunks.append(x[-1]), real(self, *x))[1]
    )
    drawn = Sampling(temperature=1.0)
    keys = [mine.submit(job(b"abc", 12, seed, drawn)) for seed in range(5)]
    texts = mine.run()
    assert sum(chunks) <= 2  # once for those that found a slot, at most once for the others
    assert len({texts[key][0] for key in keys}) > 1
    expected = [alone(tiny, params, job(b"abc", 12, seed, drawn))[0] for seed in range(5)]
    assert [texts[key][0] for key in keys] == expected


def test_a_kept_beginning_is_read_once(tiny, params, monkeypatch):
    start = b"You answer in few words. "
    shared = len(encode(start, add_eos=False))
    jobs = [job(start + end, 9, shared=shared) for end in (b"one", b"another", b"third")]
    expected = [alone(tiny, params, one._replace(shared=0))[0] for one in jobs]
    mine, read_ids = scheduler(tiny, params, keep_prefixes=1), []
    real = Scheduler._advance

    def advance(self, reading, shape, end, chunks):
        read_ids.append(end - reading.count)
        return real(self, reading, shape, end, chunks)

    monkeypatch.setattr(Scheduler, "_advance", advance)
    for one, text in zip(jobs, expected, strict=True):
        mine.submit(one)
        ((found, _),) = mine.run().values()
        assert found == text
    mine.submit(job(b"x" * (shared - 1), 3, shared=shared))  # takes its place
    mine.run()
    assert read_ids == [shared, 3, 7, 5, shared]
    assert len(mine._prefixes) == 1


def test_long_prompts_are_read_between_the_steps_of_others(tiny, params):
    mine = scheduler(tiny, params, rows=2)
    first = mine.submit(job(b"abc", 200))
    mine.step(4)
    mine.submit(job(b"x" * 230, 5))  # two chunks
    seen = [[piece.key for piece in mine.step(4)] for _ in range(2)]
    assert seen == [[first], [first, first + 1]]


def test_log_probabilities_are_those_of_the_model(tiny, params):
    mine, found = scheduler(tiny, params, steps=7), []
    drawn = Sampling(temperature=0.5, top_k=3)
    other = mine.submit(job(b"no", 30))
    mine.step()
    key = mine.submit(job(b"The quick", 25, 3, drawn, log_probs=True, stops=[b"\xfe\xfe"]))
    while not mine.idle:
        for piece in mine.step():
            assert (piece.log_p is None) == (piece.key == other)
            if piece.key == key:
                found.append((piece.text, piece.log_p))
    text, log_p = b"".join(t for t, _ in found), np.concatenate([p for _, p in found])
    ids = encode(b"The quick" + text, add_eos=False)
    expected = expected_log_p(tiny, ids)[-len(text) - 1 : -1]
    assert log_p.shape == (25, 260)
    np.testing.assert_allclose(log_p, expected, atol=1e-5)
    assert all(log_p[i, b + BYTE_OFFSET] > np.sort(log_p[i])[-4] for i, b in enumerate(text))
    assert len(found) > 3


def expected_log_p(tiny, ids):
    """Teacher-forced log-probabilities [N, 260] after each id."""
    from bltjax.model import functional
    from bltjax.patching.boundaries import lengths_from_starts, patch_starts
    from bltjax.patching.buffers import buffers_from_lengths
    from bltjax.patching.entropy import next_byte_entropy

    rows = ids[None]
    logits = functional.apply(tiny.entropy_config, tiny.params["entropy_model"], rows)
    starts = patch_starts(tiny.patching, rows, np.array(next_byte_entropy(logits)))[0]
    patches = buffers_from_lengths(lengths_from_starts(starts)[None], rows.shape[1])
    logits = functional.apply(tiny.config, tiny.params["blt"], rows, patches)
    return np.array(jax.nn.log_softmax(logits[0, :, :260]))


@pytest.mark.parametrize("rule", ["entropy", "falling"])
def test_each_row_has_a_threshold_of_its_own(tiny, rule):
    """It is that of a model with this threshold, and compiles nothing."""
    patching = dataclasses.replace(tiny.patching, rule=rule)
    thresholds, found, before = (1.3, 5.4, 1e30), [], None
    mine = scheduler(Tiny("meta_A_1b_like", patching), tiny._generation_params)
    keys = [mine.submit(job(b"The quick", 30, threshold=t)) for t in thresholds]
    together = mine.run()
    for key, threshold in zip(keys, thresholds, strict=True):
        given = dataclasses.replace(patching, threshold=threshold)
        model = Tiny("meta_A_1b_like", given)
        mine = scheduler(model, tiny._generation_params)
        mine.submit(job(b"The quick", 30))
        ((text, counts),) = mine.run().values()
        assert text == together[key][0] == model.recompute(b"The quick", 30)
        found.append(counts.patches)
        assert counts.patches == together[key][1].patches
        before = before or decode._cache_size()
        assert decode._cache_size() == before
    assert found == sorted(found, reverse=True) and len(set(found)) > 1


def test_what_has_no_room_is_refused(tiny, params):
    mine = scheduler(tiny, params)
    with pytest.raises(ValueError, match=r"of 4 ids needs 304 positions, and there are 256"):
        mine.submit(job(b"abc", 300))
    assert mine.idle


@pytest.mark.long
def test_few_programs(tiny, params):
    """Other prompts, lengths and numbers of jobs compile nothing."""
    drawn = Sampling(temperature=1.0)

    def run(count):
        mine = scheduler(tiny, params)
        for i in range(count):
            mine.submit(job(b"abc" * i, 9, sampling=drawn))
        mine.run()

    run(4)
    before = read._cache_size(), decode._cache_size()
    run(1)
    run(9)
    assert (read._cache_size(), decode._cache_size()) == before


@pytest.mark.long
def test_texts_are_the_same_on_a_mesh(tiny):
    """Rows over two devices: a row enters a slot of any of them."""
    from bltjax import sharding
    from bltjax.config import MeshConfig

    drawn = Sampling(temperature=1.0)
    found = []
    for mesh in (MeshConfig(1, 1, 1), MeshConfig(2, 1, 2)):
        devices = jax.devices()[: mesh.data * mesh.tensor]
        with jax.set_mesh(sharding.make_mesh(mesh, devices)):
            model = Tiny("meta_A_1b_like")
            mine = Scheduler(model._decoder(), model._generation_params, Decoding(4), sizes=(64,))
            keys = [mine.submit(job(bytes([97 + i]) * i, 9 + i, i, drawn)) for i in range(7)]
            texts = mine.run()
            found.append([texts[key][0] for key in keys])
    assert found[0] == found[1]


@pytest.mark.long
def test_calls_for_some_of_many_rows_change_no_text(tiny, params, monkeypatch):
    """On CPUs the global stack serves a quarter of many rows at once."""
    from bltjax.inference import room

    jobs = [job(bytes([97 + i]) * (i % 5), 20 + i, i, Sampling(temperature=1.0)) for i in range(16)]
    found, calls = [], []
    for many in (10**9, 16):
        monkeypatch.setattr(room, "MANY", many)
        mine = scheduler(tiny, params, rows=16)
        keys = [mine.submit(one) for one in jobs]
        texts = mine.run()
        found.append([texts[key][0] for key in keys])
        calls.append(sum(room.work.global_calls for room in mine.rooms.values()))
    assert found[0] == found[1] and calls[0] < calls[1]

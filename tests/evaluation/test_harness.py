"""lm-evaluation-harness on a local task: its scores are those of full forward passes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bltjax
from bltjax.vocabulary import BYTE_OFFSET, EOS_ID, encode
from tests import directories
from tests.evaluation.fakes import CaseModel

ROOT = Path(__file__).parents[2]
LENGTH = 64  # of the direct passes, so that one shape is compiled
GOLD = 0, 2, 1, 0
ITEMS = [
    dict(
        question="of words that are many, here are two", choices=[" to", " on w", " \u00e9\u00e8"]
    ),
    dict(question="in a caf\u00e9 on the road to somewhere", choices=["s", " at", "!"]),
    dict(question="if some_name: x = 1 + 2 + 3 + 4 + ", choices=["\ny", "23", "4"]),
    dict(question="those who read the last of it, the", choices=["re", "m", "ir"]),
]
ITEMS = [item | dict(gold=gold) for item, gold in zip(ITEMS, GOLD, strict=True)]
CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list:
  - metric: bits_per_byte
"""
WRITTEN = """
task: local_written
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs:
  until: ["stop"]
  max_gen_toks: 1
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return directories.hub(tmp_path_factory.mktemp("hf") / "hf", "hf_A_1b_like")


class Recomputing:
    """A model of bytes alone, which compiles little; a full pass for every byte it writes."""

    def __init__(self, directory):
        self.model = bltjax.load(directories.hub(directory / "meta", "meta_entropy"))
        self.score, self.score_continuations = self.model.score, self.model.score_continuations

    def generate(self, prompts, max_new_bytes, temperature, seed, stop):
        assert temperature == 0.0 and stop == [b"stop"]
        return greedy(self.model, prompts, max_new_bytes)


@pytest.fixture(scope="module", params=["bytes", pytest.param("blt", marks=pytest.mark.long)])
def models(request, tmp_path_factory, checkpoint):
    """(what the harness asks, what the direct passes are of)."""
    if request.param == "blt":
        model = bltjax.load(checkpoint)
        return model, model
    model = Recomputing(tmp_path_factory.mktemp("bytes"))
    return model, model.model


def write_tasks(directory, items):
    """The three tasks, their items beside them."""
    directory.mkdir(exist_ok=True)
    (directory / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    source = (
        "dataset_path: json\ntest_split: test\nnum_fewshot: 0\n"
        f"dataset_kwargs:\n  data_files:\n    test: {directory / 'items.jsonl'}\n"
    )
    for name, text in (("choice", CHOICE), ("text", ROLLING), ("written", WRITTEN)):
        (directory / f"{name}.yaml").write_text(text + source)
    return directory


def direct_logits(model, texts):
    """float64 [N, V] of each text, after each id of BOS + text."""
    ids = [encode(text, add_eos=False) for text in texts]
    tokens = np.full((16, LENGTH), BYTE_OFFSET, np.int32)
    for row, known in zip(tokens, ids, strict=False):
        row[: len(known)] = known
    lengths = None
    if model.config is not None:
        lengths = model.patch_lengths(tokens)
        lengths = np.pad(lengths, ((0, 0), (0, LENGTH + 1 - lengths.shape[1])))
    logits = model.logits(tokens, lengths).astype(np.float64)
    return [row[: len(known)] for row, known in zip(logits, ids, strict=False)]


def log_p(model, pairs):
    """log p of each continuation, from one pass over all of it."""
    found = []
    texts = [context + continuation for context, continuation in pairs]
    for (_, continuation), text, logits in zip(
        pairs, texts, direct_logits(model, texts), strict=True
    ):
        ids = encode(text, add_eos=False)
        exact = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        positions = np.arange(len(ids) - len(continuation.encode()), len(ids))
        found.append(exact[positions - 1, ids[positions]].sum())
    return np.array(found)


def greedy(model, texts, num_bytes):
    """What each text goes on with, from a full pass for every byte."""
    grown = list(texts)
    for _ in range(num_bytes):
        for i, logits in enumerate(direct_logits(model, grown)):
            allowed = np.full(260, -np.inf)
            allowed[EOS_ID], allowed[BYTE_OFFSET:] = logits[-1, EOS_ID], logits[-1, BYTE_OFFSET:]
            grown[i] += bytes([allowed.argmax() - BYTE_OFFSET])
    return [new[len(old) :] for new, old in zip(grown, texts, strict=True)]


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip(
        "bltjax.evaluation.harness", reason="needs lm-eval", exc_type=ImportError
    )


def test_likelihoods_are_negative_nats(harness):
    model = harness.HarnessModel(model=CaseModel())
    pairs, texts = [("ab", "abC"), ("ab", "a")], [("aBC",), ("",)]
    asked = [[SimpleNamespace(args=args) for args in requests] for requests in (pairs, texts)]
    assert model.loglikelihood(asked[0]) == [(-3.0, False), (0.0, True)]
    assert model.loglikelihood_rolling(asked[1]) == [-2.0, 0.0]


def test_scores_equal_a_brute_force_computation(harness, models, tmp_path):
    asked, model = models
    # Three of four are to be written as the model does.
    written = greedy(model, [item["question"].encode() for item in ITEMS], 4)
    written = [text.decode("utf-8", "replace") + "?" * (i == 3) for i, text in enumerate(written)]
    items = [i | dict(written=text) for i, text in zip(ITEMS, written, strict=True)]
    tasks = write_tasks(tmp_path / "tasks", items)
    names = ["local_choice", "local_text", "local_written"]
    found = harness.run_tasks(asked, names, str(tasks))
    likelihoods = log_p(model, [(i["question"], c) for i in items for c in i["choices"]])
    likelihoods = likelihoods.reshape(4, 3)
    sizes = np.array([[len(c) for c in item["choices"]] for item in items])
    gold = np.array([item["gold"] for item in items])
    assert found["local_choice"]["acc"] == np.mean(likelihoods.argmax(1) == gold)
    assert found["local_choice"]["acc_norm"] == np.mean((likelihoods / sizes).argmax(1) == gold)
    texts = [item["question"] + item["choices"][0] for item in items]
    total = log_p(model, [("", text) for text in texts]).sum()
    bits = -total / np.log(2) / sum(len(text.encode()) for text in texts)
    assert found["local_text"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["local_written"]["exact_match"] == 3 / 4


def test_noise_goes_into_what_is_asked(harness, tmp_path):
    """Of a model to which only what is upper case costs anything."""
    tasks = write_tasks(tmp_path / "tasks", [i | dict(written="") for i in ITEMS])
    costs = []

    class Counting(CaseModel):
        def score_continuations(self, pairs, on_progress):
            costs.append([sum(map(str.isupper, part)) for pair in pairs for part in pair])
            return super().score_continuations(pairs, on_progress)

    for noise in ({}, dict(noise="upper"), dict(noise="upper", noise_where="prompt")):
        harness.run_tasks(Counting(), ["local_choice"], str(tasks), limit=1, **noise)
    clean, both, prompt = costs
    assert sum(clean) == 0 and len(clean) == 6
    assert all(both[::2]) and any(both[1::2]) and prompt[::2] == both[::2] and not any(prompt[1::2])


def test_by_the_name_that_the_harness_knows(harness, checkpoint):
    from lm_eval.api.registry import get_model

    made = get_model("bltjax").create_from_arg_string(
        f"checkpoint={checkpoint},noise=drop", dict(batch_size=1, device="cpu")
    )
    assert made.model.config is not None and made.noise == "drop"


def test_wrong_arguments_name_the_remedy(harness, tmp_path):
    with pytest.raises(ValueError, match="no task local_chioce in "):
        harness.run_tasks(CaseModel(), ["local_chioce"], str(write_tasks(tmp_path / "t", ITEMS)))
    with pytest.raises(ValueError, match=r"give checkpoint=DIR, or model="):
        harness.HarnessModel()
    with pytest.raises(ValueError, match="noise 'leet' is not known"):
        harness.HarnessModel(model=CaseModel(), noise="leet")
    with pytest.raises(ValueError, match="where='all' must be"):
        harness.HarnessModel(model=CaseModel(), noise="drop", noise_where="all")


def test_without_the_library_the_remedy_is_named():
    code = "import sys; sys.modules['lm_eval'] = None; import bltjax.evaluation.harness"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: harness tasks take lm-evaluation-harness" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("pip install 'bltjax[eval]'")

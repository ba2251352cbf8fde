"""Runs of the token model: every stage, resumed, evaluated and loaded, on a small corpus."""

import dataclasses
import json
import pickle
import shutil

import jax
import numpy as np
import pytest

import bltjax
from bltjax import sharding
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import HashConfig, MeshConfig, RunConfig, from_config_dict
from bltjax.costs.memory_plan import plan_stage
from bltjax.data import tokenizer
from bltjax.data.batches.lanes import Lane, Layout
from bltjax.data.records.store import Documents
from bltjax.recipe import token_corpus
from bltjax.recipe.checks import CheckedRun, check_stages, used_models
from bltjax.recipe.corpus import open_corpus
from bltjax.recipe.stages import run
from bltjax.sharding import check_batch_sizes
from bltjax.training.metrics import HELD_OUT
from tests import processes
from tests.configs.tiny import get_config

pytestmark = pytest.mark.long  # one interpreter will do

STEPS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus") / "text"
    processes.write_corpus(directory)
    return directory


def config_of(corpus, **changes) -> RunConfig:
    config = get_config()
    config.stages, config.data.root = ("token_model", "evaluate"), str(corpus)
    config.mesh.data = 1
    model, training = config.token_model, config.token_training
    model.transformer.dim, model.transformer.num_heads = 16, 2
    model.transformer.ffn_multiple_of, model.vocab_size = 8, 300
    config.token_training.update(config.blt_training)
    training.steps, training.row_bytes = STEPS, 32
    training.keep_checkpoints = 9
    config.evaluation.baselines = False
    config = from_config_dict(RunConfig, config)
    return dataclasses.replace(config, **changes)


def run_in(workdir, config) -> dict:
    """Does what `bltjax.train` does, on one of the devices."""
    mesh, directory = sharding.make_mesh(devices=jax.devices()[:1]), RunDirectory(workdir)
    check_stages(config, directory)
    check_batch_sizes(config, mesh)
    directory.claim(config)
    return run(CheckedRun(config, directory, mesh))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """(working directory, result) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run_in(workdir, config_of(corpus))


def test_the_run_says_what_it_measured(whole, corpus):
    workdir, result = whole
    lines = [json.loads(line) for line in (workdir / "token_model/metrics.jsonl").open()]
    assert lines[-1]["bits_per_byte"] < 0.7 * lines[0]["bits_per_byte"]  # it learns
    assert lines[-1]["mean_token_bytes"] > 2 and lines[-1]["compilations"] == 1
    assert result["compilations"] == dict(token_model=1, evaluate=1)
    assert "patch_use" not in result and "entropy_model" not in result
    assert 2 < result["mean_token_bytes"] < 9
    store = open_corpus(config_of(corpus), RunDirectory(workdir))
    assert result["validation_bytes"] == store.num_bytes("validation")
    saved = json.loads((workdir / "result.json").read_text())
    assert saved["sources"]["text"]["bits_per_byte"] == pytest.approx(result["bits_per_byte"])


def test_killed_and_run_again_it_ends_with_the_same_bits(whole, corpus, tmp_path):
    workdir, result = whole
    killed = tmp_path / "killed"
    shutil.copytree(workdir, killed)
    for step in range(12, STEPS + 1, 4):  # as it was after step 8, some more having been logged
        shutil.rmtree(killed / "token_model" / "checkpoints" / str(step))
    (killed / "result.json").unlink()
    config = config_of(corpus)
    again = run_in(killed, config)
    assert again["bits_per_byte"] == result["bits_per_byte"]
    assert processes.metrics(killed, "token_model") == processes.metrics(workdir, "token_model")
    found, expected = (
        RunDirectory(path).stage(config, "token_model").params() for path in (killed, workdir)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_another_tokenizer_in_the_place_of_its_own_is_refused(whole, corpus, tmp_path):
    workdir, _ = whole
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "token_model" / "checkpoints" / str(STEPS))
    other = tokenizer.train([b"another text"] * 9, 300)
    other.save(tmp_path / "run" / "tokenizer.json")
    told = f"and that of the run is {other.digest} now: put tokenizer.json back"
    with pytest.raises(ValueError, match=told):
        run_in(tmp_path / "run", config_of(corpus))
    with pytest.raises(ValueError, match=told):
        run_in(tmp_path / "run", config_of(corpus, stages=("evaluate",)))
    with pytest.raises(ValueError, match=told):
        bltjax.load(tmp_path / "run")


def test_a_tokenizer_may_be_given(whole, corpus, tmp_path):
    workdir, _ = whole
    config = config_of(corpus)
    store = open_corpus(config, RunDirectory(workdir))
    given = dataclasses.replace(config.tokenizer, path=str(workdir / "tokenizer.json"))
    config = dataclasses.replace(config, tokenizer=given)
    found = token_corpus.ensure_tokenizer(config, RunDirectory(tmp_path), store)
    assert (tmp_path / "tokenizer.json").read_bytes() == (workdir / "tokenizer.json").read_bytes()
    small = dataclasses.replace(config.token_model, vocab_size=270)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=f"has {len(found)} ids and the model 270"):
        config = dataclasses.replace(config, token_model=small)
        token_corpus.ensure_tokenizer(config, RunDirectory(tmp_path / "other"), store)


def test_a_tokenizer_is_trained_on_no_more_than_it_is_to_read(whole, corpus):
    config = config_of(corpus)
    store = open_corpus(config, RunDirectory(whole[0]))
    texts = {d.data for d in Documents(store.shards())}
    sizes = sorted(map(len, texts))
    few = list(token_corpus.sample(config, store, 3 * sizes[0]))
    assert set(few) < texts and 3 * sizes[0] <= sum(map(len, few)) < 3 * sizes[0] + sizes[-1]
    assert sorted(token_corpus.sample(config, store, 10**9)) == sorted(texts)  # each once


def test_rows_of_tokens_hold_all_of_the_text(whole, corpus):
    """In a lane whose layout was sent to another process."""
    workdir, _ = whole
    trained = tokenizer.load(workdir / "tokenizer.json")
    store = open_corpus(config_of(corpus), RunDirectory(workdir))
    documents = token_corpus.corpus.in_order(store, store.shards(), entropies=False)
    layout = pickle.loads(pickle.dumps(Layout(32, pool=1, tokenizer=trained)))
    rows = list(Lane(documents, layout, 0, 1))
    targets = np.concatenate([row.targets[row.loss_mask] for row in rows])
    assert trained.decode(targets) == b"".join(
        documents[i][1].data for i in range(documents.num_places)
    )
    assert rows[0].tokens.max() >= 260


def test_which_models_a_choice_of_stages_uses(whole, tmp_path, corpus):
    workdir, _ = whole
    config = config_of(corpus)
    alone = dataclasses.replace(config, stages=("evaluate",))
    directory = RunDirectory(workdir)
    assert used_models(config) == used_models(alone, directory) == ["token_model"]
    assert "blt" in used_models(alone, RunDirectory(tmp_path))
    check_stages(alone, directory)
    with pytest.raises(ValueError, match="8 row shards"):
        check_batch_sizes(config, jax.sharding.AbstractMesh((8, 1, 1), ("data", "fsdp", "tensor")))


def test_a_run_of_it_loads_as_a_token_model(whole):
    workdir, _ = whole
    model = bltjax.load(workdir, compute_dtype="bfloat16", dtype="bfloat16")
    assert model.config.compute_dtype == "bfloat16" and model.lengths.row_bytes == 32
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"bfloat16"}
    assert model.score([b"patch byte"])[0].bits_per_byte > 0
    with pytest.raises(ValueError, match="give no entropy_model"):
        bltjax.load(workdir, entropy_model=workdir)


def test_a_run_with_tables_whose_words_keep_marks(corpus, tmp_path):
    """Rows that the last steps did not read have made up for it before they are saved."""
    config = config_of(corpus)
    optimizer = dataclasses.replace(
        config.token_training.optimizer, hash_rate=2.0, hash_updates="touched"
    )
    config = dataclasses.replace(
        config,
        tokenizer=dataclasses.replace(config.tokenizer, pattern="marks"),
        token_model=dataclasses.replace(
            config.token_model, hash=HashConfig((2, 3), 4099), hash_dim=8
        ),
        token_training=dataclasses.replace(config.token_training, optimizer=optimizer),
    )
    result = run_in(tmp_path / "run", config)
    assert result["compilations"] == dict(token_model=1, evaluate=1)
    counted = result["parameters"]["token_model"]
    assert counted["total"] - counted["without_hash_tables"] == 2 * 4099 * 8
    model = bltjax.load(tmp_path / "run")
    assert "M}]+" in model.tokenizer.text and model.config == config.token_model
    store = open_corpus(config, RunDirectory(tmp_path / "run"))
    held = [d.data for d in Documents(store.shards(part="validation"))]
    scores = model.score(held, row_bytes=config.token_training.row_bytes)
    bits = sum(s.nats for s in scores) / np.log(2) / sum(map(len, held))
    assert bits == pytest.approx(result["bits_per_byte"], rel=0.05)  # rows are packed otherwise


def test_commands_of_bytes_say_what_is_wrong(whole):
    model = bltjax.load(whole[0])
    for name in ("patching", "patch_lengths"):
        with pytest.raises(ValueError, match="this is a token model"):
            getattr(model, name)


def test_it_can_be_planned(corpus, no_mesh):
    mesh = sharding.abstract_mesh(MeshConfig(data=1, fsdp=2), 2)
    found = plan_stage(config_of(corpus), "token_model", mesh)
    assert found.optimizer >= 2 * found.parameters > 0 and found.batch == 2 * 32 * 13 // 2


@pytest.mark.parametrize("rule", ["byte", "space", "static"])
def test_other_families_are_a_matter_of_config(rule, corpus, tmp_path):
    config = get_config()
    config.data.root, config.patching.rule = str(corpus), rule
    config.stages, config.blt_training.steps = ("blt", "evaluate"), 8
    config.blt_training.validate_every, config.evaluation.validation_rows = 3, 10**6
    if rule == "space":
        config.blt_training.optimizer.hash_updates = "touched"
    result = run_in(tmp_path / "run", from_config_dict(RunConfig, config))
    lines = [json.loads(line) for line in (tmp_path / "run/blt/metrics.jsonl").open()]
    assert lines[-1]["loss"] < lines[0]["loss"] and 0 < result["bits_per_byte"] < 9
    # After steps 3, 6 and the last; of all held-out rows, so the last is what `evaluate` finds.
    measured = [(line["step"], line[HELD_OUT]) for line in lines if HELD_OUT in line]
    assert [step for step, _ in measured] == [2, 5, 7]
    assert measured[0][1] > 1.01 * measured[2][1]
    assert measured[2][1] == pytest.approx(result["bits_per_byte"], rel=1e-5)
    assert lines[-1][f"{HELD_OUT}/text"] == pytest.approx(measured[2][1])
    means = dict(byte=(1, 1), space=(2, 9), static=(3, 4))[rule]
    assert means[0] <= result["mean_patch_bytes"] <= means[1]

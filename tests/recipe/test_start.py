"""Runs that start from the weights of another model: what is taken, what learns, what is kept."""

import dataclasses
import json
import shutil
import subprocess

import jax
import numpy as np
import pytest

import bltjax
from bltjax import sharding
from bltjax.checkpoints import formats
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.run_directory import RunDirectory, saved_steps
from bltjax.checkpoints.weights import flat
from bltjax.config import RunConfig, from_config_dict
from bltjax.recipe.checks import check_run
from bltjax.recipe.stages import run
from bltjax.recipe.start import filled
from bltjax.training.loss import LN2
from tests import directories, processes
from tests.configs import tiny_start
from tests.interruptions import interrupted_at
from tests.processes import metrics, wait_for_step

pytestmark = pytest.mark.long  # one interpreter will do

# No entropy of it is near the threshold: records hold entropies as float16.
TEXT = "def f(x):\n    return x + 1  # naïve 日本\n" * 5


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Directories with the golden models A: Hugging Face's, and Meta's with an entropy model."""
    top = tmp_path_factory.mktemp("sources")
    return dict(
        hf=directories.hub(top / "hf", "hf_A_1b_like"),
        meta=directories.meta_with_entropy_model(top / "meta"),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a run that reads one document, which fills its rows, and starts from a directory."""
    corpus = tmp_path_factory.mktemp("corpus")
    (corpus / "0.txt").write_text(TEXT)

    def made(source, **changes) -> RunConfig:
        given = tiny_start.get_config()
        given.start_from, given.stages = str(source), ("entropies", "blt")
        given.data.root, given.data.validation_fraction = str(corpus), 1e-9
        training = given.blt_training
        training.row_bytes = training.row_patches = len(TEXT.encode()) + 2
        training.steps, training.checkpoint_every = 1, 100
        training.optimizer.schedule, training.optimizer.warmup_steps = "constant", 0
        training.optimizer.learning_rate = 1e-3
        given.update_from_flattened_dict(changes)
        return from_config_dict(RunConfig, given)

    return made


def train(config, workdir) -> RunDirectory:
    mesh = dataclasses.replace(config.mesh, data=1)
    checked = check_run(dataclasses.replace(config, mesh=mesh), workdir)
    run(checked)
    return checked.directory


def params_of(directory, name="blt") -> dict:
    return {k: read_all(v) for k, v in flat(formats.read(directory).params[name]).items()}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs here are on one of the devices."""
    make_mesh = sharding.make_mesh

    def make(config=None, devices=None):
        return make_mesh(devices=(devices or jax.devices())[:1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", make)
        yield


@pytest.fixture(scope="module")
def of_hf(sources, config, tmp_path_factory):
    """A run of two steps from Hugging Face's weights."""
    changes = {"blt_training.steps": 2}
    return train(config(sources["hf"], **changes), tmp_path_factory.mktemp("runs") / "hf")


def first_bits(directory) -> float:
    first, *_ = metrics(directory.path, "blt")
    assert first["step"] == 0
    return first["bits_per_byte"]


def bits_of_source(source) -> float:
    (score,) = bltjax.load(source).score([TEXT])
    return score.nats / score.num_bytes / LN2


def test_the_first_loss_is_that_of_the_source(sources, of_hf):
    assert first_bits(of_hf) == pytest.approx(bits_of_source(sources["hf"]), rel=1e-6)
    started = json.loads((of_hf.path / "start.json").read_text())
    assert len(started["blt"]) == 16


def test_the_first_loss_is_that_of_metas_weights(sources, config, tmp_path):
    directory = train(config(sources["meta"]), tmp_path / "run")
    assert first_bits(directory) == pytest.approx(bits_of_source(sources["meta"]), rel=1e-6)


def test_settings_are_those_of_the_source(sources, of_hf):
    with jax.set_mesh(sharding.make_mesh()):
        source = formats.read(sources["hf"])
        np.testing.assert_equal(
            params_of(of_hf.path, "entropy_model"), params_of(sources["hf"], "entropy_model")
        )
    stored = of_hf.config()
    assert stored.blt == source.blt and stored.entropy_model == source.entropy_model
    assert stored.patching == source.patching
    assert stored.patching.target_patch_bytes is None
    assert of_hf.threshold() == source.patching.threshold == directories.THRESHOLD
    assert saved_steps(of_hf.path / "blt" / "checkpoints") == [0, 2]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"blt.global_transformer.dim": 32}, r"blt\.global_transformer\.dim=32 contradicts"),
        ({"patching.target_patch_bytes": 6.0}, r"patching\.target_patch_bytes=6\.0 contradicts"),
        ({"patching.rule": "space"}, r"patching\.rule='space' contradicts"),
    ],
)
def test_what_contradicts_the_source_is_named(sources, config, tmp_path, changes, said):
    with pytest.raises(ValueError, match=f"{said} start_from={sources['hf']}, which has"):
        check_run(config(sources["hf"], **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_how_it_is_computed_may_differ(sources, config):
    given = config(sources["hf"], **{"blt.remat": "full", "blt.compute_dtype": "bfloat16"})
    with jax.set_mesh(sharding.make_mesh()):
        source = formats.read(sources["hf"])
    found = filled(given, source.entropy_model, source.blt, source.patching)
    assert found.blt == dataclasses.replace(source.blt, remat="full", compute_dtype="bfloat16")


def test_a_source_without_a_blt_is_refused(config, tmp_path):
    source = directories.hub(tmp_path / "entropy", "meta_entropy")
    with pytest.raises(ValueError, match="has an entropy model alone, and the stage 'blt' trains"):
        check_run(config(source), tmp_path / "run")
    with pytest.raises(ValueError, match="start_from=/nowhere: no directory /nowhere"):
        check_run(config("/nowhere"), tmp_path / "run")


def test_frozen_parts_stay_and_hold_nothing(sources, config, tmp_path, capsys):
    """Also with weight decay, after 50 steps."""
    rates = {"blt_training.optimizer.hash_rate": 0.0, "blt_training.optimizer.global_rate": 0.0}
    changes = rates | {"blt_training.steps": 50}
    directory = train(config(sources["hf"], **changes), tmp_path / "frozen")
    said = capsys.readouterr().out
    before, after = params_of(sources["hf"]), params_of(directory.path)
    frozen = {n for n in after if n.startswith(("global_", "encoder_hash"))}
    assert frozen and {n for n in after if np.array_equal(before[n], after[n])} == frozen
    learning = sum(x.size for n, x in after.items() if n not in frozen)
    total = sum(x.size for x in after.values())
    held = 8 * learning / 1e6  # two moments in float32
    assert f"{learning:,} of {total:,} parameters learn, the optimizer holds {held:.1f} MB" in said


def test_a_run_goes_on_without_its_source(sources, of_hf, config, tmp_path):
    source = shutil.copytree(sources["hf"], tmp_path / "source")
    given = config(source, **{"blt_training.steps": 2})
    again = tmp_path / "again"
    with interrupted_at(0):
        train(given, again)
    shutil.rmtree(source)
    assert metrics(train(given, again).path, "blt") == metrics(of_hf.path, "blt")
    np.testing.assert_equal(params_of(again), params_of(of_hf.path))


@pytest.fixture(scope="module")
def with_blocks(sources, config, tmp_path_factory):
    """A run from Hugging Face's weights whose decoder learns to fill in blocks."""
    given = config(sources["hf"], **BLOCKS)
    return given, train(given, tmp_path_factory.mktemp("runs") / "blocks")


BLOCKS = {
    "blt.diffusion_block": 3,
    "blt_training.steps": 3,
    "blt_training.checkpoint_every": 1,
    "blt_training.log_every": 1,
}
MASK = "local_decoder.mask_embedding.weight"


def test_a_plain_model_learns_blocks_and_goes_on_as_if_never_interrupted(
    sources, with_blocks, tmp_path
):
    given, directory = with_blocks
    assert first_bits(directory) == pytest.approx(bits_of_source(sources["hf"]), rel=1e-6)
    lines, found = metrics(directory.path, "blt"), params_of(directory.path)
    assert all(line["block_loss"] > 0 and 0 < line["block_share"] <= 1 for line in lines)
    assert set(found) - set(params_of(sources["hf"])) == {MASK}
    with interrupted_at(2):
        train(given, tmp_path / "run")
    again = train(given, tmp_path / "run").path
    assert metrics(again, "blt") == lines
    np.testing.assert_equal(params_of(again), found)


def test_the_mask_of_blocks_is_kept_by_our_format_alone(with_blocks, tmp_path):
    _, directory = with_blocks
    found = params_of(directory.path)
    with jax.set_mesh(sharding.make_mesh()):
        weights = formats.read(directory.path)
        formats.plan(weights, "bltjax").write(tmp_path / "ours")
        plan = formats.plan(weights, "hf")
        plan.write(tmp_path / "hf")
        ours, theirs = (formats.read(tmp_path / name) for name in ("ours", "hf"))
    assert ours.blt == weights.blt and ours.blt.diffusion_block == 3
    np.testing.assert_equal(params_of(tmp_path / "ours"), found)
    assert theirs.blt == dataclasses.replace(weights.blt, diffusion_block=0)
    assert "diffusion_block=3: published formats know no blocks" in plan.notes[-1]
    mask = found.pop(MASK)
    np.testing.assert_equal(params_of(tmp_path / "hf"), found)
    assert mask.any()


def test_blocks_of_the_source_are_kept_and_others_may_be_learned(with_blocks, config):
    _, directory = with_blocks
    with jax.set_mesh(sharding.make_mesh()):
        source = formats.read(directory.path)
    plain = dataclasses.replace(source.blt, diffusion_block=0)
    for there, here, expected in ((source.blt, {}, 3), (source.blt, 5, 5), (plain, 5, 5)):
        given = config(directory.path, **({"blt.diffusion_block": here} if here else {}))
        found = filled(given, source.entropy_model, there, source.patching)
        assert found.blt == dataclasses.replace(source.blt, diffusion_block=expected)
    given = config(directory.path, **{"blt_training.diffusion.weight": 0.5})
    filled(given, source.entropy_model, source.blt, source.patching)
    with pytest.raises(ValueError, match=r"diffusion\.weight=0\.5 changes nothing: start_from="):
        filled(given, source.entropy_model, plain, source.patching)


def test_blocks_of_another_length_are_learned_anew(with_blocks, config, tmp_path):
    """From the vectors of nothing, for those of the source are of other distances."""
    _, source = with_blocks
    given = config(source.path, **{"blt.diffusion_block": 2, "blt_training.steps": 1})
    given = dataclasses.replace(given, stages=("blt",))
    found, before = params_of(train(given, tmp_path / "run").path), params_of(source.path)
    assert found[MASK].shape == (2, before[MASK].shape[1]) and len(before[MASK]) == 3
    assert np.abs(found[MASK]).max() < np.abs(before[MASK]).max()


def test_blocks_of_earlier_versions_are_refused(with_blocks, tmp_path):
    """Which had a single vector."""
    _, directory = with_blocks
    with jax.set_mesh(sharding.make_mesh()):
        weights = formats.read(directory.path)
        decoder = weights.params["blt"]["local_decoder"]
        mask = decoder["mask_embedding"]
        mask["weight"] = read_all(mask["weight"])[:1]
        formats.plan(weights, "bltjax").write(tmp_path / "earlier")
        with pytest.raises(ValueError, match=r"\[1, 32\].*\[3, 32\].*: train those blocks again"):
            formats.read(tmp_path / "earlier")


def test_a_source_that_changed_is_noticed(sources, config, tmp_path):
    """Where the run was killed before it had anything of its own."""
    source = shutil.copytree(sources["hf"], tmp_path / "source")
    with interrupted_at(0):
        train(config(source), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "blt")
    directories.rewrite(source, lambda x: x.update({"lm_head.weight": 2 * x["lm_head.weight"]}))
    with pytest.raises(ValueError, match="put that directory back, or choose a new --workdir"):
        train(config(source), tmp_path / "run")


@pytest.mark.long
def test_killed_after_some_steps_it_ends_as_if_nothing_had_happened(sources, tmp_path):
    """A real process, really killed, and its source deleted."""
    processes.write_corpus(tmp_path / "corpus")
    source = shutil.copytree(sources["hf"], tmp_path / "source")
    settings = [
        f"--config.data.root={tmp_path / 'corpus'}",
        f"--config.start_from={source}",
        "--config.blt.lora.rank=2",
        "--config.blt.lora.dropout=0.1",
        "--config.blt_training.steps=16",
    ]

    def start(name):
        return processes.start(
            "bltjax.train",
            "--config=tests/configs/tiny_start.py",
            f"--workdir={tmp_path / name}",
            *settings,
            env=processes.environment(),
            stderr=subprocess.STDOUT,
        )

    whole = start("whole")
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    killed = start("killed")
    wait_for_step([killed], tmp_path / "killed", "blt", 6)
    killed.kill()
    killed.communicate()
    shutil.rmtree(source)
    again = start("killed")
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert "blt: resumed at step" in output
    assert metrics(tmp_path / "killed", "blt") == metrics(tmp_path / "whole", "blt")
    np.testing.assert_equal(params_of(tmp_path / "killed"), params_of(tmp_path / "whole"))

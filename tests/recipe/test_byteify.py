"""Byte models around the layers of tokenized ones: what is kept, what is new, that they train."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import bltjax
from bltjax import sharding
from bltjax.checkpoints import formats
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch import llama
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.weights import WeightsError, flat
from bltjax.config import PatchingConfig, RunConfig, TransformerConfig, from_config_dict
from bltjax.model import functional
from bltjax.recipe import byteify as byteify_module
from bltjax.recipe.byteify import LocalSizes, byteify, config_around, patch_root_mean_square
from bltjax.recipe.checks import check_run
from bltjax.recipe.stages import run
from tests import directories, llamas, processes
from tests.configs import tiny_start

pytestmark = pytest.mark.long  # one interpreter will do

ROOT = Path(__file__).parents[2]
TEXT = "A patch is short where the next byte is hard to guess: naïve, 日本, x = 1;\n" * 3
SMALL = LocalSizes(dim=16, heads=2, decoder_layers=2, window=16, hash_sizes=(3, 4), hash_vocab=101)


def params_of(directory, name="blt"):
    return {path: read_all(x) for path, x in flat(formats.read(directory).params[name]).items()}


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def made(request, tmp_path_factory):
    """A source, the directory made of it, and the summary."""
    top = tmp_path_factory.mktemp("byteify")
    source = llamas.write(top / "source", request.param)
    (source / "LICENSE").write_text("mine")
    return source, top / "target", byteify(source, top / "target", sizes=SMALL)


def test_layers_are_the_source_s_and_all_else_is_new(made):
    source, target, summary = made
    found, layers = params_of(target), flat(llama.read(source).layers)
    prefix = "global_transformer.layers."
    kept = {n.removeprefix(prefix): x for n, x in found.items() if n.startswith(prefix)}
    assert kept.keys() == layers.keys()
    for name, x in kept.items():
        np.testing.assert_array_equal(x, read_all(layers[name]))
    weights = formats.read(target)
    expected = flat(functional.abstract_params(weights.blt))
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in expected.items()}
    fresh = [n for n in found if not n.startswith(prefix) and "norm" not in n]
    assert all(np.std(found[n]) > 0 for n in fresh)
    assert summary["parameters"] == sum(x.size for x in found.values())
    assert summary["kept_parameters"] == sum(x.size for x in kept.values())


def test_notes_say_what_is_left_out(made):
    _, target, summary = made
    notes = "\n".join(summary["notes"])
    for told in ("last norm", "tokenizer", "under its licence", "neither read nor copied: LICENSE"):
        assert told in notes
    assert (target / "checksums.json").exists()


def test_patches_end_with_words_unless_an_entropy_model_is_given(made, tmp_path):
    source, target, _ = made
    space = PatchingConfig(rule="space", target_patch_bytes=None)
    assert formats.read(target).patching == space
    other = directories.meta_with_entropy_model(tmp_path / "meta")
    byteify(source, tmp_path / "target", sizes=SMALL, entropy_model=other)
    weights = formats.read(tmp_path / "target")
    assert weights.patching.rule == "entropy"
    assert weights.patching.threshold == directories.THRESHOLD
    np.testing.assert_equal(
        params_of(tmp_path / "target", "entropy_model"), params_of(other, "entropy_model")
    )


@pytest.mark.parametrize(
    "sizes, projected",
    [(SMALL, False), (SMALL._replace(k=3), True), (SMALL._replace(dim=24), True)],
)
def test_patches_are_as_large_as_token_embeddings(tmp_path, sizes, projected):
    """Also those of other bytes than it was measured with."""
    source = llamas.write(tmp_path / "source")
    summary = byteify(source, tmp_path / "target", sizes=sizes)
    size = llama.root_mean_square(llama.read(source).embeddings)
    assert summary["embedding_rms"] == size and 0.02 < size < 0.05
    assert summary["patch_rms"] == pytest.approx(size, rel=0.01)
    weights = formats.read(tmp_path / "target")
    assert (
        "token_embedding_projection" in weights.params["blt"]["global_transformer"]
    ) == projected
    params = jax.tree.map(read_all, weights.params["blt"])
    found = patch_root_mean_square(weights.blt, with_tiny_layers(weights.blt, params), seed=5)
    assert found == pytest.approx(size, rel=0.05)


def with_tiny_layers(config, params):
    """Parameters with others in the place of the source's layers, which are not read here."""
    tiny = byteify_module._without_layers(config)
    abstract = functional.abstract_params(tiny)["global_transformer"]["layers"]
    layers = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract)
    return params | dict(global_transformer=params["global_transformer"] | dict(layers=layers))


def test_default_sizes_follow_the_source_s_width():
    sizes = {
        576: (192, 3, 3, 4),
        960: (320, 5, 3, 4),
        2048: (704, 11, 3, 6),
        4096: (1344, 21, 3, 6),
    }
    for dim, expected in sizes.items():
        found = config_around(TransformerConfig(dim=dim, num_heads=1, head_dim=64), LocalSizes())
        local, decoder = found.local_encoder, found.local_decoder
        assert (local.dim, local.num_heads, found.cross_attention.k, decoder.num_layers) == expected
        assert found.problems("blt") == []


def test_the_result_opens_and_trains(made, tmp_path, monkeypatch):
    _, target, _ = made
    model = bltjax.load(target)
    (score,) = model.score([TEXT])
    assert 6 < score.bits_per_byte < 12
    (text,) = model.generate(["ab"], max_new_bytes=8)
    assert isinstance(text, bytes)
    processes.write_corpus(tmp_path / "corpus")
    given = tiny_start.get_config()
    given.start_from, given.stages = str(target), ("entropies", "blt")
    given.data.root = str(tmp_path / "corpus")
    given.blt_training.steps, given.blt_training.optimizer.warmup_steps = 2, 0
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make_mesh(devices=jax.devices()[:1]))
    checked = check_run(from_config_dict(RunConfig, given), tmp_path / "run")
    run(checked)
    directory = checked.directory
    before, after = params_of(target), params_of(directory.path)
    changed = {n for n in after if not np.array_equal(before[n], after[n])}
    options = {n for n in after if n.endswith(".bias") or ".q_norm." in n or ".k_norm." in n}
    assert options and options | {"local_decoder.output.weight"} <= changed
    assert directory.config().blt == formats.read(target).blt


def test_generation_equals_recomputing(made):
    """The caches know biases and norms of heads."""
    _, target, _ = made
    model = bltjax.load(target)
    prompt = TEXT[:40].encode()
    (text,) = model.generate([prompt], max_new_bytes=12)
    tokens = np.asarray([[1, *(b + 4 for b in prompt + text)]], np.int32)
    logits = np.array(model.logits(tokens))[0, len(prompt) : -1]
    logits[:, [0, 1, 3]] = -np.inf
    assert bytes((logits.argmax(-1) - 4).tolist()) == text and len(set(text)) > 1


def test_exports_refuse_what_they_cannot_say(made, tmp_path):
    _, target, _ = made
    for format in ("hf", "meta"):
        with pytest.raises(WeightsError, match=r"global_transformer\.(qkv_bias|qk_norm)=True"):
            convert(target, tmp_path / format, format)


def test_a_plain_llama_goes_out_as_any_other(tmp_path):
    source = llamas.write(tmp_path / "source")
    entropy = directories.meta_with_entropy_model(tmp_path / "meta")
    byteify(source, tmp_path / "target", sizes=SMALL, entropy_model=entropy)
    convert(tmp_path / "target", tmp_path / "hf", "hf")
    (score,) = bltjax.load(tmp_path / "target").score([TEXT])
    (other,) = bltjax.load(tmp_path / "hf").score([TEXT])
    assert other.nats == pytest.approx(score.nats, rel=1e-5)


def test_layers_keep_their_dtype(tmp_path):
    def change(found):
        found.update({name: x.astype("bfloat16") for name, x in found.items()})

    source = llamas.write(tmp_path / "source", change=change)
    summary = byteify(source, tmp_path / "target", sizes=SMALL)
    assert summary["dtypes"] == ["bfloat16", "float32"]
    found, layers = params_of(tmp_path / "target"), flat(llama.read(source).layers)
    for name, x in layers.items():
        kept = found[f"global_transformer.layers.{name}"]
        assert kept.dtype == "bfloat16"
        np.testing.assert_array_equal(kept, read_all(x))
    (score,) = bltjax.load(tmp_path / "target").score([TEXT])
    assert 6 < score.bits_per_byte < 12


def test_the_seed_decides(tmp_path):
    source = llamas.write(tmp_path / "source")
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        byteify(source, tmp_path / name, sizes=SMALL, seed=seed)
    one, two, three = (params_of(tmp_path / name) for name in ("one", "two", "three"))
    np.testing.assert_equal(one, two)
    same = {n for n in one if np.array_equal(one[n], three[n])}
    assert {n for n in one if n.startswith("global_transformer.layers.")} <= same
    assert "local_decoder.output.weight" not in same


def test_all_problems_are_told_and_nothing_is_written(tmp_path):
    source = llamas.write(tmp_path / "source", wrong=dict(mlp_bias=True))
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("work")
    with pytest.raises(WeightsError) as error:
        byteify(source, target, sizes=SMALL, entropy_model=source)
    told = str(error.value)
    assert "exists: choose another" in told and "config.mlp_bias=True" in told
    assert "it is a tokenized model (llama)" in told
    assert directories.contents(target) == {"precious": b"work"}
    good = llamas.write(tmp_path / "good")
    with pytest.raises(FileExistsError):
        byteify(good, target, sizes=SMALL)
    with pytest.raises(WeightsError, match="num_heads=3"):
        byteify(good, tmp_path / "new", sizes=SMALL._replace(heads=3))
    no_model = directories.hub(tmp_path / "blt", "meta_A_1b_like")
    with pytest.raises(WeightsError, match="has no entropy model"):
        byteify(good, tmp_path / "new", sizes=SMALL, entropy_model=no_model)
    with pytest.raises(FileNotFoundError):
        byteify(tmp_path / "nowhere", tmp_path / "new", sizes=SMALL)
    assert not [p for p in tmp_path.iterdir() if "new" in p.name]


def test_embeddings_of_zeros_tell_no_size(tmp_path):
    def change(found):
        found["model.embed_tokens.weight"][:] = 0

    source = llamas.write(tmp_path / "source", change=change)
    with pytest.raises(WeightsError, match="all token embeddings are 0"):
        byteify(source, tmp_path / "target", sizes=SMALL)


def test_load_says_what_to_do_with_a_tokenized_model(tmp_path):
    with pytest.raises(WeightsError, match=r"tokenized model \(llama\).*bltjax byteify"):
        bltjax.load(llamas.write(tmp_path / "source"))


def test_the_command(tmp_path):
    source = llamas.write(tmp_path / "source")
    command = [sys.executable, "-m", "bltjax.byteify", f"--source={source}"]
    small = ["--local_dim=16", "--local_heads=2", "--hash_vocab=101", "--hash_sizes=3,4", "--k=2"]
    options = dict(cwd=ROOT, env=processes.environment(), capture_output=True, text=True)
    done = subprocess.run([*command, f"--target={tmp_path / 'target'}", *small], **options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["models"] == ["blt"] and "note: the source's last norm" in done.stderr
    blt = formats.read(tmp_path / "target").blt
    assert blt.hash.sizes == (3, 4) and blt.local_encoder.num_heads == 2
    again = subprocess.run([*command, f"--target={tmp_path / 'target'}"], **options)
    assert again.returncode == 2 and "exists: choose another" in again.stderr
    wrong = subprocess.run([*command, "--target=x", "--hash_sizes=three"], **options)
    assert wrong.returncode == 2 and "three" in wrong.stderr and "Traceback" not in wrong.stderr

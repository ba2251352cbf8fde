"""`bltjax.load`: every format opens and computes the published numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import bltjax
from bltjax import sharding
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.weights import WeightsError
from bltjax.config import MeshConfig
from bltjax.evaluation.patch_use import DISTURBED
from bltjax.vocabulary import encode
from tests import directories, golden, processes

CLOSE = dict(rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return directories.hub(tmp_path_factory.mktemp("hf") / "hf_A", "hf_A_1b_like")


@pytest.fixture(scope="module")
def model(hf):
    return bltjax.load(hf)


@pytest.mark.parametrize("name", golden.MODELS)
def test_metas_models_give_the_published_logits(tmp_path, name):
    expected = golden.arrays(name)
    ours = bltjax.load(directories.hub(tmp_path / "meta", name))
    assert ours.config == golden.blt_config(name)
    logits = ours.logits(expected["tokens"], expected["patch_lengths"])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected["logits"], **CLOSE)


def test_metas_entropy_model_gives_the_published_entropies(tmp_path):
    expected = golden.arrays("meta_entropy")
    ours = bltjax.load(directories.hub(tmp_path / "meta", "meta_entropy"))
    assert ours.entropy_config == golden.entropy_config()
    np.testing.assert_allclose(ours.logits(expected["tokens"]), expected["logits"], **CLOSE)
    np.testing.assert_allclose(ours.entropies(expected["tokens"]), expected["entropies"], **CLOSE)


def test_hugging_faces_model_finds_patches_and_gives_the_published_logits(model):
    expected = golden.arrays("hf_A_1b_like")
    np.testing.assert_allclose(model.entropies(expected["tokens"]), expected["entropies"], **CLOSE)
    lengths = model.patch_lengths(expected["tokens"])
    np.testing.assert_array_equal(lengths, expected["patch_lengths_meta"])
    np.testing.assert_allclose(model.logits(expected["tokens"]), expected["logits_meta"], **CLOSE)
    np.testing.assert_allclose(model.logits(expected["tokens"]), expected["logits_hf"], **CLOSE)


def test_patch_use(model, tmp_path):
    found = model.patch_use(["some text of a few patches, " * 20], row_bytes=128)
    assert found["bytes"] == 560 and min(abs(found[kind]) for kind in DISTURBED) > 0
    assert model.patch_use(["some text of a few patches, " * 20], 2, 128)["bytes"] < 256
    alone = bltjax.load(directories.hub(tmp_path / "meta", "meta_entropy"))
    with pytest.raises(ValueError, match="no patches to use"):
        alone.patch_use(["a"])


def test_a_model_of_meta_takes_the_entropy_model_beside_it_or_another(tmp_path):
    expected = golden.arrays("hf_A_1b_like")  # the same weights
    inside = directories.meta_with_entropy_model(tmp_path / "inside")
    alone = directories.hub(tmp_path / "alone", "meta_A_1b_like")
    entropy_model = directories.hub(tmp_path / "entropy", "meta_entropy")
    together = bltjax.load(inside)
    np.testing.assert_array_equal(
        together.patch_lengths(expected["tokens"]), expected["patch_lengths_meta"]
    )
    given = bltjax.load(alone, entropy_model=entropy_model)
    np.testing.assert_array_equal(
        given.entropies(expected["tokens"]), together.entropies(expected["tokens"])
    )
    assert given.patching.threshold == 1.335442066192627  # the released one, where none is stored
    lonely = bltjax.load(alone)
    for call in (
        lambda: lonely.entropies(expected["tokens"]),
        lambda: lonely.patch_lengths(expected["tokens"]),
        lambda: lonely.generate(["a"]),
        lambda: lonely.score(["a"]),
    ):
        with pytest.raises(ValueError, match="entropy_model="):
            call()
    with pytest.raises(WeightsError, match="has no entropy model"):
        bltjax.load(alone, entropy_model=alone)


def test_metas_local_directories_open_too(tmp_path):
    expected = golden.arrays("hf_A_1b_like")
    patcher = {"threshold": directories.THRESHOLD, "realtime_patching": False}
    path = directories.local(
        tmp_path / "local", "meta_A_1b_like", prefix="module.", data={"patcher_args": patcher}
    )
    inside = directories.local(path / "entropy_model", "meta_entropy", key="entropy_model")
    tokens = expected["tokens"]
    ours = bltjax.load(path)
    np.testing.assert_array_equal(ours.patch_lengths(tokens), expected["patch_lengths_meta"])
    np.testing.assert_allclose(ours.logits(tokens), expected["logits_meta"], **CLOSE)

    # The released entropy model's settings leave these out; the published loader fills them in.
    params = json.loads((inside / "params.json").read_text())
    for absent in ("sliding_window", "rope_theta", "max_seqlen"):
        del params["entropy_model"][absent]
    (inside / "params.json").write_text(json.dumps(params))
    stack = bltjax.load(inside).entropy_config.transformer
    assert (stack.window, stack.rope_theta) == (512, 10_000.0)


def test_shards_with_an_index_are_one_model(tmp_path, model):
    sharded = directories.hub(tmp_path / "hf", "hf_A_1b_like")
    directories.shard(sharded)
    tokens = golden.arrays("hf_A_1b_like")["tokens"]
    np.testing.assert_array_equal(bltjax.load(sharded).logits(tokens), model.logits(tokens))


@pytest.mark.long
def test_rows_do_not_depend_on_their_batch(model):
    """Meta's patcher lets rows of a batch see each other (differences.md)."""
    tokens = golden.arrays("hf_A_1b_like")["tokens"]
    together, lengths = model.logits(tokens), model.patch_lengths(tokens)
    for i, row in enumerate(tokens):
        alone = model.patch_lengths(row[None])[0]
        np.testing.assert_array_equal(lengths[i][lengths[i] > 0], alone)
        np.testing.assert_allclose(model.logits(row[None])[0], together[i], **CLOSE)


@pytest.mark.long
def test_the_same_on_a_mesh(hf, model):
    tokens = golden.arrays("hf_A_1b_like")["tokens"]  # three rows on four row shards
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    sharded = bltjax.load(hf, mesh=mesh)
    tables = sharded.params["blt"]["encoder_hash_tok_embedding"]["weight"]
    assert tables.addressable_shards[0].data.shape[-1] * 2 == tables.shape[-1]
    np.testing.assert_array_equal(sharded.patch_lengths(tokens), model.patch_lengths(tokens))
    np.testing.assert_allclose(sharded.logits(tokens), model.logits(tokens), **CLOSE)
    assert [round(s.nats, 3) for s in sharded.score(["some text", b""])] == [
        round(s.nats, 3) for s in model.score(["some text", b""])
    ]


def test_meshes_that_do_not_fit_are_told(hf):
    devices = np.array(jax.devices()[:8])
    foreign = jax.sharding.Mesh(devices, ("x",))
    with pytest.raises(ValueError, match=r"axes \('x',\), must have \('data', 'fsdp', 'tensor'\)"):
        bltjax.load(hf, mesh=foreign)
    with pytest.raises(ValueError, match=r"num_heads=2 is not divisible by mesh\.tensor=8"):
        bltjax.load(hf, mesh=sharding.make_mesh(MeshConfig(1, 1, 8), devices))


def test_dtypes_are_kept_or_cast(tmp_path, hf, model):
    tokens = golden.arrays("hf_A_1b_like")["tokens"]
    half = bltjax.load(hf, dtype="bfloat16")
    leaves = jax.tree.leaves(half.params)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(ml_dtypes.bfloat16)}
    # Parameters in bfloat16, computed in float32: as if they had been cast back.
    convert(hf, tmp_path / "half", "bltjax", dtype="bfloat16")
    kept = bltjax.load(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(kept.params)} == {np.dtype(ml_dtypes.bfloat16)}
    back = bltjax.load(tmp_path / "half", dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(back.params)} == {np.dtype(np.float32)}
    lengths = model.patch_lengths(tokens)
    np.testing.assert_array_equal(half.logits(tokens, lengths), back.logits(tokens, lengths))
    np.testing.assert_array_equal(half.logits(tokens, lengths), kept.logits(tokens, lengths))
    assert np.abs(half.logits(tokens, lengths) - model.logits(tokens, lengths)).max() > 1e-4
    computed = bltjax.load(hf, compute_dtype="bfloat16")
    assert np.abs(computed.logits(tokens, lengths) - model.logits(tokens, lengths)).max() > 1e-3
    for wrong in (dict(dtype="float16"), dict(compute_dtype="int8")):
        with pytest.raises(ValueError, match=r"float16|int8"):
            bltjax.load(hf, **wrong)


def test_bf16_compat_is_near_the_published_rounding(tmp_path):
    expected = golden.arrays("meta_entropy")
    path = directories.hub(tmp_path / "meta", "meta_entropy")
    ours = bltjax.load(path, bf16_compat=True)
    assert ours.patching.bf16_compat
    found = ours.entropies(expected["tokens"]).astype(ml_dtypes.bfloat16).astype(np.float32)
    difference = np.abs(found - expected["entropies_bf16_as_f32"])
    # Two or three bf16 steps where they are widest; sums are in another order.
    assert difference.max() <= 0.0625
    assert difference.mean() < 0.02
    assert np.abs(found - bltjax.load(path).entropies(expected["tokens"])).mean() > 0.005


@pytest.mark.long
def test_generation_goes_on_as_logits_say(model):
    prompts = ["hello", b"\xff\x00 any bytes", ""]
    found = model.generate(prompts, max_new_bytes=5)
    assert [type(f) for f in found] == [bytes] * 3
    for prompt, continuation in zip(prompts, found, strict=True):
        # One pass over the result, padded to one length: what follows a byte changes nothing.
        ids = encode(prompt, add_eos=False)
        text = np.zeros((1, 24), np.int32)
        text[0, : len(ids) + len(continuation)] = [*ids, *(byte + 4 for byte in continuation)]
        lengths = np.zeros((1, 25), np.int32)
        found_lengths = model.patch_lengths(text)
        lengths[:, : found_lengths.shape[1]] = found_lengths
        logits = model.logits(text, lengths)[0]
        logits[:, [0, 1, 3]] = -np.inf  # ids that stand for no text
        expected = logits.argmax(-1)[len(ids) - 1 :][: len(continuation)]
        np.testing.assert_array_equal(expected - 4, list(continuation))
    assert model.generate(prompts[:1], max_new_bytes=5) == found[:1]
    drawn = model.generate(["hello"], max_new_bytes=8, temperature=1.0, seed=3)
    assert drawn == model.generate(["hello"], max_new_bytes=8, temperature=1.0, seed=3)
    assert drawn != model.generate(["hello"], max_new_bytes=8, temperature=1.0, seed=4)


def test_scores_are_the_nats_of_the_bytes(model):
    text = "Any bytes are text."
    ids = encode(text)[None]
    logits = model.logits(ids[:, :-1]).astype(np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -log_p[np.arange(len(text)), ids[0, 1:-1]].sum()
    (score,) = model.score([text])
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / np.log(2) / len(text), rel=1e-5)
    assert (score.num_bytes, score.num_patches > 2) == (len(text), True)


@pytest.mark.parametrize(
    "wrong", [dict(temperature=-1.0), dict(temperature=float("nan")), dict(max_new_bytes=-1)]
)
def test_wrong_generation_settings_are_told(model, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        model.generate(["a"], **wrong)


def test_an_entropy_model_alone_scores_too(tmp_path):
    path = directories.hub(tmp_path / "meta", "meta_entropy")
    ours = bltjax.load(path)
    assert bltjax.load(path, compute_dtype="bfloat16").entropy_config.compute_dtype == "bfloat16"
    (score,) = ours.score([b"abc"])
    assert score.num_bytes == 3 and score.num_patches == 0 and score.nats > 0
    for call in (
        lambda: ours.generate(["a"]),
        lambda: ours.patch_lengths([[1, 5]]),
        lambda: ours.logits([[1, 5]], [[1, 2]]),
    ):
        with pytest.raises(ValueError, match="entropy model"):
            call()


@pytest.mark.parametrize(
    "tokens, lengths, says",
    [
        ([1, 5, 6], [[1, 3]], r"tokens are int64 \(3,\)"),
        ([[1.0, 5.0]], [[1, 2]], "tokens are float64"),
        (np.zeros((1, 0), int), [[1]], r"\(1, 0\)"),
        ([[1, 300]], [[1, 2]], r"1\.\.300: ids are 0\.\.259"),
        ([[1, -1]], [[1, 2]], r"-1\.\.1"),
        ([[1, 5]], [[1, 1]], "row 0 sum to 2: rows of 2 ids sum to 3"),
        ([[1, 5], [1, 6]], [[1, 2], [1, 3]], "row 1 sum to 4"),
        ([[1, 5]], [[1, 0, 2]], "zeros only on the right"),
        ([[1, 5]], [[4, -1]], "positive"),
        ([[1, 5]], [[2**62, 2**62, 2**62, 2**62 + 3]], "sum to 18446744073709551619"),
        ([[1, 5]], np.uint64([[2**64 - 1, 4]]), "sum to 18446744073709551619"),
        ([[1, 5], [1]], [[3]], "tokens have rows of different lengths"),
        ([[1, 5], [1, 6]], [[1, 2], [3]], "patch_lengths have rows of different lengths"),
        ([[1, 5]], [1, 2], r"patch_lengths are int64 \(2,\)"),
        ([[1, 5]], [[1, 2], [1, 2]], r"\[1, patches\]"),
    ],
)
def test_wrong_inputs_are_told(model, tokens, lengths, says):
    with pytest.raises(ValueError, match=says):
        model.logits(tokens, lengths)


@pytest.mark.parametrize("call", ["generate", "score", "score_continuations"])
@pytest.mark.parametrize(
    "texts",
    [
        "text",
        b"text",
        bytearray(b"ab"),
        memoryview(b"ab"),
        None,
        5,
        {"ab"},
        {"a": "b"},
        np.str_("a"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(model, call, texts):
    with pytest.raises(ValueError, match=rf"is one {type(texts).__name__}: give a list of"):
        getattr(model, call)(texts)


def test_texts_may_come_from_an_iterator(model):
    assert model.generate(iter(["a", b"b"]), 2) == model.generate(["a", b"b"], 2)
    assert model.generate(["a"], 2, min_patch_bytes=10**400) == model.generate(["a"], 2)


@pytest.mark.parametrize("path", [None, 5, "", b"run", ["run"]])
def test_a_path_is_the_name_of_a_directory(path):
    with pytest.raises(ValueError, match=r"path=.* must be the directory of a model"):
        bltjax.load(path)


def test_the_package_has_what_its_page_says():
    code = "import bltjax; print(bltjax.convert.convert, bltjax.load, bltjax.Score)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("bltjax") == 3 or "function" in done.stdout


def test_directories_that_hold_nothing_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        bltjax.load(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"none of config\.json"):
        bltjax.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WeightsError, match="neither Hugging Face's"):
        bltjax.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json cannot be read as JSON"):
        bltjax.load(tmp_path)


def test_the_working_directory_of_a_run_opens(tmp_path):
    """Both models of a run in progress, with its threshold, and what it wrote stays as it is."""
    root = tmp_path / "text"
    root.mkdir()
    for i in range(12):
        (root / f"{i}.txt").write_text("all sorts of text, again and again. " * 40)
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "bltjax.train", f"--workdir={workdir}"]
    command += [f"--config={Path(__file__).parent}/configs/tiny.py", f"--config.data.root={root}"]
    command += ["--config.stages=('entropy_model','entropies','blt')"]
    command += ["--config.entropy_training.steps=4", "--config.blt_training.steps=4"]
    subprocess.run(command, check=True, capture_output=True, env=processes.environment())
    before = directories.contents(workdir)
    ours = bltjax.load(workdir)
    assert directories.contents(workdir) == before
    result = json.loads((workdir / "result.json").read_text())
    assert ours.patching.threshold == result["threshold"]
    again = convert(workdir, tmp_path / "model", "bltjax")
    assert again["models"] == ["blt", "entropy_model"]
    moved = bltjax.load(tmp_path / "model")
    assert moved.config == ours.config and moved.patching == ours.patching
    tokens = encode("some text", add_eos=False)[None]
    np.testing.assert_array_equal(moved.logits(tokens), ours.logits(tokens))
    shutil.rmtree(workdir / "blt" / "checkpoints")
    assert bltjax.load(workdir).config is None  # the entropy model is left

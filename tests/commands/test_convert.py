"""Conversion: round trips to the bit, every problem told at once, nothing half-written."""

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import bltjax
from benchmarks import convert_memory
from bltjax.checkpoints import formats
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.pytorch.fields import merged
from bltjax.checkpoints.pytorch.safetensors_files import write_sharded
from bltjax.checkpoints.pytorch.writing import plan_hf
from bltjax.checkpoints.weights import WeightsError, flat
from bltjax.config import TransformerConfig
from bltjax.runtime.files import UNFINISHED, new_directory
from tests import directories, golden

ROOT = Path(__file__).parents[2]
# About files and processes, so one interpreter will do.
pytestmark = pytest.mark.long


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bltjax.convert", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env=dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu"),
    )


def tensors_of(directory):
    """All tensors of the safetensors files below a directory, with the file's directory."""
    return {
        (path.parent.relative_to(directory), name): tensor
        for path in directory.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.tobytes() == other[name].tobytes(), name


def meaning(directory):
    """Everything that a directory's settings say to us, feed-forward widths as numbers."""

    def plain(config):
        if config is None or isinstance(config, TransformerConfig):
            return config and dataclasses.replace(
                config, ffn_width=config.ffn_dim, ffn_dim_multiplier=1.0, ffn_multiple_of=1
            )
        stacks = {
            field.name: plain(getattr(config, field.name))
            for field in dataclasses.fields(config)
            if isinstance(getattr(config, field.name), TransformerConfig)
        }
        return dataclasses.replace(config, **stacks)

    weights = formats.read(directory)
    return weights._replace(
        blt=plain(weights.blt), entropy_model=plain(weights.entropy_model), params={}, notes=()
    )


def round_trip(source, *targets, **options):
    for i, target in enumerate(targets):
        convert(source, source.with_name(f"{source.name}-{i}"), target, **options)
        source = source.with_name(f"{source.name}-{i}")
    return source


def half(directory):
    """The same tensors in bfloat16."""
    directories.rewrite(
        directory,
        lambda found: found.update({k: v.astype(ml_dtypes.bfloat16) for k, v in found.items()}),
    )
    return directory


@pytest.mark.parametrize("through", [("bltjax", "hf"), ("meta", "hf")], ids="-".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hugging_face_and_back(tmp_path, through, dtype):
    source = directories.hub(tmp_path / "source", "hf_A_1b_like")
    if dtype == "bfloat16":
        half(source)
    back = round_trip(source, *through)
    assert_same_bits(tensors_of(source), tensors_of(back))
    assert meaning(source) == meaning(back)
    theirs, ours = (json.loads((d / "config.json").read_text()) for d in (source, back))
    assert not differing(theirs, ours)
    assert ours["dtype"] == dtype


def differing(theirs, ours, name=""):
    """Fields with a value in both that differ; transformers derives what is left out."""
    found = []
    for key in theirs.keys() & ours.keys():
        if isinstance(theirs[key], dict) and isinstance(ours[key], dict):
            found += differing(theirs[key], ours[key], f"{name}{key}.")
        elif theirs[key] != ours[key] and theirs[key] is not None and key != "transformers_version":
            found.append(f"{name}{key}: {theirs[key]!r} became {ours[key]!r}")
    return found


@pytest.mark.parametrize("name", [*golden.MODELS, "meta_entropy"])
def test_meta_and_back(tmp_path, name):
    source = directories.hub(tmp_path / "source", name)
    back = round_trip(source, "bltjax", "meta")
    assert_same_bits(tensors_of(source), tensors_of(back))
    assert meaning(source) == meaning(back)
    theirs, ours = (json.loads((d / "config.json").read_text())["args"] for d in (source, back))
    assert theirs.keys() == ours.keys()
    without_effect = {"dim", "n_heads", "pad_to_max_length", "rope_use_fp32_in_outer_product"}
    changed = {key for key in theirs if theirs[key] != ours[key]}
    assert changed <= without_effect - ({"dim", "n_heads"} if name == "meta_entropy" else set())


def test_meta_with_its_entropy_model_and_back(tmp_path):
    source = directories.meta_with_entropy_model(tmp_path / "source")
    for through in (("bltjax", "meta"), ("hf", "meta"), ("meta",)):
        back = round_trip(source, *through)
        assert_same_bits(tensors_of(source), tensors_of(back))
        assert meaning(source) == meaning(back)
        for path in sorted(tmp_path.glob("source-*")):
            shutil.rmtree(path)


def test_trained_settings_survive(tmp_path):
    """Rules and shapes that only bltjax and Meta's format know."""
    source = directories.hub(
        tmp_path / "source",
        "meta_C_windows_alllayers",
        monotonicity=True,
        patching_threshold=0.25,
        max_patch_length=7,
    )
    back = round_trip(source, "bltjax", "meta", "bltjax")
    assert meaning(back) == meaning(source)
    assert meaning(back).patching.rule == "monotonic"
    assert meaning(back).patching.threshold == 0.25
    assert meaning(back).patching.max_patch_length == 7


@pytest.mark.parametrize("format", ["bltjax", "hf", "meta"])
def test_casting_rounds_once(tmp_path, format):
    source = directories.hub(tmp_path / "source", "hf_A_1b_like")
    small = round_trip(source, format, dtype="bfloat16")
    leaves, rounded = (flat(formats.read(d).params) for d in (source, small))
    for path, leaf in leaves.items():
        expected = read_all(leaf).astype(ml_dtypes.bfloat16)
        assert read_all(rounded[path]).tobytes() == expected.tobytes()
    large = round_trip(small, "hf", dtype="float32")
    for name, tensor in tensors_of(large).items():
        assert tensor.dtype == np.float32, name


def test_large_files_are_sharded_as_transformers_does(tmp_path):
    source = directories.hub(tmp_path / "source", "hf_A_1b_like")
    in_shards = functools.partial(write_sharded, max_shard_bytes=200_000)
    plan_hf(formats.read(source))._replace(save=in_shards).write(tmp_path / "target")
    files = sorted(p.name for p in (tmp_path / "target").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_bits(tensors_of(source), tensors_of(tmp_path / "target"))
    assert meaning(tmp_path / "target") == meaning(source)


def break_tensors(directory):
    def change(found):
        names = sorted(found)
        del found[names[0]]
        found["stray.weight"] = np.zeros(2, np.float32)
        found[names[2]] = np.zeros((3, 5), np.float32)
        found[names[3]] = found[names[3]].copy()
        found[names[3]].flat[5] = np.nan
        found[names[4]] = found[names[4]].copy()
        found[names[4]].flat[:2] = np.inf
        found[names[5]] = found[names[5]].astype(np.int32)

    directories.rewrite(directory, change)


@pytest.mark.parametrize("name", ["hf_A_1b_like", "meta_B_7b_like", "meta_entropy"])
def test_all_problems_are_told_at_once(tmp_path, name):
    source = directories.hub(tmp_path / "source", name)
    names = sorted(load_file(source / "model.safetensors"))
    (tmp_path / "target").mkdir()
    break_tensors(source)
    with pytest.raises(WeightsError) as error:
        convert(source, tmp_path / "target", "bltjax")
    for wanted in (
        "target",
        f"{names[0]} is missing",
        "stray.weight is unexpected",
        f"{names[2]} has shape [3, 5], the config says",
        f"{names[3]} has 1 values that are NaN or infinite",
        f"{names[4]} has 2 values that are NaN or infinite",
        f"{names[5]} is int32",
    ):
        assert sum(wanted in problem for problem in error.value.problems) == 1, wanted
    assert str(error.value).startswith(f"{source}: {len(error.value.problems)} problems")
    assert not list((tmp_path / "target").iterdir())
    source = directories.hub(tmp_path / "another", name, treshold=3)
    break_tensors(source)
    with pytest.raises(WeightsError, match="treshold=3 is a field that nobody knows") as error:
        bltjax.load(source)
    assert any("NaN" in problem for problem in error.value.problems)


HF_SETTINGS = {
    "tie_word_embeddings": (True, "tie_word_embeddings=True is not supported"),
    "patching_mode": ("space", "patching_mode='space' is not supported"),
    "cross_attn_k": (3, "encoder_config.cross_attn_k=2 is not supported: cross_attn_k is 3"),
    "encoder_hash_byte_group_vocab": (0, "config.encoder_hash_byte_group_vocab=0 must be positive"),
    "vocab_size": ("many", "vocab_size='many' is str, must be int"),
    "local_attention_window_len": (None, "local_attention_window_len=null"),
    "encoder_hash_byte_group_size": ([3, "4"], "must be a list of whole numbers"),
    "decoder_config": (3, "decoder_config=3"),
    "wiring": ({"a": 1}, "wiring.a=1 is a field that nobody knows"),
}
META_SETTINGS = {
    "dim_global": (None, "dim_global is missing"),
    "downsampling_by_pooling": ("topk", "downsampling_by_pooling='topk' is not supported"),
    "encoder_enable_byte_ngrams": (True, "tables of frequent n-grams"),
    "n_layers_global": (2.5, "n_layers_global=2.5 is float, must be int"),
    "cross_attn_nheads": (None, "cross_attn_nheads is missing"),
    "eos_id": (7, "eos_id=7 is not supported"),
    "patching_mode": ("bpe_patcher", "patching_mode='bpe_patcher' is not supported"),
    "n_heads_global": (7, "args.dim_global=96 is not divisible by args.n_heads_global=7"),
    "n_kv_heads": (-1, "args.n_kv_heads=-1 must be positive"),
    "cross_attn_windw_encoder": (2, "did you mean cross_attn_window_encoder"),
}
CASES = [("hf_A_1b_like", *case) for case in HF_SETTINGS.items()]
CASES += [("meta_B_7b_like", *case) for case in META_SETTINGS.items()]


@pytest.mark.parametrize("name, key, case", CASES, ids=[f"{c[0][:4]}-{c[1]}" for c in CASES])
def test_settings_that_are_wrong_are_named(tmp_path, name, key, case):
    value, says = case
    source = directories.hub(tmp_path / "source", name, **{key: value})
    with pytest.raises(WeightsError) as error:
        bltjax.load(source)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_config": {"rope_parameters": None, "rope_theta": 500000.0}},
        {"encoder_config": {"rope_parameters": {}}},
        {"encoder_config": {"rope_scaling": {"rope_type": "default"}}},
        {"encoder_config": {"partial_rotary_factor": 0.5}},
        {"encoder_config": {"sliding_window": 99}, "decoder_config": {"sliding_window": 99}},
        {"patcher_config": {"norm_eps": 1e-5, "rms_norm_eps": None}},
        {"patcher_config": {"head_dim": None}},
        {"global_config": {"encoder_cross_output_size": 7, "torch_dtype": "bfloat16"}},
        {"rope_scaling": None, "return_dict": True, "pruned_heads": {}, "torch_dtype": "float32"},
    ],
    ids=str,
)
def test_older_names_and_settings_without_effect_are_read(tmp_path, changes):
    """What transformers takes and computes the same with."""
    config = merged(directories.settings("hf_A_1b_like"), changes)
    source = directories.hub(tmp_path / "source", "hf_A_1b_like", **config)
    expected = directories.hub(tmp_path / "expected", "hf_A_1b_like")
    assert meaning(source) == meaning(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
        {"encoder_config": {"rope_parameters": {"rope_type": "yarn"}}},
        {"global_config": {"hidden_act": "gelu"}},
        {"global_config": {"head_dim": 8}},
        {"decoder_config": {"hidden_size_global": 48}},
        {"patching_threshold": float("nan")},
        {"patching_threshold": 10**400},
        {"encoder_config": {"rms_norm_eps": float("inf")}},
        {"encoder_config": None},  # transformers would build its default of 1024
    ],
    ids=str,
)
def test_settings_under_which_transformers_computes_something_else_are_refused(tmp_path, changes):
    config = merged(directories.settings("hf_A_1b_like"), changes)
    source = directories.hub(tmp_path / "source", "hf_A_1b_like", **config)
    with pytest.raises(WeightsError):
        bltjax.load(source)


def test_both_directories_problems_are_told(tmp_path):
    one = directories.hub(tmp_path / "one", "meta_A_1b_like", treshold=1)
    other = directories.hub(tmp_path / "other", "meta_entropy", widow=2)
    with pytest.raises(WeightsError, match="treshold") as error:
        bltjax.load(one, entropy_model=other)
    assert "widow" in str(error.value)


def test_an_entropy_model_directory_must_hold_one(tmp_path):
    source = directories.hub(tmp_path / "source", "meta_A_1b_like")
    directories.hub(source / "entropy_model", "meta_B_7b_like")
    with pytest.raises(WeightsError, match="entropy_model/ holds a BLT"):
        bltjax.load(source)
    shutil.rmtree(source / "entropy_model")
    (source / "entropy_model").symlink_to(".")
    assert bltjax.load(source).entropy_config is None


@pytest.mark.parametrize(
    "training, says",
    [
        ({"data": [1]}, "data='[1]' must be an object"),
        ({"data": {"patcher_args": "x"}}, "patcher_args='x' must be an object"),
        ({"data": {"patcher_args": {"treshold": 2.0}}}, "did you mean threshold"),
        ({"data": {"patcher_args": {"threshold": "2"}}}, "threshold='2' is str"),
        ({"data": {"patcher_args": {"patch_size": float("inf")}}}, "patch_size=inf"),
    ],
)
def test_a_threshold_is_never_lost_in_silence(tmp_path, training, says):
    source = directories.meta_with_entropy_model(tmp_path / "source")
    (source / "train_args.json").write_text(json.dumps(training))
    with pytest.raises(WeightsError) as error:
        bltjax.load(source)
    assert says in str(error.value)


def test_values_that_the_dtype_cannot_hold_are_told(tmp_path):
    source = directories.hub(tmp_path / "source", "meta_entropy")
    large = np.finfo(np.float32).max
    directories.rewrite(source, lambda found: found["norm.weight"].fill(large))
    with pytest.raises(ValueError, match="beyond bfloat16"):
        convert(source, tmp_path / "target", "meta", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("key, value", [("n_layers_global", 3), ("dim_local_decoder", 48)])
def test_settings_that_contradict_the_tensors_are_named(tmp_path, key, value):
    changes = {key: value}
    if key == "dim_local_decoder":
        changes["dim_local_encoder"] = value
    source = directories.hub(tmp_path / "source", "meta_A_1b_like", **changes)
    with pytest.raises(WeightsError, match=r"is missing|the config says"):
        bltjax.load(source)


CANNOT_SAY = {
    "meta_C_windows_alllayers": ["window_encoder=2", "window_decoder=3"],
    "meta_D_no_cross_attn_maxpool": ["encoder=False", "decoder=False"],
    "meta_entropy": ["there is only an entropy model"],
}


@pytest.mark.parametrize("name", CANNOT_SAY)
def test_what_transformers_cannot_say_is_refused(tmp_path, name):
    source = directories.hub(tmp_path / "source", name)
    with pytest.raises(WeightsError) as error:
        convert(source, tmp_path / "target", "hf")
    for wanted in CANNOT_SAY[name]:
        assert wanted in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_what_meta_cannot_say_is_refused(tmp_path):
    config = directories.settings("hf_A_1b_like")
    config["decoder_config"]["rms_norm_eps"] = 1e-3
    config["global_config"]["rope_parameters"]["rope_theta"] = 10.0
    source = directories.hub(tmp_path / "source", "hf_A_1b_like", **config)
    with pytest.raises(WeightsError, match="rope_theta") as error:
        convert(source, tmp_path / "target", "meta")
    assert "norm_eps" in str(error.value)
    assert not (tmp_path / "target").exists()


def test_damaged_files_are_told(tmp_path):
    source = directories.hub(tmp_path / "source", "hf_A_1b_like")
    directories.shard(source)
    index = source / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    names = sorted(named["weight_map"])
    files = sorted({*named["weight_map"].values()})
    named["weight_map"][names[0]] = files[-1]  # a tensor in another shard
    named["weight_map"][names[1]] = "model-00009-of-00003.safetensors"  # pointing nowhere
    index.write_text(json.dumps(named))
    middle = source / files[1]
    middle.write_bytes(middle.read_bytes()[:-100])  # a download that broke off
    with pytest.raises(WeightsError) as error:
        bltjax.load(source)
    for wanted in (names[0], "model-00009-of-00003.safetensors", files[1]):
        assert wanted in str(error.value)


def test_a_broken_file_does_not_hide_what_settings_lack(tmp_path):
    source = directories.hub(tmp_path / "source", "meta_A_1b_like", dim_global=None)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="dim_global is missing") as error:
        bltjax.load(source)
    assert "download it again" in str(error.value)
    assert not any(p.endswith("weight is missing") for p in error.value.problems)


def test_a_target_that_exists_stays_as_it_is(tmp_path):
    source = directories.hub(tmp_path / "source", "meta_entropy")
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("work")
    with pytest.raises(FileExistsError, match="choose another"):
        convert(source, target, "meta")
    assert directories.contents(target) == {"precious": b"work"}
    shutil.rmtree(target)
    target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="choose another"):
        convert(source, target, "meta")


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), new_directory(tmp_path / "target") as partial:
        (partial / "some").write_text("bytes")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


def test_what_others_left_beside_the_target_stays(tmp_path):
    """A directory under the hidden name that is not of ours, and what a link leads to."""
    partial = tmp_path / ".target.partial"
    partial.mkdir()
    (partial / "precious").write_text("work")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / UNFINISHED).write_text("work")
    (tmp_path / ".linked.partial").symlink_to(victim)
    for name in ("target", "linked"):
        with pytest.raises(FileExistsError, match="in the way"):
            new_directory(tmp_path / name).__enter__()
        assert not (tmp_path / name).exists()
    assert (partial / "precious").exists() and (victim / UNFINISHED).exists()


def test_what_a_killed_process_left_is_cleared(tmp_path):
    partial = tmp_path / ".target.partial"
    (partial / "weights").mkdir(parents=True)
    (partial / "weights" / "half").write_text("of a tensor")
    (partial / UNFINISHED).touch()
    with new_directory(tmp_path / "target") as again:
        (again / "whole").write_text("bytes")
    assert directories.contents(tmp_path) == {"target/whole": b"bytes"}


def test_directories_made_for_a_target_go_with_it(tmp_path):
    with pytest.raises(OSError, match="full"), new_directory(tmp_path / "a" / "b" / "target"):
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())
    source = directories.hub(tmp_path / "source", "meta_D_no_cross_attn_maxpool")
    for dry_run in (True, False):
        with pytest.raises(WeightsError, match="Hugging Face's format: "):
            convert(source, tmp_path / "a" / "target", "hf", dry_run=dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "a" / "odd.partial", "meta")  # any name will do
    assert formats.read(tmp_path / "a" / "odd.partial").blt is not None


def test_one_target_has_one_writer(tmp_path):
    with new_directory(tmp_path / "target") as partial:
        (partial / "some").write_text("bytes")
        with pytest.raises(BlockingIOError, match="another process"):
            new_directory(tmp_path / "target").__enter__()
        assert (partial / "some").exists()
    assert (tmp_path / "target" / "some").exists()


def converting(arguments) -> subprocess.Popen:
    """The command, as a silent process."""
    return subprocess.Popen(
        [sys.executable, "-m", "bltjax.convert", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu"),
    )


@pytest.mark.parametrize("format", ["bltjax", "hf", "meta"])
def test_killed_conversions_leave_no_target_that_loads(tmp_path, format):
    """kill -9 at random moments of a conversion of 70 MB; the next attempt succeeds."""
    source = tmp_path / "source"
    large_model(source)
    target = tmp_path / "target"
    arguments = [f"--source={source}", f"--target={target}", f"--format={format}"]
    rng, killed_writing = random.Random(format), 0
    partial = tmp_path / ".target.partial"
    for _ in range(20):
        if killed_writing == 3:
            break
        process = converting(arguments)
        while process.poll() is None and not partial.exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():  # it was quicker
            shutil.rmtree(target)
            continue
        killed_writing += (partial / UNFINISHED).exists()
        with pytest.raises(FileNotFoundError):
            bltjax.load(target)
        if (partial / UNFINISHED).exists():
            with pytest.raises(WeightsError, match="interrupted"):
                bltjax.load(partial)
    assert killed_writing
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert not partial.exists()
    assert formats.read(target).params.keys() == {"blt", "entropy_model"}


def large_model(directory):
    """The quickstart's shapes in Meta's format, with synthetic values."""
    weights = formats.cast(convert_memory.synthetic("quickstart"), "float32")
    formats.plan(weights, "meta").write(directory)


def test_command_prints_a_line_of_json(tmp_path):
    source = directories.hub(tmp_path / "source", "hf_A_1b_like")
    (source / "LICENSE\x1b[31m").touch()
    done = run(f"--source={source}", f"--target={tmp_path / 'target'}", "--format=meta")
    assert done.returncode == 0, done.stderr
    assert "note: config.json does not say dtype: the tensors keep theirs" in done.stderr
    assert "neither read nor copied: LICENSE\\x1b[31m" in done.stderr and "\x1b" not in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["parameters"] == 292_688 and result["models"] == ["blt", "entropy_model"]
    listed = run(f"--source={source}", f"--target={tmp_path / 'other'}", "--format=hf", "--dry_run")
    assert listed.returncode == 0 and not (tmp_path / "other").exists()
    shown = [line.split()[0] for line in listed.stdout.splitlines()[:-2]]
    assert sorted(shown) == sorted(load_file(source / "model.safetensors"))


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "give --source=DIR, --target=DIR and --format"),
        (["--source=/no/where", "--target=T", "--format=hf"], "no directory /no/where"),
        (["--source=S", "--target=T", "--format=gguf"], "gguf"),
        (["--sauce=S"], "sauce"),
        (["stray"], "'stray'"),
    ],
)
def test_command_tells_wrong_arguments(tmp_path, arguments, says):
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_command_lists_problems_a_line_each(tmp_path):
    source = directories.hub(tmp_path / "source", "meta_entropy", dim="wide", nlayers=2)
    done = run(f"--source={source}", f"--target={tmp_path / 'target'}", "--format=hf")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == f"error: {source}: 2 problems"
    assert [line[:4] for line in lines[1:]] == ["  - ", "  - "]
    assert not (tmp_path / "target").exists()

"""Tensors under other names, in other places and of other dtypes: read, or told with the remedy."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

import bltjax
from bltjax.checkpoints import formats
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch import tensor_names
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.weights import WeightsError, flat
from tests import directories


def content(directory):
    """All that is read but the notes, values included."""
    weights = formats.read(directory)
    values = {path: read_all(leaf).tobytes() for path, leaf in flat(weights.params).items()}
    return weights._replace(params={}, notes=()), values


WRAPPERS = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."]
WRAPPERS += ["module.model.", "model._orig_mod.", "module.module.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("name", ["hf_A_1b_like", "meta_A_1b_like", "meta_entropy"])
@pytest.mark.parametrize("in_shards", [False, True], ids=["whole", "shards"])
def test_prefixes_of_wrappers_are_dropped(tmp_path, prefix, name, in_shards):
    expected = content(directories.hub(tmp_path / "plain", name))
    source = directories.hub(tmp_path / "source", name)

    def change(found):
        for key in list(found):
            found[prefix + key] = found.pop(key)

    directories.rewrite(source, change)
    if in_shards:
        directories.shard(source)
    assert content(source) == expected


def test_wrappers_inside_of_a_name_are_dropped():
    for inside in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"):
        name = f"model.local_encoder.layers.0.{inside}.mlp.up_proj.weight"
        plain = "model.local_encoder.layers.0.mlp.up_proj.weight"
        assert tensor_names.without_wrappers(name, tensor_names.HF) == plain
        name = f"{inside}.global_transformer.layers.1.{inside}.attention.wq.weight"
        plain = "global_transformer.layers.1.attention.wq.weight"
        assert tensor_names.without_wrappers(name, tensor_names.META) == plain


@pytest.mark.parametrize("name", ["hf_A_1b_like", "meta_A_1b_like"])
def test_a_tensor_with_and_without_its_prefix_is_a_problem(tmp_path, name):
    source = directories.hub(tmp_path / "source", name)
    first = sorted(directories.tensors(name))[0]
    directories.rewrite(source, lambda found: found.update({f"module.{first}": found[first]}))
    with pytest.raises(WeightsError, match="is there twice"):
        formats.read(source)


def test_files_of_an_index_may_begin_with_a_dot_and_a_slash(tmp_path):
    source = directories.shard_with_dots(directories.hub(tmp_path / "source", "hf_A_1b_like"))
    assert formats.read(source).blt is not None
    index = source / "model.safetensors.index.json"
    for outside in ("./../x", "../x", "././/../x", "./sub/x", "//x", "./"):
        named = json.loads(index.read_text())
        named["weight_map"][next(iter(named["weight_map"]))] = outside
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copytree(source, tmp_path / "copy", dirs_exist_ok=True)
        (tmp_path / "copy" / index.name).write_text(json.dumps(named))
        with pytest.raises(WeightsError, match="refused, shards are files beside it"):
            formats.read(tmp_path / "copy")


@pytest.mark.parametrize(
    "dtype, remedy",
    [
        ("float64", r"are float64, .*\.float\(\) in PyTorch"),
        ("int8", "are int8, .*dequantize them to bfloat16"),
        ("uint8", "are uint8, .*dequantize them to bfloat16"),
        ("float8_e4m3fn", "are float8_e4m3fn, .*dequantize them to bfloat16"),
    ],
)
@pytest.mark.parametrize("name", ["hf_A_1b_like", "meta_entropy"])
def test_other_dtypes_come_with_a_remedy_in_one_line(tmp_path, name, dtype, remedy):
    source = directories.hub(tmp_path / "source", name)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    directories.rewrite(
        source, lambda found: found.update({k: v.astype(kind) for k, v in found.items()})
    )
    with pytest.raises(WeightsError, match=remedy) as raised:
        formats.read(source)
    assert len(raised.value.problems) == 1


def test_float16_is_read_and_kept(tmp_path):
    source = directories.hub(tmp_path / "source", "meta_entropy")
    directories.rewrite(
        source, lambda found: found.update({k: v.astype("float16") for k, v in found.items()})
    )
    assert convert(source, tmp_path / "target", "meta")["dtypes"] == ["float16"]
    assert bltjax.load(tmp_path / "target").logits([[1, 2, 3]]).dtype == np.float32

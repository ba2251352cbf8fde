"""Directories of weights in every published layout, made of the golden files."""

import json
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.golden import GOLDEN
from tests.pth_files import plain, put_pth, tensor

THRESHOLD = 4.101685523986816  # of hf_A, and of the golden entropies


def settings(name):
    return json.loads((GOLDEN / f"{name}.config.json").read_text())


def tensors(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def hub(directory, name, **changes):
    """Meta's hub layout, or Hugging Face's for `hf_A_1b_like`; `changes` are settings."""
    directory.mkdir(parents=True)
    shutil.copyfile(GOLDEN / f"{name}.safetensors", directory / "model.safetensors")
    config = settings(name) | changes
    if not name.startswith("hf"):
        config = {"args": config}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def meta_with_entropy_model(directory, name="meta_A_1b_like"):
    """A BLT with the entropy model in its own directory and the threshold of the golden files."""
    hub(directory, name)
    hub(directory / "entropy_model", "meta_entropy")
    training = {"data": {"patcher_args": {"threshold": THRESHOLD, "patching_mode": "entropy"}}}
    (directory / "train_args.json").write_text(json.dumps(training))
    return directory


def local(directory, name, key="model", prefix="", **training):
    """Meta's local layout: params.json and consolidated.pth, with a table that is no weight."""
    directory.mkdir(parents=True)
    found = {prefix + n: t for n, t in tensors(name).items()}
    found["rope_embeddings.freqs_cis"] = np.zeros((3, 2), np.float32)
    program = b"}(" + plain("optim") + plain({"step": 3}) + plain("model") + b"}("
    for i, (tensor_name, array) in enumerate(found.items()):
        strides = np.array(array.strides) // array.itemsize
        program += plain(tensor_name)
        program += tensor("Float", str(i), array.size, 0, array.shape, strides.tolist())
    made = put_pth(directory, b"\x80\x02" + program + b"uu.", found.values())
    made.rename(directory / "consolidated.pth")
    settings_of_all = {"seed": 7, "model": {"dim_global": 1}, key: settings(name)}
    (directory / "params.json").write_text(json.dumps(settings_of_all | training))
    return directory


def rewrite(directory, change):
    """Apply change(tensors), which edits a dict of arrays, to a directory's model.safetensors."""
    path = directory / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


def shard(directory, count=3):
    """Split model.safetensors into shards with an index, as large models come."""
    found = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(found), count)):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({str(n): found[str(n)] for n in names}, directory / file)
        weight_map |= {str(name): file for name in names}
    size = sum(array.nbytes for array in found.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_with_dots(directory):
    """Split model.safetensors into shards, which the index names with "./" before them."""
    shard(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: f"./{file}" for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    return directory


def contents(directory):
    """Every file below a directory, with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }

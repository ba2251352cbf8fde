"""Reads and writes safetensors files piece by piece, so that weights need not fit in memory."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from bltjax.checkpoints.lazy_arrays import LazyArray, blocks, num_bytes
from bltjax.checkpoints.pytorch.stored_array import Refused, StoredArray, parsing
from bltjax.runtime.files import replacing, write_json
from bltjax.runtime.plain_files import MAX_JSON_BYTES, parse_json, read_bytes, reason
from bltjax.runtime.progress import OnProgress

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
METADATA = {"format": "pt"}  # transformers does not load a file without it

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def open_safetensors(path: Path) -> dict[str, LazyArray]:
    """Opens the tensors of a file, by name in the file's order.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds a dtype that NumPy
    does not have.
    """
    path = Path(path)
    with parsing(path, "safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_JSON_BYTES, path.stat().st_size):
                raise ValueError(f"its header would have {length} bytes")
            header = file.read(length)
        with safe_open(path, framework="np"):  # the library validates sizes and offsets
            header = parse_json(header)
        header.pop("__metadata__", None)
        return {
            name: _stored(path, 8 + length, name, entry)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }


def _stored(path: Path, start: int, name: str, entry: dict) -> StoredArray:
    if entry["dtype"] not in DTYPES:
        raise Refused(
            f"tensor {name!r} of {path} has dtype {entry['dtype']}, which cannot be read: "
            f"convert it to one of {', '.join(DTYPES)}"
        )
    shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
    return StoredArray(path, start + entry["data_offsets"][0], shape, dtype)


def open_sharded(directory: Path) -> tuple[dict[str, LazyArray], list[str]]:
    """Opens the tensors of a model's directory; returns them by name, and a list of problems.

    Reads the files that `model.safetensors.index.json` names if there is one, else
    `model.safetensors`. Tensors with a problem are left out.
    """
    directory = Path(directory)
    if not (directory / INDEX).exists():
        if not (directory / SINGLE).exists():
            return {}, [
                f"{directory} has no weights: expected {SINGLE} or {INDEX}{_but(directory)}"
            ]
        shards, problems = _open_shards(directory, [SINGLE])
        return shards.get(SINGLE, {}), problems
    try:
        weight_map = read_index(directory / INDEX)
    except (ValueError, OSError) as error:
        problem = f"{directory / INDEX} is no index ({reason(error)}): download it again"
        return {}, [problem]
    shards, problems = _open_shards(directory, list(dict.fromkeys(weight_map.values())))
    tensors = {}
    for name, file in weight_map.items():
        if name in shards.get(file, {}):
            tensors[name] = shards[file][name]
        elif file in shards:
            problems.append(f"{file!r} lacks tensor {name!r}, which {INDEX} puts there")
    problems += _unexpected(shards, weight_map)
    return tensors, problems


def _but(directory: Path) -> str:
    """Returns what is there in the place of weights, for a message."""
    others = sorted(path.name for path in directory.glob("*.bin"))
    if (directory / SINGLE).is_symlink() or (directory / INDEX).is_symlink():
        return ", which is a link to nothing: download it again"
    if others:
        return f"; save {others[0]} as safetensors (save_pretrained does so)"
    return ""


def read_index(path: Path) -> dict[str, str]:
    """Reads which file each tensor is in. Raises ValueError for a damaged index, or OSError."""
    index = parse_json(read_bytes(path))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError("it has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ValueError(f"weight_map puts {name!r} in {file!r}, which is no file name")
    return {name: re.sub(r"^(\./+)+(?=.)", "", file) for name, file in weight_map.items()}


def _open_shards(directory: Path, files: list[str]) -> tuple[dict[str, dict], list[str]]:
    shards, problems = {}, []
    for file in files:
        outside = file in ("", ".", "..") or any(c in file for c in "/\\:")
        if outside or not file.isprintable():
            problems.append(f"{INDEX} names {file!r}: refused, shards are files beside it")
            continue
        try:
            shards[file] = open_safetensors(directory / file)
        except FileNotFoundError:
            problems.append(f"{file!r} is missing from {directory}: download it")
        except ValueError as error:
            problems.append(str(error))
    return shards, problems


def _unexpected(shards: dict[str, dict], weight_map: dict[str, str]) -> Iterator[str]:
    for file, tensors in shards.items():
        for name in tensors:
            place = weight_map.get(name)
            if place is None:
                yield f"{file!r} has tensor {name!r}, which {INDEX} does not name"
            elif place != file:
                yield f"{file!r} has tensor {name!r}, which {INDEX} puts in {place!r}"


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyArray], on_progress: OnProgress = None
) -> None:
    """Writes a file block by block; on_progress: called with the number of bytes after each.

    The file appears when it is complete. Dtypes are those of DTYPES.
    """
    names = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header = _header({name: tensors[name] for name in names})
    with replacing(Path(path)) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            _write_array(file, name, tensors[name], on_progress)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: dict[str, LazyArray]) -> bytes:
    header: dict[str, dict] = {"__metadata__": METADATA}
    end = 0
    for name, array in tensors.items():
        kind, shape = _KINDS[np.dtype(array.dtype)], [int(n) for n in array.shape]
        begin, end = end, end + num_bytes(array)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _write_array(file, name: str, array: LazyArray, on_progress: OnProgress) -> None:
    for index in blocks(array):
        piece = array[index]
        wanted = tuple(axis.stop - axis.start for axis in index)
        if piece.shape != wanted or piece.dtype != array.dtype:  # would shift all that follows
            raise ValueError(
                f"tensor {name!r} gave {piece.dtype}{list(piece.shape)} for "
                f"{array.dtype}{list(wanted)}: a bug in what reads it"
            )
        # As bytes, since files take no buffer of a dtype that NumPy lacks, like bfloat16.
        file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        if on_progress:
            on_progress(piece.nbytes)


def write_sharded(
    directory: Path,
    tensors: Mapping[str, LazyArray],
    on_progress: OnProgress = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` of data and an index.

    Tensors keep their order over the shards; a larger tensor gets a shard to itself. Other weights
    must not be there, since a reader could load those.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(directory / SINGLE, tensors, on_progress)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names}, on_progress)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": sum(map(num_bytes, tensors.values()))},
        "weight_map": weight_map,
    }
    write_json(directory / INDEX, index)


def _shards(tensors: Mapping[str, LazyArray], max_bytes: int) -> list[list[str]]:
    """Returns the names of the tensors of each shard, which are filled in order."""
    shards, room = [[]], max_bytes
    for name, array in tensors.items():
        size = num_bytes(array)
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards

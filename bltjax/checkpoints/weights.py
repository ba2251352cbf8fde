"""The weights of a model, of any format: configs, and parameters that are not in memory yet."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bltjax.checkpoints.host_fingerprints import HostFingerprint
from bltjax.checkpoints.lazy_arrays import LazyArray, blocks, num_bytes, num_nonfinite, tree_leaves
from bltjax.config import BLTConfig, EntropyModelConfig, PatchingConfig
from bltjax.config.chat import ChatConfig
from bltjax.config.lora import LoRAConfig
from bltjax.runtime.progress import OnProgress
from bltjax.runtime.terminal import printable

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
MOST_TOLD = 100  # problems in a message


class Lengths(NamedTuple):
    """Lengths of rows; nothing in the models limits them.

    bytes, patches, entropy_bytes: what the published code makes position tables for. row_bytes:
    the rows in which documents are scored, those of training where they are known.
    """

    bytes: int = 24576
    patches: int = 4096
    entropy_bytes: int = 8192
    row_bytes: int = 8192


class Adapter(NamedTuple):
    """Low-rank adapters of the matrices of a BLT (`bltjax/model/lora.py`).

    params: nested dicts of lazy arrays, at the paths of matrices {"lora_A": {"weight": [..., r,
    in]}, "lora_B": {"weight": [..., out, r]}}. base_path: of what they were trained on; None where
    nobody says.
    """

    config: LoRAConfig
    params: dict
    base_path: str | None = None


class Weights(NamedTuple):
    """A byte latent transformer, an entropy model, or both with the rule that joins them.

    params: {"blt": ..., "entropy_model": ...}, nested dicts of lazy arrays under the paths of
    `functional.abstract_params`, in the dtype they are stored in. A model that is not there has
    neither config nor parameters. notes: what a user of the source should know. adapter: one that
    the BLT's parameters hold already, and what they were without it. chat: how the turns look of
    the conversations that the model was trained on. run: settings and result of the run that made
    it, as JSON.
    """

    blt: BLTConfig | None
    entropy_model: EntropyModelConfig | None
    patching: PatchingConfig
    params: dict[str, dict]
    lengths: Lengths = Lengths()
    notes: tuple[str, ...] = ()
    adapter: Adapter | None = None
    base: dict | None = None
    chat: ChatConfig | None = None
    run: dict | None = None

    def with_entropy_model(self, other: "Weights") -> "Weights":
        """Returns this model with the entropy model of another directory."""
        return self._replace(
            entropy_model=other.entropy_model,
            params=self.params | {"entropy_model": other.params["entropy_model"]},
            lengths=self.lengths._replace(entropy_bytes=other.lengths.entropy_bytes),
            notes=self.notes + other.notes,
        )

    def num_bytes(self) -> int:
        """Returns the size of all parameters as they are stored."""
        return sum(num_bytes(leaf) for _, leaf in tree_leaves(self.params))


class WeightsError(ValueError):
    """Raised for weights that cannot be used as they are; `problems` lists every one found."""

    def __init__(self, path, problems: Iterable[str]):
        self.problems = list(problems)
        count = len(self.problems)
        told = [_one_line(problem) for problem in self.problems[:MOST_TOLD]]
        if count > MOST_TOLD:
            told.append(f"and {count - MOST_TOLD} more")
        lines = "".join(f"\n  - {problem}" for problem in told)
        super().__init__(f"{path}: {told[0] if count == 1 else f'{count} problems{lines}'}")


def _one_line(problem: str) -> str:
    """Returns text of one line that steers no terminal, whatever names a file has inside."""
    return printable(problem.encode("utf-8", "surrogatepass")).replace("\n", "\\n")


def value_problems(tensors: dict[str, LazyArray], on_progress: OnProgress = None) -> list[str]:
    """Names the tensors that are not floating point, or hold NaN or infinite values.

    A tensor with a `fingerprint`, that of what was saved, must have those values. Reads everything
    once, piece by piece.
    """
    found = dtype_problems(tensors)
    for name, tensor in tensors.items():
        if np.dtype(tensor.dtype).name not in FLOAT_DTYPES:
            continue
        bad, saved, total = 0, getattr(tensor, "fingerprint", None), HostFingerprint()
        for index in blocks(tensor):
            piece = np.asarray(tensor[index])
            bad += num_nonfinite(piece)
            if saved is not None:
                total.add(piece)
            if on_progress:
                on_progress(piece.nbytes)
        if bad:
            found.append(f"{name} has {bad} values that are NaN or infinite")
        elif saved not in (None, total.value):
            found.append(
                f"{name} has other values than were saved: its checkpoint is damaged; move it away "
                "and run its stage again"
            )
    return found


def dtype_problems(tensors: Mapping[str, LazyArray]) -> list[str]:
    """Names the tensors that are not of FLOAT_DTYPES, a line for each dtype; reads nothing."""
    by_dtype: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        by_dtype.setdefault(np.dtype(tensor.dtype).name, []).append(name)
    found = []
    for dtype in by_dtype.keys() - set(FLOAT_DTYPES):
        first, *others = by_dtype[dtype]
        which = f"{first} and {len(others)} more are" if others else f"{first} is"
        remedy = "cast them with .float() in PyTorch and save them again"
        if not dtype.startswith("float64"):
            remedy = (
                "if they are quantized, dequantize them to bfloat16 or float32 with the program "
                "that made them, and save them again"
            )
        found.append(f"{which} {dtype}, weights must be one of {FLOAT_DTYPES}: {remedy}")
    return sorted(found)


def shape_problems(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Names the arrays that are missing, that nobody expects, or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    return problems + [
        f"{name} has shape {list(found[name])}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]


def shapes(arrays: Mapping[str, LazyArray]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array by name."""
    return {name: tuple(array.shape) for name, array in arrays.items()}


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a nested dict by dotted path."""
    return {".".join(path): leaf for path, leaf in tree_leaves(tree)}

"""Every setting of a run, as frozen dataclasses, and all validation of them.

`ml_collections` stops at the edge: a file in `configs/` edits the ConfigDict that
`default_config()` makes from these classes, the command line edits it further, and
`from_config_dict` turns it back into dataclasses, checking names, types and values.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass

import ml_collections
from ml_collections import config_dict

VOCAB_SIZE = 260  # 4 special ids and 256 bytes, see vocabulary.py
POOLING_MODES = ("max", "min", "mean")
INIT_FACTORS = ("current_depth", "global_depth", "dim_ratio", "disabled")
DTYPES = ("float32", "bfloat16")
REMAT_MODES = ("none", "dots", "full")
PATCHING_RULES = ("entropy", "monotonic", "global_monotonic", "space", "static", "byte", "bpe")
ENTROPY_RULES = ("entropy", "monotonic", "global_monotonic")
SCHEDULES = ("cosine", "linear", "inv_sqrt", "wsd", "constant")
STAGES = ("entropy_model", "entropies", "blt", "evaluate", "sample")


@dataclass(frozen=True)
class TransformerConfig:
    """One stack of transformer blocks (spec 5.2)."""

    dim: int = 64
    num_layers: int = 1
    num_heads: int = 4
    num_kv_heads: int | None = None  # grouped-query attention; None: one per query head
    head_dim: int | None = None  # None: dim / num_heads
    window: int | None = None  # bytes a query sees, itself included; None: everything before it
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    ffn_dim_multiplier: float = 1.0
    ffn_multiple_of: int = 256

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the SwiGLU feed-forward, rounded up (spec 5.2)."""
        hidden = int(self.ffn_dim_multiplier * int(2 * 4 * self.dim / 3))
        return -(-hidden // self.ffn_multiple_of) * self.ffn_multiple_of

    def problems(self, name: str) -> list[str]:
        found = _positive(
            self,
            name,
            "dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "rope_theta",
            "norm_eps",
            "ffn_dim_multiplier",
            "ffn_multiple_of",
        )
        if found:
            return found
        if self.head_dim is None and self.dim % self.num_heads:
            found.append(
                f"{name}.dim={self.dim} is not divisible by "
                f"{name}.num_heads={self.num_heads}: set {name}.head_dim, or change one"
            )
        if self.num_heads % self.kv_heads:
            found.append(
                f"{name}.num_heads={self.num_heads} is not a multiple of "
                f"{name}.num_kv_heads={self.num_kv_heads}: choose a divisor"
            )
        if self.head_width % 2:
            found.append(
                f"{name}.dim={self.dim}, {name}.num_heads={self.num_heads} and "
                f"{name}.head_dim={self.head_dim} give head width {self.head_width}, but "
                "rotary embedding turns pairs: choose an even width"
            )
        if self.window is not None and self.window < 1:
            found.append(f"{name}.window={self.window} must be at least 1 (or None)")
        return found


@dataclass(frozen=True)
class InitConfig:
    """Initial weights: normal, cut at 3 sigma (spec 6)."""

    std_factor: str = "current_depth"  # one of INIT_FACTORS
    base_std: float | None = None  # replaces 1/sqrt(fan-in) in the global stack, without factor


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Bytes to patches in the encoder, patches to bytes in the decoder (spec 5.5)."""

    encoder: bool = True
    decoder: bool = True
    k: int = 2  # vectors of local width per patch
    num_heads: int = 4
    all_layers_encoder: bool = False  # otherwise after the last layer only
    all_layers_decoder: bool = True  # otherwise before the first layer only
    window_encoder: int | None = None  # patches; None: each patch reads only its own bytes
    window_decoder: int | None = None  # patches; None: each byte reads one patch
    doubled_residual: bool = True  # 2x + attention, as the released weights expect


@dataclass(frozen=True)
class HashConfig:
    """Hash n-gram embeddings (spec 4); no sizes, no tables."""

    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    vocab: int = 500_002  # rows per table
    num_functions: int = 1


@dataclass(frozen=True)
class EntropyModelConfig:
    """The small byte language model that says how hard each next byte is (spec 7)."""

    transformer: TransformerConfig = TransformerConfig(rope_theta=10_000.0, window=512)
    vocab_size: int = VOCAB_SIZE
    init: InitConfig = InitConfig()
    compute_dtype: str = "float32"
    remat: str = "none"

    def problems(self, name: str) -> list[str]:
        found = self.transformer.problems(f"{name}.transformer")
        if self.transformer.window is None:
            found.append(
                f"{name}.transformer.window is None: the entropy model is local, "
                "set the bytes it sees, for example 512"
            )
        return found + _common_model_problems(self, name)


@dataclass(frozen=True)
class BLTConfig:
    """The byte latent transformer (spec 5); the defaults are a toy."""

    local_encoder: TransformerConfig = TransformerConfig(window=512)
    global_transformer: TransformerConfig = TransformerConfig(dim=128)
    local_decoder: TransformerConfig = TransformerConfig(window=512)
    cross_attention: CrossAttentionConfig = CrossAttentionConfig()
    hash: HashConfig = HashConfig()
    pooling: str = "max"  # bytes to patch, one of POOLING_MODES
    vocab_size: int = VOCAB_SIZE
    init: InitConfig = InitConfig()
    compute_dtype: str = "float32"
    remat: str = "none"

    @property
    def patch_width(self) -> int:
        """Width of a patch as the encoder hands it to the global transformer."""
        return self.local_encoder.dim * (
            self.cross_attention.k if self.cross_attention.encoder else 1
        )

    @property
    def num_hash_tables(self) -> int:
        return len(self.hash.sizes) * self.hash.num_functions

    def problems(self, name: str) -> list[str]:
        local, cross = self.local_encoder, self.cross_attention
        found = [
            p
            for stack in ("local_encoder", "global_transformer", "local_decoder")
            for p in getattr(self, stack).problems(f"{name}.{stack}")
        ]
        if local.dim != self.local_decoder.dim:
            found.append(
                f"{name}.local_encoder.dim={local.dim} differs from "
                f"{name}.local_decoder.dim={self.local_decoder.dim}: the decoder reads "
                "the encoder's byte states, make them equal"
            )
        for stack in ("local_encoder", "local_decoder"):
            if getattr(self, stack).window is None:
                found.append(
                    f"{name}.{stack}.window is None: local stacks see a window, "
                    "set the bytes, for example 512"
                )
        if self.global_transformer.window is not None:
            found.append(
                f"{name}.global_transformer.window={self.global_transformer.window}: "
                "the global stack sees all earlier patches, leave it None"
            )
        found += _positive(
            cross, f"{name}.cross_attention", "k", "num_heads", "window_encoder", "window_decoder"
        )
        if (cross.encoder or cross.decoder) and cross.num_heads > 0 and local.dim % cross.num_heads:
            found.append(
                f"{name}.local_encoder.dim={local.dim} is not divisible by "
                f"{name}.cross_attention.num_heads={cross.num_heads}: change one"
            )
        found += _one_of(self, name, "pooling", POOLING_MODES)
        if self.hash.sizes:
            found += _positive(self.hash, f"{name}.hash", "vocab", "num_functions")
            if not all(1 <= n <= 16 for n in self.hash.sizes):
                found.append(f"{name}.hash.sizes={self.hash.sizes} must lie in 1..16")
            if self.hash.vocab > 2**28 or self.hash.num_functions > 11:
                found.append(
                    f"{name}.hash has vocab={self.hash.vocab}, num_functions="
                    f"{self.hash.num_functions}: at most 2**28 rows and 11 functions"
                )
        return found + _common_model_problems(self, name)


@dataclass(frozen=True)
class PatchingConfig:
    """Where patches start (spec 2)."""

    rule: str = "entropy"  # one of PATCHING_RULES
    target_patch_bytes: float | None = 4.5  # entropy rules: calibrate the threshold to this mean
    threshold: float = 1.335442066192627  # nats; used where target_patch_bytes is None
    threshold_add: float = 0.0  # nats; the difference threshold of global_monotonic
    patch_size: int = 4  # static rule
    max_patch_length: int | None = None
    reset_at_newlines: bool = False  # the entropy model forgets at newlines (paper 4.4)
    published_skip_at_3: bool = False  # replicate "never a start at 3" (spec 2.4)

    def problems(self, name: str) -> list[str]:
        found = _one_of(self, name, "rule", PATCHING_RULES) + _positive(self, name, "patch_size")
        if self.max_patch_length is not None and self.max_patch_length < 1:
            found.append(f"{name}.max_patch_length={self.max_patch_length} must be at least 1")
        if self.target_patch_bytes is not None and self.target_patch_bytes < 1:
            found.append(f"{name}.target_patch_bytes={self.target_patch_bytes} must be at least 1")
        if self.rule == "global_monotonic" and self.target_patch_bytes is not None:
            found.append(
                f"{name}.target_patch_bytes={self.target_patch_bytes} cannot be reached "
                f"with {name}.rule={self.rule!r}, which has two thresholds: set "
                "target_patch_bytes to None, and threshold and threshold_add"
            )
        return found


@dataclass(frozen=True)
class DataConfig:
    """Which text; files are split into training and validation by name."""

    root: str = ""  # a directory; empty: the running Python's standard library
    suffixes: tuple[str, ...] = (".py", ".rst", ".txt", ".md")
    exclude: tuple[str, ...] = (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
    )
    validation_fraction: float = 0.035
    max_bytes: int | None = None
    seed: int = 0

    def problems(self, name: str) -> list[str]:
        if not 0 < self.validation_fraction < 1:
            return [
                f"{name}.validation_fraction={self.validation_fraction} must lie between 0 and 1"
            ]
        return []


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule, in the published family (spec 8.1)."""

    learning_rate: float = 4e-4
    schedule: str = "cosine"  # one of SCHEDULES
    warmup_steps: int = 2000
    min_ratio: float = 0.01  # the last learning rate, as a share of the peak
    cycle_length: float = 1.0  # cosine: full cycles as a share of all steps
    cosine_theta: float = 1.0
    decay_fraction: float = 0.1  # wsd
    exp_factor: float = 0.5  # inv_sqrt
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def problems(self, name: str) -> list[str]:
        found = _one_of(self, name, "schedule", SCHEDULES) + _positive(
            self, name, "learning_rate", "clip_norm"
        )
        if self.schedule == "wsd" and self.min_ratio <= 0:
            found.append(
                f"{name}.min_ratio={self.min_ratio} must be positive with "
                f"{name}.schedule={self.schedule!r}, which divides by it"
            )
        return found


@dataclass(frozen=True)
class TrainingConfig:
    """One training stage: rows, steps, optimizer, and how often to log and save."""

    steps: int = 1000
    batch_size: int = 8  # rows over all devices
    row_bytes: int = 1024  # L, byte positions of a row
    row_patches: int = 0  # P, patch slots of a row; 0: from row_bytes and the mean patch
    optimizer: OptimizerConfig = OptimizerConfig()
    log_every: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    seed: int = 42

    def problems(self, name: str) -> list[str]:
        found = _positive(
            self, name, "steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"
        )
        if self.row_bytes < 8:
            found.append(f"{name}.row_bytes={self.row_bytes} must be at least 8")
        if self.row_patches < 0 or self.row_bytes < self.row_patches:
            found.append(
                f"{name}.row_bytes={self.row_bytes} is below "
                f"{name}.row_patches={self.row_patches}: a row holds at most one patch "
                "per byte, lower row_patches (0 chooses it)"
            )
        return found + self.optimizer.problems(f"{name}.optimizer")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, it takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def problems(self, name: str) -> list[str]:
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            return [f"{name}={sizes}: axes must be at least 1, and only one may be -1"]
        return []


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured and shown at the end of a run."""

    batch_size: int = 8
    baselines: bool = True  # fit n-gram models on the training bytes
    prompt: str = "def "
    sample_bytes: int = 200
    temperature: float = 0.7
    sentence: str = "Patches are short where text is hard and long where it is easy."

    def problems(self, name: str) -> list[str]:
        return _positive(self, name, "batch_size", "sample_bytes")


@dataclass(frozen=True)
class RunConfig:
    """A run: the stages it goes through and the settings of each."""

    stages: tuple[str, ...] = STAGES
    data: DataConfig = DataConfig()
    patching: PatchingConfig = PatchingConfig()
    entropy_model: EntropyModelConfig = EntropyModelConfig()
    entropy_training: TrainingConfig = TrainingConfig()
    blt: BLTConfig = BLTConfig()
    blt_training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        found = [
            p
            for f in dataclasses.fields(self)
            if f.name != "stages"
            for p in getattr(self, f.name).problems(f.name)
        ]
        unknown = [s for s in self.stages if s not in STAGES]
        if unknown or not self.stages:
            found.append(f"stages={self.stages} must be one or more of {STAGES}")
        if found:
            raise ValueError("; ".join(found))


# Settings that may change between the runs of one working directory: they touch how a run is
# watched and where it runs, never what it computes.
FREE_FIELDS = ("mesh", "log_every", "checkpoint_every", "keep_checkpoints")


def _positive(config, name: str, *names: str) -> list[str]:
    """Optional settings pass where they are None."""
    return [
        f"{name}.{n}={getattr(config, n)} must be positive"
        for n in names
        if getattr(config, n) is not None and getattr(config, n) <= 0
    ]


def _one_of(config, name: str, attribute: str, allowed: tuple[str, ...]) -> list[str]:
    value = getattr(config, attribute)
    return [] if value in allowed else [f"{name}.{attribute}={value!r} must be one of {allowed}"]


def _common_model_problems(config, name: str) -> list[str]:
    return (
        _one_of(config, name, "compute_dtype", DTYPES)
        + _one_of(config, name, "remat", REMAT_MODES)
        + _one_of(config.init, f"{name}.init", "std_factor", INIT_FACTORS)
        + (
            []
            if config.vocab_size >= VOCAB_SIZE
            else [
                f"{name}.vocab_size={config.vocab_size} is below the {VOCAB_SIZE} ids of bytes "
                "and special tokens"
            ]
        )
    )


def default_config(cls=RunConfig) -> ml_collections.ConfigDict:
    """All settings at their defaults, as a ConfigDict for a file in `configs/` to edit."""
    return to_config_dict(cls())


def to_config_dict(config) -> ml_collections.ConfigDict:
    """A dataclass as a ConfigDict; optional fields become typed placeholders."""
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            result[f.name] = to_config_dict(value)
        elif _is_optional(hints[f.name]):
            result[f.name] = config_dict.placeholder(_plain_type(hints[f.name]))
            result[f.name] = value
        else:
            result[f.name] = value
    return result


def from_config_dict(cls, config, name: str = "config"):
    """The frozen dataclass that a ConfigDict (or a nested dict) describes.

    Raises ValueError that names the field and the value: unknown key (with the nearest known
    one), wrong type, or a value that no model could have.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key in config:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1) or sorted(fields)
            raise ValueError(f"{name}.{key} is not a setting; did you mean {', '.join(near)}?")
        values[key] = _coerce(hints[key], config[key], f"{name}.{key}")
    return cls(**values)


def _coerce(hint, value, name: str):
    if dataclasses.is_dataclass(hint):
        if not hasattr(value, "keys"):
            raise ValueError(f"{name}={value!r} must be a group of settings, not a value")
        return from_config_dict(hint, value, name)
    if value is None and _is_optional(hint):
        return None
    plain = _plain_type(hint)
    if plain is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name}={value!r} must be a tuple")
        return tuple(
            _coerce(typing.get_args(hint)[0], v, f"{name}[{i}]") for i, v in enumerate(value)
        )
    if plain is float and type(value) is int:
        return float(value)
    if type(value) is not plain:
        raise ValueError(f"{name}={value!r} is {type(value).__name__}, must be {plain.__name__}")
    return value


def _is_optional(hint) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _plain_type(hint):
    if _is_optional(hint):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    return typing.get_origin(hint) or hint


def to_dict(config) -> dict:
    """A dataclass as nested plain dicts (JSON-ready, tuples as lists)."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def differences(old: dict, new: dict, name: str = "config") -> list[str]:
    """Fields whose values differ between two `to_dict` results, free fields left out."""
    found = []
    for key in sorted({*old, *new} - set(FREE_FIELDS)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.{key}")
        elif a != b:
            found.append(f"{name}.{key}: {a!r} there, {b!r} here")
    return found

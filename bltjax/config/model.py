"""Settings of the models: the byte latent transformer, the entropy model, the token model."""

from dataclasses import dataclass

from bltjax.config.checks import finite, one_of, positive
from bltjax.vocabulary import VOCAB_SIZE

POOLING_MODES = ("max", "min", "mean")
INIT_FACTORS = ("current_depth", "global_depth", "dim_ratio", "disabled")
DTYPES = ("float32", "bfloat16")
REMAT_MODES = ("none", "dots", "full")
HASH_TABLES = "encoder_hash_tok_embedding"  # published name of the parameter
SHARED_TABLE = 4096  # rows; smaller hash tables need not be split over chips


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of transformer layers (model.md#block)."""

    dim: int = 64  # width of the vectors that go from layer to layer
    num_layers: int = 1  # attention and feed-forward layers, in pairs
    num_heads: int = 4  # query heads of an attention layer
    num_kv_heads: int | None = None  # key/value heads, each for several query heads; None: one each
    head_dim: int | None = None  # width of a head; None: dim / num_heads
    window: int | None = None  # positions a query attends to, its own included; None: all before it
    rope_theta: float = 500_000.0  # base of the rotary position embedding
    norm_eps: float = 1e-5  # added under the root in RMSNorm
    ffn_dim_multiplier: float = 1.0  # scales the hidden width of feed-forward layers, 8/3 * dim
    ffn_multiple_of: int = 256  # that width is rounded up to a multiple of this
    ffn_width: int | None = None  # the hidden width itself; None: from the two settings above

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the SwiGLU feed-forward, rounded up unless given (model.md#block)."""
        if self.ffn_width is not None:
            return self.ffn_width
        hidden = int(self.ffn_dim_multiplier * int(2 * 4 * self.dim / 3))
        return -(-hidden // self.ffn_multiple_of) * self.ffn_multiple_of

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        if found := positive(self, name) + finite(self, name):
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
        return found


@dataclass(frozen=True)
class InitConfig:
    """Initial weights, drawn from normals that are cut at 3 sigma (model.md#initial-weights)."""

    # Scales deeper layers down: by their depth, the depth of the stack, its width, or not at all
    # ("current_depth", "global_depth", "dim_ratio", "disabled").
    std_factor: str = "current_depth"
    base_std: float | None = None  # standard deviation in the global stack; None: from fan-in


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Attention of patches to bytes in the encoder, of bytes to them in the decoder.

    See model.md#cross-attention.
    """

    encoder: bool = True  # off: patches are pooled bytes
    decoder: bool = True  # off: the patch's vector is added to its bytes
    k: int = 2  # vectors of local width that a patch consists of
    num_heads: int = 4  # query heads
    num_kv_heads: int | None = None  # key/value heads; None: one per query head, as published
    num_heads_decoder: int | None = None  # query heads in the decoder; None: as in the encoder
    num_kv_heads_decoder: int | None = None  # key/value heads there; None: as in the encoder
    all_layers_encoder: bool = False  # after each layer of the encoder; off: after the last only
    all_layers_decoder: bool = True  # before each layer of the decoder; off: before the first only
    window_encoder: int | None = None  # patches whose bytes a patch attends to; None: its own only
    window_decoder: int | None = None  # patches that a byte attends to; None: one only
    doubled_residual: bool = True  # adds the input twice, as the released weights expect

    @property
    def encoder_heads(self) -> tuple[int, int]:
        """Numbers of query heads and of key/value heads in the encoder."""
        return self.num_heads, self.num_kv_heads or self.num_heads

    @property
    def decoder_heads(self) -> tuple[int, int]:
        """Numbers of query heads and of key/value heads in the decoder."""
        if self.num_heads_decoder is None:
            return self.num_heads, self.num_kv_heads_decoder or self.encoder_heads[1]
        return self.num_heads_decoder, self.num_kv_heads_decoder or self.num_heads_decoder

    def problems(self, name: str, dim_name: str, dim: int) -> list[str]:
        """Returns problems with local stacks of width `dim`, a setting called `dim_name`."""
        found = positive(self, name)
        if found or not (self.encoder or self.decoder):
            return found
        sides = {"": self.encoder_heads}
        if self.num_heads_decoder is not None or self.num_kv_heads_decoder is not None:
            sides["_decoder"] = self.decoder_heads
        for side, (heads, kv_heads) in sides.items():
            if dim % heads:
                found.append(
                    f"{dim_name}={dim} is not divisible by {name}.num_heads{side}={heads}: "
                    "change one"
                )
            if heads % kv_heads:
                found.append(
                    f"{name}.num_heads{side}={heads} is not a multiple of "
                    f"num_kv_heads{side}={kv_heads}: choose a divisor"
                )
        return found


@dataclass(frozen=True)
class HashConfig:
    """Embeddings of the n bytes that end at each position, found by a hash (model.md#n-grams)."""

    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)  # each n; empty: no tables
    vocab: int = 500_002  # rows of a table
    num_functions: int = 1  # hash functions, and so tables, for each n

    @property
    def rows(self) -> int:
        """Rows of a table in memory: a large one has unused rows, so that chips can share it."""
        if self.vocab < SHARED_TABLE:
            return self.vocab
        step = 1024 if self.vocab < 2**18 else 10_240  # 5 * 2^11: for 40 GPUs, for 2048 chips
        return -(-self.vocab // step) * step


@dataclass(frozen=True)
class EntropyModelConfig:
    """A small byte model whose entropies tell where patches start (model.md#entropy-model)."""

    transformer: TransformerConfig = TransformerConfig(rope_theta=10_000.0, window=512)  # layers
    vocab_size: int = VOCAB_SIZE  # 256 bytes and 4 special ids
    init: InitConfig = InitConfig()  # initial weights
    compute_dtype: str = "float32"  # of matrix products: float32 or bfloat16
    # Activations that the backward pass computes again to save memory: none, all but the results
    # of matrix products ("dots"), or all ("full").
    remat: str = "none"

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = self.transformer.problems(f"{name}.transformer")
        if self.transformer.window is None:
            found.append(
                f"{name}.transformer.window is None: the entropy model is local, "
                "set the bytes it sees, for example 512"
            )
        return found + _common_model_problems(self, name)


@dataclass(frozen=True)
class TokenModelConfig(EntropyModelConfig):
    """A plain transformer over a tokenizer's ids, as a baseline for byte models."""

    transformer: TransformerConfig = TransformerConfig()  # layers
    vocab_size: int = 4096  # ids of the tokenizer, at most: trained on little text it has fewer

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        return self.transformer.problems(f"{name}.transformer") + _common_model_problems(self, name)


@dataclass(frozen=True)
class BLTConfig:
    """A byte latent transformer (model.md). The defaults are a toy."""

    local_encoder: TransformerConfig = TransformerConfig(window=512)  # layers over bytes, before
    global_transformer: TransformerConfig = TransformerConfig(dim=128)  # layers over patches
    local_decoder: TransformerConfig = TransformerConfig(window=512)  # layers over bytes, after
    cross_attention: CrossAttentionConfig = CrossAttentionConfig()  # between bytes and patches
    hash: HashConfig = HashConfig()  # n-gram embeddings of the encoder
    pooling: str = "max"  # how a patch starts from its bytes: max, min or mean
    # Project patches for the decoder even between equal widths, as Hugging Face's model does.
    always_project: bool = False
    vocab_size: int = VOCAB_SIZE  # 256 bytes and 4 special ids
    init: InitConfig = InitConfig()  # initial weights
    compute_dtype: str = "float32"  # of matrix products: float32 or bfloat16
    remat: str = "none"  # activations computed again in the backward pass: none, dots or full

    @property
    def patch_width(self) -> int:
        """Width of a patch where it leaves the encoder, before any projection."""
        vectors = self.cross_attention.k if self.cross_attention.encoder else 1
        return vectors * self.local_encoder.dim

    @property
    def read_width(self) -> int:
        """Width of a patch where it enters the decoder: k local vectors, or 1 without attention."""
        vectors = self.cross_attention.k if self.cross_attention.decoder else 1
        return vectors * self.local_decoder.dim

    @property
    def has_decoder_projection(self) -> bool:
        """True where patches are projected for the decoder: widths differ (model.md#decoder)."""
        widths = {self.global_transformer.dim, self.local_decoder.dim, self.read_width}
        return self.always_project or len(widths) > 1

    @property
    def num_hash_tables(self) -> int:
        """Number of hash n-gram tables."""
        return len(self.hash.sizes) * self.hash.num_functions

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        local, cross = self.local_encoder, self.cross_attention
        found = []
        for stack in ("local_encoder", "global_transformer", "local_decoder"):
            found += getattr(self, stack).problems(f"{name}.{stack}")
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
        found += cross.problems(f"{name}.cross_attention", f"{name}.local_encoder.dim", local.dim)
        found += one_of(self, name, "pooling", POOLING_MODES)
        if self.hash.sizes:
            found += positive(self.hash, f"{name}.hash")
            if not all(1 <= n <= 16 for n in self.hash.sizes):
                found.append(f"{name}.hash.sizes={self.hash.sizes} must lie in 1..16")
            if self.hash.vocab > 2**28 or self.hash.num_functions > 11:
                found.append(
                    f"{name}.hash has vocab={self.hash.vocab}, num_functions="
                    f"{self.hash.num_functions}: at most 2**28 rows and 11 functions"
                )
        return found + _common_model_problems(self, name)


def _common_model_problems(config, name: str) -> list[str]:
    init = f"{name}.init"
    found = one_of(config, name, "compute_dtype", DTYPES)
    found += one_of(config, name, "remat", REMAT_MODES)
    found += one_of(config.init, init, "std_factor", INIT_FACTORS)
    found += positive(config.init, init) or finite(config.init, init)
    if config.vocab_size < VOCAB_SIZE:
        found.append(
            f"{name}.vocab_size={config.vocab_size} is below the {VOCAB_SIZE} ids of bytes and "
            "special tokens"
        )
    return found

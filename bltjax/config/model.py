"""Settings of the models: the byte latent transformer, the entropy model, the token model."""

import dataclasses
from dataclasses import dataclass

from bltjax.config.checks import MOST_ROW, MOST_WIDTH, not_negative, one_of, positive, shown
from bltjax.config.lora import LoRAConfig
from bltjax.vocabulary import VOCAB_SIZE

POOLING_MODES = ("max", "min", "mean")
INIT_FACTORS = ("current_depth", "global_depth", "dim_ratio", "disabled")
DTYPES = ("float32", "bfloat16")
REMAT_MODES = ("none", "dots", "full")
ATTENTION_KERNELS = ("auto", "tiles", "cudnn", "mosaic", "splash")
MOST_FILLED = 256  # bytes of a block that the decoder fills in
MOST_BLOCK = 2**16  # positions of a block; scores of two blocks would fill a TPU's memory
HASH_TABLES = "encoder_hash_tok_embedding"  # published name of the parameter
INITIAL_ROWS = ("normal", "zeros")
SHARED_TABLE = 4096  # rows; smaller hash tables need not be split over chips


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of transformer layers (model.md#block)."""

    dim: int = 64  # width
    num_layers: int = 1  # blocks
    num_heads: int = 4  # query heads of attention
    # key/value heads (grouped-query attention); divides `num_heads`; None: one per query head
    num_kv_heads: int | None = None
    head_dim: int | None = None  # width of a head, even; None: `dim / num_heads`
    window: int | None = None  # positions that a query sees, itself included; None: all before it
    rope_theta: float = 500_000.0  # base of the rotary embedding
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    # times the width of the feed-forward layer, before it is rounded up
    ffn_dim_multiplier: float = 1.0
    # the width of the feed-forward layer is rounded up to a multiple of this
    ffn_multiple_of: int = 256
    # width of the feed-forward layer; None: `int(ffn_dim_multiplier * int(8 * dim / 3))`, rounded
    # up
    ffn_width: int | None = None
    qkv_bias: bool = False  # biases of queries, keys and values, as Qwen2 has them
    # RMSNorm of the queries and the keys of each head, before they are turned, as in Qwen3
    qk_norm: bool = False
    # rotary frequencies are divided by this, as for texts longer than in training; 1: they are not
    rope_factor: float = 1.0
    # length of the texts before that, as in Llama 3: waves that are shorter than a quarter of it
    # are left as they are; None: all frequencies are divided
    rope_original_positions: int | None = None

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
        widths = [f.name for f in dataclasses.fields(self) if f.name != "window"]
        found = positive(self, name, *widths, most=MOST_WIDTH)
        if found := found + positive(self, name, "window", most=MOST_ROW):
            return found
        if not 1 <= self.ffn_dim <= MOST_WIDTH:
            found.append(
                f"{name}.ffn_dim_multiplier={self.ffn_dim_multiplier} gives feed-forward layers of "
                f"width {shown(self.ffn_dim)}, must be from 1 to {MOST_WIDTH}"
            )
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

    # how the standard deviation shrinks: `"current_depth"` (with the depth of the layer),
    # `"global_depth"` (with the number of layers), `"dim_ratio"` (with the width), `"disabled"`
    std_factor: str = "current_depth"
    # standard deviation in the global stack, without any factor; None: `1/sqrt(fan-in)` with the
    # factor
    base_std: float | None = None


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Attention of patches to bytes in the encoder, of bytes to them in the decoder.

    See model.md#cross-attention.
    """

    encoder: bool = True  # whether the encoder has it; without it a patch is its pooled bytes
    decoder: bool = True  # whether the decoder has it
    k: int = 2  # vectors of local width that make up a patch
    num_heads: int = 4  # query heads; divides the width of the local stacks
    num_kv_heads: int | None = None  # key/value heads; None: one per query head, as published
    num_heads_decoder: int | None = None  # query heads of the decoder; None: as in the encoder
    # key/value heads of the decoder; None: as in the encoder
    num_kv_heads_decoder: int | None = None
    all_layers_encoder: bool = False  # after each encoder layer; otherwise after the last only
    all_layers_decoder: bool = True  # before each decoder layer; otherwise before the first only
    window_encoder: int | None = None  # patches whose bytes a patch reads; None: only its own
    window_decoder: int | None = None  # patches that a byte reads; None: one
    # the output is `2x + attention`, as the released weights expect; otherwise `x + attention`
    doubled_residual: bool = True

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
        found = positive(self, name, most=MOST_WIDTH)
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
    """Embeddings of the n ids that end at each position, found by a hash (model.md#n-grams)."""

    # lengths of the n-grams, one table each, from 1 to 16
    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    # rows of a table, at most 2^28. Tables of 4,096 rows and more are held with some further rows,
    # never used, so that chips can share them
    vocab: int = 500_002
    num_functions: int = 1  # hash functions, each with tables of its own, at most 11
    # `"normal"`, as published, or `"zeros"`: n-grams that training never saw then add nothing
    initial_rows: str = "normal"

    @property
    def num_tables(self) -> int:
        """Number of tables."""
        return len(self.sizes) * self.num_functions

    @property
    def rows(self) -> int:
        """Rows of a table in memory: a large one has unused rows, so that chips can share it."""
        if self.vocab < SHARED_TABLE:
            return self.vocab
        step = 1024 if self.vocab < 2**18 else 10_240  # 5 * 2^11: for 40 GPUs, for 2048 chips
        return -(-self.vocab // step) * step

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = positive(self, name) if self.sizes else not_negative(self, name)
        found += one_of(self, name, "initial_rows", INITIAL_ROWS)
        if not all(1 <= n <= 16 for n in self.sizes) or len(self.sizes) > 16:
            found.append(f"{name}.sizes={shown(self.sizes)} must be at most 16 numbers in 1..16")
        if self.vocab > 2**28 or self.num_functions > 11:
            found.append(
                f"{name} has vocab={self.vocab}, num_functions={self.num_functions}: at most 2**28 "
                "rows and 11 functions"
            )
        return found


NO_TABLES = HashConfig(sizes=())


@dataclass(frozen=True)
class EntropyModelConfig:
    """A small byte model whose entropies tell where patches start (model.md#entropy-model)."""

    # its stack; `window` is required
    transformer: TransformerConfig = TransformerConfig(rope_theta=10_000.0, window=512)
    vocab_size: int = VOCAB_SIZE  # ids it predicts; at least 260
    init: InitConfig = InitConfig()  # initial weights
    # `"float32"` or `"bfloat16"`, of activations; parameters are float32
    compute_dtype: str = "float32"
    # activations kept for the backward pass: `"none"` recomputes nothing, `"dots"` keeps the
    # results of linear layers and of attention, `"full"` keeps only the inputs of layers
    remat: str = "none"
    # kernel of self-attention: `"auto"` (by device, dtype and head width), `"tiles"` (anywhere),
    # `"cudnn"` and `"mosaic"` (GPUs from Hopper on), `"splash"` (TPUs); results are equal up to
    # rounding
    attention: str = "auto"
    # positions that a kernel of TPUs takes at once, a multiple of 128; None: 512, or 128 for rows
    # of at most 1,024
    attention_block: int | None = None

    # No settings here: of token models, and of byte latent transformers.
    hash, lora, diffusion_block = NO_TABLES, LoRAConfig(), 0

    @property
    def hash_width(self) -> int:
        """Width of the rows of hash n-gram tables."""
        return self.transformer.dim

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

    transformer: TransformerConfig = TransformerConfig()  # its stack
    # most ids that the tokenizer may have; it has fewer where there is little text. At least 260
    vocab_size: int = 4096
    # hash n-gram embeddings of ids, whose sizes count tokens; without sizes there are none
    hash: HashConfig = NO_TABLES
    # width of the rows of their tables; a matrix takes them to the width of the stack where that is
    # another one. None: that of the stack
    hash_dim: int | None = None

    @property
    def hash_width(self) -> int:
        """Width of the rows of hash n-gram tables."""
        return self.hash_dim or self.transformer.dim

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = self.transformer.problems(f"{name}.transformer")
        found += self.hash.problems(f"{name}.hash")
        found += positive(self, name, "hash_dim", most=MOST_WIDTH)
        return found + _common_model_problems(self, name)


@dataclass(frozen=True)
class BLTConfig:
    """A byte latent transformer (model.md). The defaults are a toy."""

    # bytes to patches; `window` is required
    local_encoder: TransformerConfig = TransformerConfig(window=512)
    # the large stack over patches; `window` stays None
    global_transformer: TransformerConfig = TransformerConfig(dim=128)
    # patches to next bytes; `window` is required, `dim` equals that of the local encoder
    local_decoder: TransformerConfig = TransformerConfig(window=512)
    cross_attention: CrossAttentionConfig = CrossAttentionConfig()  # between bytes and patches
    hash: HashConfig = HashConfig()  # hash n-gram embeddings
    # how the bytes of a patch become its first vector: `"max"`, `"min"` or `"mean"`
    pooling: str = "max"
    # project patches for the decoder also where widths are equal, as Hugging Face does
    always_project: bool = False
    # the decoder starts from a linear layer of the encoder's byte states that is zero at first, so
    # that it has to read patches from the start (H-Net); otherwise from these states, as published
    skip_projection: bool = False
    # bytes of a block that the decoder can fill in at once, from a patch start on (BLT-D, see
    # `blt_training.diffusion`); 0: it predicts the next byte alone, as published
    diffusion_block: int = 0
    lora: LoRAConfig = LoRAConfig()  # adapters, which then learn alone
    vocab_size: int = VOCAB_SIZE  # ids it predicts: 4 special ids and 256 bytes; at least 260
    init: InitConfig = InitConfig()  # initial weights
    # `"float32"` or `"bfloat16"`, of activations; parameters are float32
    compute_dtype: str = "float32"
    # activations kept for the backward pass: `"none"` recomputes nothing, `"dots"` keeps the
    # results of linear layers and of attention, `"full"` keeps only the inputs of layers
    remat: str = "none"
    # kernel of self-attention: `"auto"` (by device, dtype and head width), `"tiles"` (anywhere),
    # `"cudnn"` and `"mosaic"` (GPUs from Hopper on), `"splash"` (TPUs); results are equal up to
    # rounding
    attention: str = "auto"
    # positions that a kernel of TPUs takes at once, a multiple of 128; None: 512, or 128 for rows
    # of at most 1,024
    attention_block: int | None = None

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
    def hash_width(self) -> int:
        """Width of the rows of hash n-gram tables."""
        return self.local_encoder.dim

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
        found += not_negative(self, name, "diffusion_block", most=MOST_FILLED)
        found += self.hash.problems(f"{name}.hash") + self.lora.problems(f"{name}.lora")
        return found + _common_model_problems(self, name)


def _common_model_problems(config, name: str) -> list[str]:
    init = f"{name}.init"
    found = one_of(config, name, "compute_dtype", DTYPES)
    found += one_of(config, name, "remat", REMAT_MODES)
    found += one_of(config, name, "attention", ATTENTION_KERNELS)
    found += positive(config, name, "attention_block", most=MOST_BLOCK)
    if not found and (config.attention_block or 0) % 128:
        found.append(
            f"{name}.attention_block={config.attention_block} must be a multiple of 128, the lanes "
            "of a TPU's registers"
        )
    found += one_of(config.init, init, "std_factor", INIT_FACTORS)
    found += positive(config.init, init)
    if not VOCAB_SIZE <= config.vocab_size <= MOST_WIDTH:
        found.append(
            f"{name}.vocab_size={config.vocab_size} must be from the {VOCAB_SIZE} ids of bytes and "
            f"special tokens to {MOST_WIDTH}"
        )
    return found

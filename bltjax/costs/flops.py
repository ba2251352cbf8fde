"""Counts FLOPs per byte and parameters, from a config and from shapes alone.

FLOPs are those of the matrix products in a forward pass, term by term: two for a multiply-add, none
for look-ups, norms, softmax, rotary embedding and pooling.
"""

from bltjax.config import BLTConfig, EntropyModelConfig, TokenModelConfig, TransformerConfig
from bltjax.config.model import HASH_TABLES

TRAINING_FACTOR = 3  # forward and backward, in forward passes; rematerialisation is not useful work


def flops_per_byte(
    config: BLTConfig | EntropyModelConfig,
    context_bytes: float,
    patch_bytes: float = 1.0,
    blocks_per_byte: float = 0.0,
) -> dict[str, float]:
    """Returns the forward FLOPs per byte of each part of a model, and their `total`.

    context_bytes: bytes of a row, taken as one document, so an upper bound where rows are packed.
    patch_bytes: mean bytes of a patch or a token; the entropy model ignores it. blocks_per_byte:
    blocks that the decoder reads in training beside each byte, which are a part `blocks`. Attention
    counts the pairs that the mask lets through, not the masked ones that a kernel may compute
    besides.
    """
    if isinstance(config, EntropyModelConfig):
        stack = config.transformer
        positions = 1 / patch_bytes if isinstance(config, TokenModelConfig) else 1.0  # per byte
        keys = mean_visible(context_bytes * positions, stack.window)
        terms = dict(
            transformer=positions * stack_flops(stack, keys),
            output=positions * _matrix(stack.dim, config.vocab_size),
        )
        if config.hash.sizes and config.hash_width != stack.dim:
            terms["hash_projection"] = positions * _matrix(config.hash_width, stack.dim)
        return _with_total(**terms)
    encoder, decoder = config.local_encoder, config.local_decoder
    trunk, cross = config.global_transformer, config.cross_attention
    patches, slots = 1 / patch_bytes, cross.k / patch_bytes  # per byte
    encoder_cross_layers = _num_cross_layers(cross.encoder, cross.all_layers_encoder, encoder)
    decoder_cross_layers = _num_cross_layers(cross.decoder, cross.all_layers_decoder, decoder)
    blocks = {}
    if blocks_per_byte:
        rows = blocks_per_byte * config.diffusion_block
        keys = mean_visible(context_bytes, decoder.window) + config.diffusion_block
        read = _cross_attention(
            decoder.dim,
            cross.decoder_heads,
            decoder_cross_layers,
            queries=1,
            keys=0,
            pairs=cross.k * (cross.window_decoder or 1),
        )
        output = _matrix(decoder.dim, config.vocab_size)
        blocks["blocks"] = rows * (stack_flops(decoder, keys) + read + output)
    return _with_total(
        **blocks,
        encoder=stack_flops(encoder, mean_visible(context_bytes, encoder.window)),
        encoder_cross=_cross_attention(
            encoder.dim,
            cross.encoder_heads,
            encoder_cross_layers,
            queries=slots,
            keys=1,
            pairs=cross.k * (cross.window_encoder or 1),
        ),
        # "global" is a keyword.
        **{"global": patches * stack_flops(trunk, mean_visible(context_bytes * patches))},
        decoder=stack_flops(decoder, mean_visible(context_bytes, decoder.window)),
        decoder_cross=_cross_attention(
            decoder.dim,
            cross.decoder_heads,
            decoder_cross_layers,
            queries=1,
            keys=slots,
            pairs=cross.k * (cross.window_decoder or 1),
        ),
        output=_matrix(decoder.dim, config.vocab_size),
        projections=patches * _projections(config)
        + config.skip_projection * _matrix(encoder.dim, decoder.dim),
    )


def stack_flops(stack: TransformerConfig, keys: float) -> float:
    """Returns the FLOPs of a position in a stack whose queries see `keys` positions."""
    q_dim, kv_dim = (n * stack.head_width for n in (stack.num_heads, stack.kv_heads))
    attention = 2 * _matrix(stack.dim, q_dim) + 2 * _matrix(stack.dim, kv_dim) + 4 * q_dim * keys
    return stack.num_layers * (attention + 3 * _matrix(stack.dim, stack.ffn_dim))


def mean_visible(positions: float, window: int | None = None) -> float:
    """Returns the mean number of keys that a causal query in a row sees, its own included."""
    window = positions if window is None else min(window, positions)
    return window - window * (window - 1) / (2 * positions)


def parameter_report(
    config: BLTConfig | EntropyModelConfig, abstract_params: dict
) -> dict[str, int]:
    """Counts the parameters of each top-level part, their `total`, and `without_hash_tables`.

    abstract_params: nested dict whose leaves have a `size`: arrays or ShapeDtypeStructs. Hash
    tables hold most of a BLT's parameters and cost no FLOPs, hence two totals (model.md#sizes).
    Rows of the tables beyond the configured ones are not counted, since no hash leads to them.
    """
    counts = {name: _size(part) for name, part in abstract_params.items()}
    hash_tables = counts.pop(HASH_TABLES, 0)
    dense = sum(counts.values())
    if hash_tables:
        hash_tables = hash_tables // config.hash.rows * config.hash.vocab
        counts["hash_tables"] = hash_tables
    return counts | {"total": dense + hash_tables, "without_hash_tables": dense}


def format_report(report: dict[str, int]) -> str:
    """Formats a `parameter_report` as one line of text."""
    *parts, (_, total), (_, dense) = report.items()
    without = f", {dense:,} without hash tables" if dense != total else ""
    listed = ", ".join(f"{name} {count:,}" for name, count in parts)
    return f"{total:,} parameters{without} ({listed})"


def _matrix(rows: int, columns: int) -> int:
    """Returns the FLOPs of one vector times a matrix."""
    return 2 * rows * columns


def _num_cross_layers(present: bool, everywhere: bool, stack: TransformerConfig) -> int:
    return present * (stack.num_layers if everywhere else 1)


def _cross_attention(
    dim: int, heads: tuple[int, int], num_layers: int, queries: float, keys: float, pairs: float
) -> float:
    """Returns the FLOPs per byte of cross-attention; queries, keys and pairs are per byte too."""
    kv_dim = dim * heads[1] // heads[0]
    matrices = 2 * _matrix(dim, dim) * queries + 2 * _matrix(dim, kv_dim) * keys
    return num_layers * (matrices + 4 * dim * pairs)


def _projections(config: BLTConfig) -> int:
    """Returns the FLOPs per patch of the projections between stacks (model.md#forward-pass)."""
    local, trunk = config.local_encoder.dim, config.global_transformer.dim
    cross, total = config.cross_attention, 0
    if cross.encoder:
        total += _matrix(local, cross.k * local)  # pooled bytes to the first queries
    if config.patch_width != trunk:
        total += _matrix(config.patch_width, trunk)
    if config.has_decoder_projection:
        total += _matrix(trunk, config.read_width)
    return total


def _with_total(**terms) -> dict[str, float]:
    return terms | {"total": sum(terms.values())}


def _size(tree) -> int:
    return sum(map(_size, tree.values())) if isinstance(tree, dict) else int(tree.size)

"""Counts FLOPs per byte and parameters, from a config and from shapes alone.

`flops_per_byte` counts the matrix products that a configured model needs, term by term.
`paper_flops_per_byte` is the paper's own estimate (eq. 13-17), to compare with its figures. Both
count a forward pass, with two FLOPs for a multiply-add and none for look-ups, norms, softmax,
rotary embedding and pooling. `run_flops` counts a whole run, the entropy model included.
"""

from typing import NamedTuple

from bltjax.config import (
    BLTConfig,
    EntropyModelConfig,
    RunConfig,
    TokenModelConfig,
    TransformerConfig,
)
from bltjax.config.model import HASH_TABLES
from bltjax.patching.boundaries import needs_entropies

TRAINING_FACTOR = 3  # forward and backward, in forward passes; rematerialisation is not useful work
PAPER_VOCAB = 256  # the paper's output layer predicts bytes only


def flops_per_byte(
    config: BLTConfig | EntropyModelConfig, context_bytes: float, patch_bytes: float = 1.0
) -> dict[str, float]:
    """Returns the forward FLOPs per byte of each part of a model, and their `total`.

    context_bytes: bytes of a row, taken as one document, so an upper bound where rows are packed.
    patch_bytes: mean bytes of a patch or a token; the entropy model ignores it. Attention counts
    the pairs that the mask lets through, not the masked ones that a kernel may compute besides.
    """
    if isinstance(config, EntropyModelConfig):
        stack, positions = config.transformer, _positions_per_byte(config, patch_bytes)
        keys = mean_visible(context_bytes * positions, stack.window)
        return _with_total(
            transformer=positions * stack_flops(stack, keys),
            output=positions * _matrix(stack.dim, config.vocab_size),
        )
    encoder, decoder = config.local_encoder, config.local_decoder
    trunk, cross = config.global_transformer, config.cross_attention
    patches, slots = 1 / patch_bytes, cross.k / patch_bytes  # per byte
    encoder_cross_layers = _num_cross_layers(cross.encoder, cross.all_layers_encoder, encoder)
    decoder_cross_layers = _num_cross_layers(cross.decoder, cross.all_layers_decoder, decoder)
    return _with_total(
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
        projections=patches * _projections(config),
    )


def stack_flops(stack: TransformerConfig, keys: float) -> float:
    """Returns the FLOPs of a position in a stack whose queries see `keys` positions (spec 5.2)."""
    q_dim, kv_dim = (n * stack.head_width for n in (stack.num_heads, stack.kv_heads))
    attention = 2 * _matrix(stack.dim, q_dim) + 2 * _matrix(stack.dim, kv_dim) + 4 * q_dim * keys
    return stack.num_layers * (attention + 3 * _matrix(stack.dim, stack.ffn_dim))


def mean_visible(positions: float, window: int | None = None) -> float:
    """Returns the mean number of keys that a causal query in a row sees, its own included."""
    window = positions if window is None else min(window, positions)
    return window - window * (window - 1) / (2 * positions)


def paper_flops_per_byte(
    config: BLTConfig | EntropyModelConfig, context_bytes: float, patch_bytes: float = 1.0
) -> float:
    """Returns the forward FLOPs per byte as the paper estimates them (eq. 13-17, Table 11).

    The paper takes a feed-forward layer for two matrices of width 4h, a window for half full,
    cross-attention for present in every local layer, and has no projections between stacks.
    Cross-attention that the config switches off is left out.
    """
    if isinstance(config, EntropyModelConfig):
        stack, positions = config.transformer, _positions_per_byte(config, patch_bytes)
        vocab = config.vocab_size if isinstance(config, TokenModelConfig) else PAPER_VOCAB
        context = stack.window or context_bytes * positions
        return positions * paper_transformer_flops(stack.dim, stack.num_layers, context, vocab)
    encoder, decoder = config.local_encoder, config.local_decoder
    trunk, cross = config.global_transformer, config.cross_attention
    n, k = patch_bytes, cross.k
    total = paper_transformer_flops(trunk.dim, trunk.num_layers, context_bytes / n) / n
    total += paper_transformer_flops(encoder.dim, encoder.num_layers, encoder.window)
    total += paper_transformer_flops(decoder.dim, decoder.num_layers, decoder.window, PAPER_VOCAB)
    if cross.encoder:
        total += _paper_cross_attention(encoder.dim, encoder.num_layers, n, n / k) * k / n
    if cross.decoder:
        total += _paper_cross_attention(decoder.dim, decoder.num_layers, k, k / n)
    return total


def paper_transformer_flops(dim: int, num_layers: int, context: float, vocab: int = 0) -> float:
    """Returns the FLOPs per position of a causal transformer (Table 11); vocab: of its output."""
    feed_forward = 16 * num_layers * dim**2
    return (
        _paper_attention(dim, num_layers, context)
        + _paper_qkvo(dim, num_layers, 1)
        + feed_forward
        + _matrix(dim, vocab)
    )


class RunFlops(NamedTuple):
    """FLOPs of a run."""

    model: dict[str, float]  # forward pass, per byte, by part, and their total
    paper: float  # the paper's estimate of that total
    entropy_model: float  # its forward pass, per byte; 0 for rules without entropies
    num_bytes: float  # bytes that the model is trained on, padding included
    entropy_training: float  # all training of the entropy model; 0 for rules without entropies

    @property
    def inference(self) -> float:
        """Forward pass per byte, with the entropy model."""
        return self.model["total"] + self.entropy_model

    @property
    def training(self) -> float:
        """Training of the model on all bytes, without the entropy model, as the paper counts."""
        return TRAINING_FACTOR * self.model["total"] * self.num_bytes

    @property
    def patching(self) -> float:
        """Entropies of all training bytes, computed once, in the step or before it."""
        return self.entropy_model * self.num_bytes


def run_flops(config: RunConfig, patch_bytes: float) -> RunFlops:
    """Counts the FLOPs of the BLT of a run, or of its token model, else of its entropy model.

    patch_bytes: mean bytes of a patch or of a token. Recomputation (remat) is not useful work, and
    is not counted.
    """
    stage = next((s for s in ("blt", "token_model") if s in config.stages), "entropy_model")
    model, training = config.trained(stage)
    row_bytes = training.row_bytes or training.row_patches * patch_bytes
    if stage == "token_model":
        row_bytes *= patch_bytes  # they were tokens
    entropy, entropy_training = 0.0, 0.0
    if stage == "blt" and needs_entropies(config.patching):
        rows = config.entropy_training
        entropy = flops_per_byte(config.entropy_model, rows.row_bytes)["total"]
        trained_on = rows.steps * rows.batch_size * rows.row_bytes
        entropy_training = TRAINING_FACTOR * entropy * trained_on
    return RunFlops(
        model=flops_per_byte(model, row_bytes, patch_bytes),
        paper=paper_flops_per_byte(model, row_bytes, patch_bytes),
        entropy_model=entropy,
        num_bytes=training.steps * training.batch_size * row_bytes,
        entropy_training=entropy_training,
    )


def parameter_report(
    config: BLTConfig | EntropyModelConfig, abstract_params: dict
) -> dict[str, int]:
    """Counts the parameters of each top-level part, their `total`, and `without_hash_tables`.

    abstract_params: nested dict whose leaves have a `size`: arrays or ShapeDtypeStructs. Hash
    tables hold most of a BLT's parameters and cost no FLOPs, hence two totals (spec 5.1). Rows of
    the tables beyond the configured ones are not counted, since no hash leads to them.
    """
    counts = {name: _size(part) for name, part in abstract_params.items()}
    hash_tables = counts.pop(HASH_TABLES, 0)
    if hash_tables:
        hash_tables = hash_tables // config.hash.rows * config.hash.vocab
    parts = counts | ({"hash_tables": hash_tables} if hash_tables else {})
    dense = sum(counts.values())
    return parts | {"total": dense + hash_tables, "without_hash_tables": dense}


def format_report(report: dict[str, int]) -> str:
    """Formats a `parameter_report` as one line of text."""
    parts = ", ".join(
        f"{name} {count:,}"
        for name, count in report.items()
        if name not in ("total", "without_hash_tables")
    )
    dense = ""
    if report["total"] != report["without_hash_tables"]:
        dense = f", {report['without_hash_tables']:,} without hash tables"
    return f"{report['total']:,} parameters{dense} ({parts})"


def _matrix(rows: int, columns: int) -> int:
    """Returns the FLOPs of one vector times a matrix."""
    return 2 * rows * columns


def _positions_per_byte(config: EntropyModelConfig, token_bytes: float) -> float:
    return 1 / token_bytes if isinstance(config, TokenModelConfig) else 1.0


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
    """Returns the FLOPs per patch of the projections between stacks (spec 5.6-5.8)."""
    local, trunk = config.local_encoder.dim, config.global_transformer.dim
    cross, total = config.cross_attention, 0
    if cross.encoder:  # pooled bytes to the first queries
        total += _matrix(local, cross.k * local)
    if config.patch_width != trunk:
        total += _matrix(config.patch_width, trunk)
    if config.has_decoder_projection:
        total += _matrix(trunk, config.read_width)
    return total


def _paper_attention(dim, num_layers, context):
    return 4 * num_layers * dim * (context + 1) / 2


def _paper_qkvo(dim, num_layers, ratio):
    """Returns the FLOPs of the four projections of attention; ratio: keys per query."""
    return (2 * ratio + 2) * 2 * num_layers * dim**2


def _paper_cross_attention(dim, num_layers, context, ratio):
    return _paper_attention(dim, num_layers, context) + _paper_qkvo(dim, num_layers, ratio)


def _with_total(**terms) -> dict[str, float]:
    return terms | {"total": sum(terms.values())}


def _size(tree) -> int:
    return sum(map(_size, tree.values())) if isinstance(tree, dict) else int(tree.size)

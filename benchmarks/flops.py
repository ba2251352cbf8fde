"""FLOPs per byte of configs, beside the paper's and a compiler's: `python benchmarks/flops.py`.

Three tables and, last, a JSON line:

    paper     inference as the paper's equations 13-17 give it for the models of its table 2, beside
              what that table says; and what our models of those shapes need
    configs   forward FLOPs of each config by part, and of a byte of inference and of training with
              the entropy model, whose own training is listed apart
    compiled  with --compile=NAMES the forward passes of these configs as they are compiled, for
              this machine or for --topology: attention computes pairs that it masks, so that
              somewhat more is compiled than a model needs
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from bltjax import cli
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    MeshConfig,
    RunConfig,
    TokenModelConfig,
    TransformerConfig,
    read_config,
)
from bltjax.costs import memory_plan
from bltjax.costs.flops import TRAINING_FACTOR, flops_per_byte
from bltjax.patching.boundaries import needs_entropies

CONFIGS = Path(__file__).parents[1] / "configs"
CONTEXT = 8192  # bytes, of the paper's scaling experiments
PAPER_VOCAB = 256  # the paper's output layer predicts bytes only
LLAMA2_BYTES_PER_TOKEN, LLAMA2_VOCABULARY = 3.7, 32_000


def llama(dim: int, num_layers: int) -> TokenModelConfig:
    return TokenModelConfig(
        transformer=TransformerConfig(dim, num_layers, dim // 64), vocab_size=LLAMA2_VOCABULARY
    )


def blt(local: int, encoder: int, decoder: int, trunk: int, layers: int, k: int) -> BLTConfig:
    """Cross-attention in every local layer, as the paper counts it; heads cost nothing."""
    return BLTConfig(
        local_encoder=TransformerConfig(local, encoder, local // 64, window=512),
        global_transformer=TransformerConfig(trunk, layers, trunk // 32),
        local_decoder=TransformerConfig(local, decoder, local // 64, window=512),
        cross_attention=CrossAttentionConfig(
            k=k, num_heads=local // 64, all_layers_encoder=True, all_layers_decoder=True
        ),
    )


# name -> (model, bytes of a patch or a token, FLOPs per byte that the paper says). Of these BLTs it
# gives only the sizes: the shapes are ours, of so many parameters in transformer layers, with local
# models like those of its table 10, and three encoder layers where patches have 8 bytes.
TABLE_2 = {
    "Llama 2 470M": (llama(1280, 24), LLAMA2_BYTES_PER_TOKEN, 3.1e8),
    "BLT 610M": (blt(768, 1, 5, 1408, 24, 2), 6, 3.1e8),
    "BLT 760M": (blt(640, 3, 7, 1536, 25, 2), 8, 3.1e8),
    "Llama 2 3.6B": (llama(3072, 32), LLAMA2_BYTES_PER_TOKEN, 2.1e9),
    "BLT 5.2B": (blt(1024, 1, 9, 3456, 36, 3), 6, 2.1e9),
    "BLT 6.6B": (blt(1280, 3, 6, 4096, 32, 4), 8, 2.1e9),
}


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


def paper_flops_per_byte(
    config: BLTConfig | EntropyModelConfig, context_bytes: float, patch_bytes: float = 1.0
) -> float:
    """Returns the forward FLOPs per byte as the paper estimates them (eq. 13-17, Table 11).

    The paper takes a feed-forward layer for two matrices of width 4h, a window for half full,
    cross-attention for present in every local layer, and has no projections between stacks.
    Cross-attention that the config switches off is left out.
    """
    if isinstance(config, EntropyModelConfig):
        stack, positions, vocab = config.transformer, 1.0, PAPER_VOCAB
        if isinstance(config, TokenModelConfig):
            positions, vocab = 1 / patch_bytes, config.vocab_size
        context = stack.window or context_bytes * positions
        return positions * paper_transformer_flops(stack.dim, stack.num_layers, context, vocab)
    encoder, decoder = config.local_encoder, config.local_decoder
    trunk, cross = config.global_transformer, config.cross_attention
    n, k = patch_bytes, cross.k
    total = paper_transformer_flops(trunk.dim, trunk.num_layers, context_bytes / n) / n
    total += paper_transformer_flops(encoder.dim, encoder.num_layers, encoder.window)
    total += paper_transformer_flops(decoder.dim, decoder.num_layers, decoder.window, PAPER_VOCAB)
    if cross.encoder:
        total += paper_attention_flops(encoder.dim, encoder.num_layers, n, n / k) * k / n
    if cross.decoder:
        total += paper_attention_flops(decoder.dim, decoder.num_layers, k, k / n)
    return total


def paper_transformer_flops(dim: int, num_layers: int, context: float, vocab: int = 0) -> float:
    """Returns the FLOPs per position of a causal transformer (Table 11); vocab: of its output."""
    feed_forward = 16 * num_layers * dim**2
    return paper_attention_flops(dim, num_layers, context, 1) + feed_forward + 2 * dim * vocab


def paper_attention_flops(dim: int, num_layers: int, context: float, ratio: float) -> float:
    """Returns the FLOPs of attention and its four projections; ratio: keys per query."""
    scores = 4 * num_layers * dim * (context + 1) / 2
    return scores + (2 * ratio + 2) * 2 * num_layers * dim**2


def paper_rows() -> list[dict]:
    return [
        dict(
            model=name,
            patch_bytes=patch_bytes,
            layer_parameters=layer_parameters(model),
            paper=stated,
            equations=paper_flops_per_byte(model, CONTEXT, patch_bytes),
            ours=flops_per_byte(model, CONTEXT, patch_bytes)["total"],
        )
        for name, (model, patch_bytes, stated) in TABLE_2.items()
    ]


def layer_parameters(model) -> int:
    """As the paper counts a model's size: 12 dim^2 in each transformer layer."""
    names = "local_encoder", "global_transformer", "local_decoder", "transformer"
    stacks = [getattr(model, name) for name in names if hasattr(model, name)]
    return sum(12 * stack.num_layers * stack.dim**2 for stack in stacks)


def config_row(name: str) -> dict:
    """The account of a config of configs/."""
    config = read_config(CONFIGS / f"{name}.py")
    patch_bytes = memory_plan.mean_patch_bytes(config.patching)
    found = run_flops(config, patch_bytes)
    return dict(
        config=name,
        patch_bytes=patch_bytes,
        **found.model,
        paper=found.paper,
        entropy_model=found.entropy_model,
        inference=found.inference,
        training=TRAINING_FACTOR * found.model["total"] + found.entropy_model,
        bytes=found.num_bytes,
        run=found.training,
        entropy_training=found.entropy_training,
    )


def compiled_row(name: str, stage: str, chips: str | None) -> dict:
    """FLOPs of the compiled forward pass of one row on each device, and those that are needed.

    On TPUs attention is a kernel; elsewhere it is a loop that a compiled program counts as one
    round (see bltjax/costs/hlo_cost.py), so that the others are added.
    """
    import jax  # late: for a topology it takes variables that are set before

    from bltjax import sharding
    from bltjax.costs import hlo_cost, jaxpr_flops, topology
    from bltjax.model import functional
    from bltjax.patching.buffers import buffers_from_lengths

    config = read_config(CONFIGS / f"{name}.py")
    devices = jax.devices()[:1]
    if chips:
        devices = topology.topology_devices(chips)[1]
    # A row a device, its parameters shared out.
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=len(devices)), devices)
    training = dict(batch_size=len(devices), accumulation_steps=1)
    setting = "blt_training" if stage == "blt" else "entropy_training"
    given = dataclasses.replace(getattr(config, setting), **training)
    config = dataclasses.replace(config, **{setting: given})
    model = getattr(config, stage)

    def forward(params, tokens, *lengths):
        patches = [buffers_from_lengths(x, tokens.shape[1]) for x in lengths]
        return functional.apply(model, params, tokens, *patches)

    with jax.set_mesh(mesh):
        batch = sharding.concrete(memory_plan.abstract_batch(config, stage))
        inputs = [batch[name] for name in ("tokens", "patch_lengths") if name in batch]
        params = sharding.concrete(functional.abstract_params(model))
        program = jax.jit(forward).trace(params, *inputs)
        text = program.lower().compile().as_text()
    cost = hlo_cost.read_cost(text, jaxpr_flops.Work(program.jaxpr).kernels)
    row_bytes = batch["tokens"].shape[1]
    num_patches = batch["patch_lengths"].shape[1] if stage == "blt" else row_bytes
    needed = flops_per_byte(model, row_bytes, row_bytes / num_patches)["total"]
    found = cost.flops + cost.kernel_flops
    if not chips:
        found += flops_of_later_rounds(model, row_bytes, num_patches)
    return dict(
        config=name,
        model=stage,
        compiled_for=chips or devices[0].device_kind,
        row_bytes=row_bytes,
        needed=needed,
        compiled=found / row_bytes,
        ratio=found / row_bytes / needed,
    )


def flops_of_later_rounds(model, row_bytes: int, num_patches: int) -> int:
    """Of a row's attention in tiles: two products of each pair in every round but the first.

    The first is of every group of tiles, since these are a loop of known length.
    """
    from bltjax.ops.kernels import tiled_attention

    if isinstance(model, BLTConfig):
        stacks = [(model.local_encoder, row_bytes), (model.local_decoder, row_bytes)]
        stacks += [(model.global_transformer, num_patches)]
    else:
        stacks = [(model.transformer, row_bytes)]
    total = 0
    for stack, length in stacks:
        tiles = tiled_attention.choose_tiling(1, length, stack.num_heads, stack.window)
        later = tiles.rounds - tiles.num_tiles // tiles.group
        total += stack.num_layers * 4 * stack.dim * tiles.pairs_of_a_round * later
    return total


def print_rows(rows: list[dict]):
    """Numbers under the names of all rows' values."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        return format(value, ",.4g" if abs(value) < 1e4 else ".4g")

    lines = [columns] + [[cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(x.rjust(width) for x, width in zip(line, widths, strict=True)))
    print(flush=True)


def main(argv):
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}: only flags are taken")
    chosen = flags.FLAGS
    if chosen.topology:
        from bltjax.commands.aot import ENVIRONMENT

        os.environ.update(ENVIRONMENT)  # before JAX is imported
    for name in [*chosen.configs, *chosen.compile]:
        if not (CONFIGS / f"{name}.py").exists():
            cli.fail(f"there is no configs/{name}.py: give names of files there")
    result = dict(paper=paper_rows(), configs=[config_row(name) for name in chosen.configs])
    print_rows(result["paper"])
    print_rows(result["configs"])
    result["compiled"] = [
        compiled_row(name, stage, chosen.topology)
        for name in chosen.compile
        for stage in ("entropy_model", "blt")
    ]
    if result["compiled"]:
        print_rows(result["compiled"])
    print(json.dumps(dict(benchmark="flops") | result))


if __name__ == "__main__":
    every = "quickstart", "laptop", "entropy_100m", "blt_400m", "blt_1b", "blt_2b", "blt_4b"
    flags.DEFINE_list("configs", [*every, "blt_7b", "blt_8b"], "Names of files in configs/.")
    flags.DEFINE_list("compile", [], "Which of them to compile too.")
    flags.DEFINE_string(
        "topology", None, "For which chips, such as v5e:2x2; default: for this one."
    )
    app.run(main, flags_parser=cli.parse)

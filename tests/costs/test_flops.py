"""FLOPs against the paper's figures and against the traced model; published parameter counts."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import flops as benchmark
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    PatchingConfig,
    RunConfig,
    TokenModelConfig,
    TrainingConfig,
    TransformerConfig,
    read_config,
)
from bltjax.costs import flops
from bltjax.costs.training_time import work_of_stages
from bltjax.model import functional, parameters, transformer
from bltjax.model.block_rows import Blocks
from bltjax.patching.buffers import buffers_from_lengths
from tests import processes


def paper_model(encoder, trunk, decoder, k, cross_heads):
    """A BLTConfig from (dim, layers, heads) of the three stacks."""
    return BLTConfig(
        TransformerConfig(*encoder, window=512),
        TransformerConfig(*trunk),
        TransformerConfig(*decoder, window=512),
        CrossAttentionConfig(k=k, num_heads=cross_heads),
    )


BLT_400M = paper_model((768, 1, 12), (1280, 24, 10), (768, 7, 12), 2, 12)
BLT_1B = paper_model((1024, 1, 16), (2048, 25, 16), (1024, 9, 16), 2, 16)
BLT_7B = paper_model((1280, 1, 20), (4096, 32, 32), (1280, 6, 20), 4, 20)
ENTROPY = EntropyModelConfig(TransformerConfig(768, 14, 12, window=512))


@pytest.mark.parametrize("row", benchmark.paper_rows(), ids=lambda row: row["model"])
def test_paper_table_2(row):
    """Inference FLOPs per byte of all its kinds of rows, BPE and BLT, from configs."""
    assert float(f"{row['equations']:.1e}") == row["paper"]
    assert row["ours"] == pytest.approx(row["equations"], rel=0.04)
    size, unit = float(row["model"].split()[-1][:-1]), row["model"][-1]
    assert row["layer_parameters"] == pytest.approx(size * {"M": 1e6, "B": 1e9}[unit], rel=0.02)


@pytest.mark.parametrize("stage", ["entropy_model", "blt"])
def test_compiled_forward_of_the_quickstart(stage):
    """On CPUs tiles compute some pairs that a window masks."""
    row = benchmark.compiled_row("quickstart", stage, None)
    assert 1 <= row["ratio"] < 1.1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[tpu]'")
def test_compiled_forward_of_the_1b_model_on_tpus():
    """As a command: libtpu reads variables that are set before JAX is imported."""
    done = run_benchmark("--configs=blt_1b", "--compile=blt_1b", "--topology=v5e:2x2")
    for row in done["compiled"]:
        assert 1 <= row["ratio"] < 1.1


def run_benchmark(*arguments):
    command = [sys.executable, str(processes.ROOT / "benchmarks" / "flops.py"), *arguments]
    environ = dict(processes.environment(), PYTHONPATH=str(processes.ROOT))
    done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_benchmark_prints_what_it_found():
    result = run_benchmark("--configs=quickstart,blt_1b")
    assert [row["config"] for row in result["configs"]] == ["quickstart", "blt_1b"]
    assert len(result["paper"]) == 6 and result["compiled"] == []
    one = result["configs"][1]
    assert one["training"] == 3 * one["total"] + one["entropy_model"]


def test_a_byte_of_a_token_model_is_its_share_of_a_token():
    stack = dataclasses.replace(ENCODER, window=None)
    of_bytes = EntropyModelConfig(dataclasses.replace(ENCODER, window=ROW), vocab_size=300)
    of_tokens = TokenModelConfig(stack, vocab_size=300)
    token = flops.flops_per_byte(of_bytes, ROW)
    # As many tokens of 4 bytes each.
    byte = flops.flops_per_byte(of_tokens, 4 * ROW, patch_bytes=4)
    assert {name: 4 * value for name, value in byte.items()} == pytest.approx(token)
    assert byte["output"] == 2 * 32 * 300 / 4
    assert benchmark.paper_flops_per_byte(of_tokens, 64, 4) == pytest.approx(
        benchmark.paper_transformer_flops(32, 2, 16, 300) / 4
    )


@pytest.mark.parametrize("rule", ["entropy", "space"])
def test_the_account_of_a_blt_lists_its_entropy_model_apart(rule):
    rows = TrainingConfig(steps=10, batch_size=2, row_bytes=ROW)
    entropy = EntropyModelConfig(ENCODER)
    config = RunConfig(
        blt=TINY,
        blt_training=rows,
        entropy_model=entropy,
        entropy_training=dataclasses.replace(rows, steps=5),
        patching=PatchingConfig(rule=rule),
    )
    found = benchmark.run_flops(config, PATCH)
    model = flops.flops_per_byte(TINY, ROW, PATCH)
    assert found.model == model and found.num_bytes == 10 * 2 * ROW
    assert found.training == 3 * model["total"] * found.num_bytes
    assert found.paper == benchmark.paper_flops_per_byte(TINY, ROW, PATCH)
    cost = flops.flops_per_byte(entropy, ROW)["total"] if rule == "entropy" else 0
    assert found.entropy_model == cost
    assert found.inference == model["total"] + cost
    assert found.patching == cost * found.num_bytes
    assert found.entropy_training == 3 * cost * 5 * 2 * ROW


def test_the_account_of_a_token_model_counts_bytes():
    rows = TrainingConfig(steps=10, batch_size=2, row_bytes=ROW)
    config = RunConfig(
        stages=("token_model",),
        token_model=TokenModelConfig(dataclasses.replace(ENCODER, window=None)),
        token_training=rows,
    )
    found = benchmark.run_flops(config, 3.5)
    assert found.num_bytes == 10 * 2 * ROW * 3.5
    assert found.model == flops.flops_per_byte(config.token_model, 3.5 * ROW, 3.5)
    assert found.entropy_model == found.entropy_training == found.patching == 0


@pytest.mark.parametrize(
    "config, expected",
    [
        (BLT_400M, (3.55e8, 2.91e8, 2.46e8)),
        (BLT_1B, (8.6e8, 7.1e8, 5.9e8)),
        (BLT_7B, (3.25e9, 2.49e9, 1.93e9)),
    ],
    ids=["400m", "1b", "8b"],
)
def test_paper_equations_without_cross_attention(config, expected):
    config = with_cross(config, encoder=False, decoder=False)
    found = [benchmark.paper_flops_per_byte(config, 8192, patch) for patch in (4.5, 6, 8)]
    assert found == pytest.approx(expected, rel=7e-3)


def test_paper_cross_attention_by_hand():
    """Eq. 13-17 with one layer of width 1 everywhere, k 2 and patches of 4 bytes."""
    one = TransformerConfig(1, 1, 1, window=1)
    config = BLTConfig(one, dataclasses.replace(one, window=None), one, CrossAttentionConfig(k=2))
    cross_encoder = (4 * 5 / 2 + (2 * 2 + 2) * 2) * 2 / 4
    cross_decoder = 4 * 3 / 2 + (2 * 0.5 + 2) * 2
    found = benchmark.paper_flops_per_byte(config, 64, 4)
    without = benchmark.paper_flops_per_byte(
        with_cross(config, encoder=False, decoder=False), 64, 4
    )
    assert found - without == cross_encoder + cross_decoder


@pytest.mark.parametrize(
    "config", [BLT_400M, BLT_1B, BLT_7B, ENTROPY], ids=["400m", "1b", "7b", "entropy"]
)
def test_the_paper_estimates_the_real_architecture(config):
    """It leaves out half a window and some projections, nothing that matters."""
    real = flops.flops_per_byte(config, 8192, 4.5)["total"]
    assert benchmark.paper_flops_per_byte(config, 8192, 4.5) == pytest.approx(real, rel=0.05)


def test_mean_visible_counts_a_mask():
    for window in (1, 3, 7, 20, None):
        pairs = sum(min(t + 1, window or 7) for t in range(7))
        assert flops.mean_visible(7, window) == pytest.approx(pairs / 7)


ROW, PATCH, BATCH = 64, 4, 2
ENCODER = TransformerConfig(32, 2, 4, window=16, ffn_multiple_of=16)
TRUNK = TransformerConfig(48, 3, 4, ffn_multiple_of=16)
DECODER = dataclasses.replace(ENCODER, num_layers=3, num_heads=2)
TINY = BLTConfig(
    ENCODER, TRUNK, DECODER, CrossAttentionConfig(k=2, num_heads=4), HashConfig((3,), 11)
)


def with_cross(config, **changes):
    return dataclasses.replace(
        config, cross_attention=dataclasses.replace(config.cross_attention, **changes)
    )


@pytest.fixture
def dense_attention(monkeypatch):
    """Self-attention as two products a head, and norms without any: what the products are of."""

    def attention_of_rows(*_):
        return jax.nn.dot_product_attention

    monkeypatch.setattr(transformer, "attention_of_rows", attention_of_rows)
    monkeypatch.setattr(parameters, "rms_norm", lambda x, weight, eps: x * weight[None, None])


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        with_cross(TINY, all_layers_encoder=True, all_layers_decoder=False),
        with_cross(TINY, window_encoder=3, window_decoder=2),
        with_cross(TINY, decoder=False),
        with_cross(TINY, encoder=False, decoder=False),
        dataclasses.replace(
            TINY, global_transformer=dataclasses.replace(TRUNK, dim=64), remat="full"
        ),
        dataclasses.replace(  # one width everywhere: no projections but the encoder's
            with_cross(TINY, k=1), global_transformer=dataclasses.replace(TRUNK, dim=32)
        ),
        dataclasses.replace(
            TINY,
            global_transformer=TransformerConfig(
                48, 2, 4, num_kv_heads=2, head_dim=16, ffn_dim_multiplier=1.3, ffn_multiple_of=8
            ),
        ),
        EntropyModelConfig(ENCODER),
        EntropyModelConfig(dataclasses.replace(ENCODER, window=ROW)),
    ],
    ids=[
        "default",
        "layers",
        "windows",
        "encoder_only",
        "no_cross",
        "no_in_projection",
        "one_width",
        "grouped",
        "entropy",
        "entropy_one_block",
    ],
)
def test_every_matrix_product_of_the_traced_model_is_counted(config, dense_attention):
    found = dot_flops(trace(config)) / (BATCH * ROW)
    terms = flops.flops_per_byte(config, ROW, PATCH)
    assert terms["total"] == pytest.approx(sum(terms.values()) - terms["total"])
    assert found == pytest.approx(terms["total"] + masked_flops(config) - sums_flops(config))


@pytest.mark.parametrize(
    "config",
    [TINY, with_cross(TINY, window_decoder=2, all_layers_decoder=False)],
    ids=["default", "windows"],
)
def test_every_matrix_product_of_blocks_is_counted(config, dense_attention):
    config, number = dataclasses.replace(config, diffusion_block=4), 5
    blocks = Blocks(*(jnp.ones((BATCH, 1, number, *rest), jnp.int32) for rest in ((), (4,), ())))
    found = (dot_flops(trace(config, blocks)) - dot_flops(trace(config))) / (BATCH * ROW)
    terms = flops.flops_per_byte(config, ROW, PATCH, number / ROW)
    plain = flops.flops_per_byte(config, ROW, PATCH)
    assert terms["total"] == pytest.approx(plain["total"] + terms["blocks"])
    cross, rows = config.cross_attention, 4 * number / ROW
    layers = DECODER.num_layers if cross.all_layers_decoder else 1
    masked = 4 * DECODER.dim * DECODER.num_layers * (ROW - flops.mean_visible(ROW, DECODER.window))
    sums = 4 * cross.k * layers * DECODER.dim * (cross.window_decoder or 1)
    assert found == pytest.approx(terms["blocks"] + rows * (masked - sums))


@pytest.mark.parametrize("name", ["quickstart", "blt_400m", "blt_1b", "blt_7b"])
def test_blocks_of_four_take_less_than_1_6_times_a_plain_step(name):
    blocks = {"blt.diffusion_block": 4}
    with_blocks, plain = (work_of_stages(read_config(name, s))["blt"] for s in (blocks, None))
    ratio = with_blocks.flops_per_byte / plain.flops_per_byte
    assert 1.02 < ratio < 1.6
    unread = blocks | {"blt_training.diffusion.weight": 0.0}
    assert work_of_stages(read_config(name, unread))["blt"] == plain
    few = blocks | {"blt_training.diffusion.row_blocks": 64}
    less = work_of_stages(read_config(name, few))["blt"].flops_per_byte
    assert 1 < less / plain.flops_per_byte < ratio


@pytest.mark.parametrize("width", [None, 24])
def test_tables_of_tokens_cost_their_projection_alone(width, dense_attention):
    stack = dataclasses.replace(ENCODER, window=ROW)
    hashing = HashConfig((2, 3), 5000, num_functions=2)
    plain = TokenModelConfig(stack, vocab_size=300)
    config = dataclasses.replace(plain, hash=hashing, hash_dim=width)
    terms, without = (flops.flops_per_byte(c, ROW, 1) for c in (config, plain))
    assert terms["total"] - without["total"] == (2 * 24 * 32 if width else 0)
    found = dot_flops(trace(config)) / (BATCH * ROW)
    assert found == pytest.approx(terms["total"] + masked_flops(config))
    params = functional.abstract_params(config)
    report = flops.parameter_report(config, params)
    assert params["encoder_hash_tok_embedding"]["weight"].shape == (4, 5120, width or 32)
    assert report["hash_tables"] == 4 * 5000 * (width or 32)
    of_plain = flops.parameter_report(plain, functional.abstract_params(plain))["total"]
    assert report["without_hash_tables"] - of_plain == (24 * 32 if width else 0)


def test_backward_costs_twice_the_forward(dense_attention):
    config = EntropyModelConfig(dataclasses.replace(ENCODER, window=ROW))
    tokens = jax.ShapeDtypeStruct((BATCH, ROW), jnp.int32)

    def loss(params, tokens):
        return functional.apply(config, params, tokens).sum()

    backward = jax.make_jaxpr(jax.grad(loss))(functional.abstract_params(config), tokens)
    assert dot_flops(backward.jaxpr) == flops.TRAINING_FACTOR * dot_flops(trace(config))


def trace(config, blocks=None):
    """The jaxpr of a forward pass over BATCH rows of ROW bytes in patches of PATCH."""
    tokens = jax.ShapeDtypeStruct((BATCH, ROW), jnp.int32)
    lengths = jax.ShapeDtypeStruct((BATCH, ROW // PATCH), jnp.int32)

    def forward(params, tokens, lengths):
        is_blt = isinstance(config, BLTConfig)
        inputs = (buffers_from_lengths(lengths, ROW),) if is_blt else ()
        if blocks is not None:
            return functional.intermediates(config, params, tokens, *inputs, blocks=blocks)
        return functional.apply(config, params, tokens, *inputs)

    return jax.make_jaxpr(forward)(functional.abstract_params(config), tokens, lengths).jaxpr


def dot_flops(jaxpr) -> int:
    """FLOPs of all matrix products in a jaxpr; a scan's body counts once for each step."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            depth = 1
            for axis in contracted:
                depth *= shape[axis]
            total += 2 * eqn.outvars[0].aval.size * depth
        assert eqn.primitive.name not in ("while", "cond"), "a number of steps that is not static"
        inner = sum(
            dot_flops(getattr(p, "jaxpr", p))
            for p in eqn.params.values()
            if hasattr(getattr(p, "jaxpr", p), "eqns")
        )
        total += inner * eqn.params["length"] if eqn.primitive.name == "scan" else inner
    return total


def masked_flops(config) -> float:
    """What the dense attention of each stack computes and no mask lets through, per byte."""
    if isinstance(config, EntropyModelConfig):
        stacks = [(config.transformer, ROW, 1)]
    else:
        stacks = [
            (config.local_encoder, ROW, 1),
            (config.local_decoder, ROW, 1),
            (config.global_transformer, ROW // PATCH, 1 / PATCH),
        ]
    total = 0
    for stack, positions, per_byte in stacks:
        seen = flops.mean_visible(positions, stack.window)
        total += per_byte * (flops.stack_flops(stack, positions) - flops.stack_flops(stack, seen))
    return total


def sums_flops(config) -> float:
    """Scores and values of cross-attention are sums of products, and no matrix products."""
    if isinstance(config, EntropyModelConfig):
        return 0
    cross, encoder, decoder = config.cross_attention, config.local_encoder, config.local_decoder
    of_encoder = encoder.num_layers if cross.all_layers_encoder else 1
    of_decoder = decoder.num_layers if cross.all_layers_decoder else 1
    total = cross.encoder * of_encoder * encoder.dim * (cross.window_encoder or 1)
    total += cross.decoder * of_decoder * decoder.dim * (cross.window_decoder or 1)
    return 4 * cross.k * total


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            BLT_1B,
            dict(
                local_encoder=19_406_848,
                global_transformer=1_284_608_000,
                local_decoder=157_852_672,
                hash_tables=3_072_012_288,
                total=4_533_879_808,
                without_hash_tables=1_461_867_520,
            ),
        ),
        (
            BLT_7B,
            dict(
                local_encoder=33_761_280,
                global_transformer=6_497_239_040,
                local_decoder=182_554_880,
                hash_tables=3_840_015_360,
                total=10_553_570_560,
                without_hash_tables=6_713_555_200,
            ),
        ),
        (
            ENTROPY,
            dict(
                tok_embeddings=199_680,
                layers=99_111_936,
                norm=768,
                output=199_680,
                total=99_512_064,
                without_hash_tables=99_512_064,
            ),
        ),
    ],
    ids=["1b", "7b", "entropy"],
)
def test_published_parameter_counts(config, expected):
    assert flops.parameter_report(config, functional.abstract_params(config)) == expected


def test_format_report_is_one_line_with_both_totals():
    report = dict(
        local_encoder=1500, hash_tables=1_000_000, total=1_001_500, without_hash_tables=1500
    )
    assert flops.format_report(report) == (
        "1,001,500 parameters, 1,500 without hash tables (local_encoder 1,500, "
        "hash_tables 1,000,000)"
    )
    assert flops.format_report(dict(layers=3, total=3, without_hash_tables=3)) == (
        "3 parameters (layers 3)"
    )

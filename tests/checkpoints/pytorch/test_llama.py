"""Layers of tokenized models: transformers as a live oracle, GGUF files, and what is refused."""

import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch import llama
from bltjax.checkpoints.weights import WeightsError
from bltjax.config import BLTConfig
from bltjax.config.model import HashConfig
from bltjax.model import functional
from bltjax.model.transformer import run_blocks
from tests import llamas

CLOSE = dict(rtol=0, atol=1e-4)
LENGTH = 24


def hidden_states(source, x, **options):
    """The last layer's output [B, L, dim] for inputs x of layers that were read of a source."""
    model = llama.read(source, **options)
    stack = model.settings.stack
    config = BLTConfig(global_transformer=stack, hash=HashConfig(sizes=()))
    params = jax.tree.map(
        lambda like: np.zeros(like.shape, np.float32), functional.abstract_params(config)
    )
    params["global_transformer"]["layers"] = jax.tree.map(read_all, model.layers)

    @jax.jit
    def run(params, x):
        blocks = functional._model(config, params).global_transformer.layers
        segments = jnp.zeros(x.shape[:2], jnp.int32)
        return run_blocks(blocks, stack, x, segments, config)

    return np.asarray(run(params, x))


def inputs(dim):
    return np.random.default_rng(7).normal(size=(2, LENGTH, dim)).astype(np.float32)


# The oracle


@pytest.fixture(scope="module")
def torch():
    found = pytest.importorskip("torch", reason="the oracle needs torch==2.13.0 (CPU)")
    found.set_num_threads(1)
    return found


@pytest.fixture(scope="module")
def transformers(torch):
    found = pytest.importorskip("transformers", reason="the oracle is transformers>=5.23")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


SCALINGS = {
    "none": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=2.5),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=40,
    ),
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@st.composite
def settings(draw, kind):
    """Settings of a tiny model of a family."""
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * draw(st.sampled_from([1, 2]))
    width = draw(st.sampled_from([4, 6, 10]))
    free = kind != "qwen2" and draw(st.booleans())  # heads that do not fill the width
    rope = draw(st.sampled_from(sorted(SCALINGS)))
    theta = draw(st.sampled_from([50.0, 1e4, 5e5]))
    found = dict(
        hidden_size=24 if free else heads * width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(3, 30)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        rope_parameters=SCALINGS[rope] | dict(rope_theta=theta),
        max_position_embeddings=64,
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=None,
    )
    if kind != "qwen2" and (free or kind == "qwen3"):
        found["head_dim"] = width
    if kind == "mistral":
        found["sliding_window"] = draw(st.sampled_from([None, 64]))
    return found


def oracle_model(torch, transformers, kind, given, seed=0):
    """A model with float32 weights large enough that every part shows."""
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**given)
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            scale = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(noise * scale + (1 if "norm" in name else 0))
    return model


def before_the_last_norm(torch, model, x):
    seen = []
    hook = model.model.layers[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        model.model(inputs_embeds=torch.as_tensor(x), use_cache=False)
    hook.remove()
    (found,) = seen
    return (found[0] if isinstance(found, tuple) else found).numpy()


@pytest.mark.parametrize("kind", CLASSES)
@hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])  # all are small
@hypothesis.given(data=st.data())
def test_hidden_states_are_those_of_transformers(torch, transformers, tmp_path_factory, kind, data):
    given = data.draw(settings(kind))
    model = oracle_model(torch, transformers, kind, given)
    source = tmp_path_factory.mktemp("oracle") / "source"
    model.save_pretrained(source)
    x = inputs(given["hidden_size"])
    expected = before_the_last_norm(torch, model, x)
    assert np.abs(expected - x).max() > 0.1
    np.testing.assert_allclose(hidden_states(source, x), expected, **CLOSE)


def test_dropped_scaling_is_no_scaling(torch, transformers, tmp_path):
    given = dict(llamas.SETTINGS, rope_parameters=SCALINGS["llama3"] | dict(rope_theta=1e4))
    del given["rope_theta"], given["torch_dtype"]
    model = oracle_model(torch, transformers, "llama", given)
    model.save_pretrained(tmp_path / "source")
    x = inputs(32)
    scaled = hidden_states(tmp_path / "source", x)
    np.testing.assert_allclose(scaled, before_the_last_norm(torch, model, x), **CLOSE)
    given["rope_parameters"] = SCALINGS["none"] | dict(rope_theta=1e4)
    plain = oracle_model(torch, transformers, "llama", given)
    found = hidden_states(tmp_path / "source", x, drop_rope_scaling=True)
    np.testing.assert_allclose(found, before_the_last_norm(torch, plain, x), **CLOSE)
    assert np.abs(found - scaled).max() > 1e-2


# Settings of files as they are found


def stack_of(directory, **options):
    return llama.read(directory, **options).settings.stack


def test_values_are_the_source_s_bit_for_bit(tmp_path):
    source = llamas.write(tmp_path / "source", "qwen2")
    there, found = llamas.tensors(llamas.settings("qwen2")), llama.read(source)
    layers = found.layers
    for ours, theirs in (("wo", "o_proj.weight"), ("wv", "v_proj.weight")):
        expected = [there[f"model.layers.{i}.self_attn.{theirs}"] for i in range(2)]
        np.testing.assert_array_equal(
            read_all(layers["attention"][ours]["weight"]), np.stack(expected)
        )
    for name in ("weight", "bias"):
        expected = np.stack([there[f"model.layers.{i}.self_attn.q_proj.{name}"] for i in range(2)])
        heads = expected.reshape(2, 4, 2, 4, -1)  # [layers, heads, halves, pairs, in]
        pairs = np.swapaxes(heads, 2, 3).reshape(expected.shape)
        np.testing.assert_array_equal(read_all(layers["attention"]["wq"][name]), pairs)
    size = np.sqrt(np.mean(np.square(there["model.embed_tokens.weight"], dtype=np.float64)))
    assert llama.root_mean_square(found.embeddings) == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(rope_theta=..., rope_parameters=dict(rope_theta=10_000.0, rope_type="default")),
        dict(rope_scaling=None, pretraining_tp=1, use_cache=True, attention_dropout=0.1),
        dict(attention_bias=False, mlp_bias=False, head_dim=8, eos_token_id=[1, 2]),
        dict(tie_word_embeddings=True, is_llama_config=True, rope_interleaved=False),
        {"transformers.js_config": {"dtype": "q4"}, "bos_token_id": 3},
        dict(rms_norm_eps=1e-5, head_dim=None, dtype="bfloat16", torch_dtype=...),
    ],
    ids=str,
)
def test_settings_that_change_nothing_are_read(tmp_path, wrong):
    plain = stack_of(llamas.write(tmp_path / "plain"))
    assert stack_of(llamas.write(tmp_path / "source", wrong=wrong)) == plain


def test_what_is_assumed_is_told(tmp_path):
    wrong = dict(rope_theta=..., head_dim=..., num_key_value_heads=2)
    (note,) = llama.read(llamas.write(tmp_path / "source", wrong=wrong)).settings.notes
    assert note == ("config does not say, so it is assumed: rope_parameters.rope_theta=10000.0")


def test_a_tied_model_has_no_output_layer(tmp_path):
    source = llamas.write(tmp_path / "tied", tie_word_embeddings=True)
    assert stack_of(source) == stack_of(llamas.write(tmp_path / "plain"))


@pytest.mark.parametrize("group", ["rope_scaling", "rope_parameters"])
def test_scaling_under_both_names(tmp_path, group):
    scaling = dict(SCALINGS["llama3"])
    if group == "rope_scaling":
        scaling["type"] = scaling.pop("rope_type")
    stack = stack_of(llamas.write(tmp_path / "source", wrong={group: scaling}))
    assert (stack.rope_factor, stack.rope_original_positions) == (8.0, 40)
    assert (
        stack_of(llamas.write(tmp_path / "other", wrong={group: SCALINGS["linear"]})).rope_factor
        == 2.5
    )
    model = llama.read(tmp_path / "source", drop_rope_scaling=True)
    assert model.settings.stack.rope_factor == 1.0
    assert (
        "rope scaling of kind 'llama3' is left out: positions are not scaled"
        in model.settings.notes
    )


REFUSED = [  # family, settings, what is told
    ("llama", dict(model_type="gpt2"), "config.model_type='gpt2' is none of llama, mistral"),
    ("llama", dict(model_type="blt"), "config.model_type='blt' is none of"),
    ("llama", dict(model_type=...), "config.model_type='None' is none of"),
    ("llama", dict(hidden_size=...), "config.hidden_size is missing"),
    ("llama", dict(hidden_size=64), "the config says [64, 64]"),
    ("llama", dict(num_hidden_layers=3), "model.layers.2.mlp.up_proj.weight is missing"),
    ("llama", dict(num_hidden_layers=10**6), "the settings say 1000000 layers"),
    ("llama", dict(num_hidden_layers=1), "model.layers.1.mlp.up_proj.weight is unexpected"),
    ("llama", dict(vocab_size=49), "model.embed_tokens.weight has shape [48, 32]"),
    ("llama", dict(num_key_value_heads=3), "config.num_attention_heads=4 is not a multiple of"),
    ("llama", dict(hidden_act="gelu"), "config.hidden_act='gelu' is not supported"),
    ("llama", dict(attention_bias=True), "config.attention_bias=True is not supported"),
    ("llama", dict(mlp_bias=True), "config.mlp_bias=True is not supported"),
    ("llama", dict(num_local_experts=8), "config.num_local_experts=8 is a field that nobody"),
    ("llama", dict(quantization_config=dict(bits=4)), "save the weights in bfloat16 or float32"),
    ("llama", dict(partial_rotary_factor=0.5), "config.partial_rotary_factor=0.5"),
    ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "--drop_rope_scaling"),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=4.0)), "--drop_rope_scaling"),
    (
        "llama",
        dict(rope_scaling=SCALINGS["llama3"] | dict(low_freq_factor=2.0)),
        "config.rope_scaling.low_freq_factor=2.0 is not supported",
    ),
    ("llama", dict(rope_scaling=dict(rope_type="linear")), "rope_scaling.factor is missing"),
    (
        "mistral",
        dict(sliding_window=16),
        "config.sliding_window=16 is less than the longest text, 64",
    ),
    ("mistral", dict(sliding_window=..., max_position_embeddings=8192), "sliding_window=4096"),
    ("mistral", dict(num_key_value_heads=...), "config.num_key_value_heads is missing"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=16), "config.sliding_window=16"),
    (
        "qwen3",
        dict(layer_types=["linear_attention"] * 2),
        "config.layer_types has 'linear_attention'",
    ),
    ("qwen3", dict(head_dim=...), "config.head_dim is missing"),
    ("qwen3", dict(attention_bias=True), "config.attention_bias=True"),
]


@pytest.mark.parametrize("kind, wrong, told", REFUSED, ids=[f"{r[0]}-{r[2][:40]}" for r in REFUSED])
def test_what_cannot_be_computed_is_refused(tmp_path, kind, wrong, told):
    source = llamas.write(tmp_path / "source", kind, wrong=wrong)
    with pytest.raises(WeightsError) as error:
        llama.read(source)
    assert told in str(error.value)


@pytest.mark.parametrize("told", ["--drop_rope_scaling", "yarn"])
def test_any_scaling_can_be_dropped(tmp_path, told):
    wrong = dict(rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=3))
    source = llamas.write(tmp_path / "source", wrong=wrong)
    with pytest.raises(WeightsError, match=told) as error:
        llama.read(source)
    assert len(error.value.problems) == 1
    assert stack_of(source, drop_rope_scaling=True).rope_factor == 1.0


def bad_value(found):
    found["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


def quantized(found):
    found["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 32), np.int8)
    found["model.layers.0.mlp.up_proj.weight_scale"] = np.ones(24, np.float32)


def misnamed(found):
    found["model.layers.0.mlp.up.weight"] = found.pop("model.layers.0.mlp.up_proj.weight")
    found["model.layers.0.self_attn.o_proj.bias"] = np.zeros(32, np.float32)


def of_two_dtypes(found):
    name = "model.layers.0.mlp.up_proj.weight"
    found[name] = found[name].astype(np.float16)


@pytest.mark.parametrize(
    "change, told",
    [
        (bad_value, ["model.layers.1.mlp.up_proj.weight has 1 values that are NaN"]),
        (quantized, ["up_proj.weight is int8", "weight_scale is un", "come in float32 and int8"]),
        (
            misnamed,
            ["up_proj.weight is missing", "mlp.up.weight is unexpected", "o_proj.bias is un"],
        ),
        (of_two_dtypes, ["come in float16 and float32: cast them"]),
    ],
)
def test_tensors_that_are_wrong_are_named(tmp_path, change, told):
    source = llamas.write(tmp_path / "source", change=change)
    with pytest.raises(WeightsError) as error:
        llama.read(source)
    assert not [piece for piece in told if piece not in str(error.value)]
    assert len(error.value.problems) == len(told)


def test_all_problems_are_told_at_once(tmp_path):
    wrong = dict(hidden_act="gelu", mlp_bias=True, rope_scaling=dict(type="yarn"), what=1)
    source = llamas.write(tmp_path / "source", change=quantized, wrong=wrong)
    with pytest.raises(WeightsError) as error:
        llama.read(source)
    for piece in ("gelu", "mlp_bias", "yarn", "config.what=1", "int8"):
        assert piece in str(error.value)


def test_what_is_no_source_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        llama.read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="give a GGUF file"):
        llama.read(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        llama.read(tmp_path / "empty")
    source = llamas.write(tmp_path / "source")
    (source / "config.json").write_text(json.dumps([1]))
    with pytest.raises(WeightsError, match="must be an object"):
        llama.read(source)


def test_norms_and_output_layers_may_be_damaged(tmp_path):
    """They are not read."""

    def change(found):
        found["lm_head.weight"][0] = np.inf
        found["model.norm.weight"][0] = np.nan

    llama.read(llamas.write(tmp_path / "source", change=change))

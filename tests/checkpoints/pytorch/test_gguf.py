"""GGUF files, against the same models in Hugging Face's format."""

import numpy as np
import pytest

from bltjax.checkpoints.pytorch import llama
from bltjax.checkpoints.weights import WeightsError
from bltjax.ops.rotary import scaled
from tests import llamas
from tests.checkpoints.pytorch.test_llama import CLOSE, hidden_states, inputs

gguf = pytest.importorskip("gguf", reason="GGUF files need pip install '.[gguf]'")

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
WIDE = dict(hidden_size=64, intermediate_size=96)  # quantized in blocks of 32 features


def gguf_name(name):
    """A tensor's name in a GGUF file."""
    if name in TOP:
        return TOP[name]
    _, _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{MODULES['.'.join(module)]}.{kind}"


def in_pairs(x, heads):
    """Rows in halves of heads as the llama architecture has them in GGUF files."""
    split = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return np.swapaxes(split, 1, 2).reshape(x.shape)


def quantize(x, kind):
    """A matrix in a kind of numbers, as it is stored, and the values that this means."""
    stored = gguf.quants.quantize(x, kind)
    return stored, gguf.quants.dequantize(stored, kind).reshape(x.shape)


def write(path, kind, config, found, metadata=lambda writer: None, more=()):
    """Writes tensors of Hugging Face's names: name -> (array, kind of numbers or None)."""
    writer = gguf.GGUFWriter(path, "llama" if kind == "mistral" else kind)
    writer.add_license("apache-2.0")
    writer.add_license_name("Apache")  # a field below another one
    writer.add_token_list(["a", "b"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    metadata(writer)
    for name, (stored, raw) in found.items():
        writer.add_tensor(gguf_name(name), stored, raw_dtype=raw)
    for name, stored in more:
        writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def twins(directory, kind, numbers, **options):
    """The same model as a GGUF file and in Hugging Face's format.

    numbers: kind of those of the matrices in layers; that of others is F32.
    """
    config = llamas.settings(kind, **WIDE)
    raw = getattr(gguf.GGMLQuantizationType, numbers)
    stored, meant = {}, llamas.tensors(config)
    for name, x in meant.items():
        rows = x
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if f".{part}_proj." in name and kind in ("llama", "mistral"):
                rows = in_pairs(x, config[heads])
        if x.ndim == 1 or numbers == "F32":
            stored[name] = rows, None
            continue
        stored[name] = quantize(rows, raw)[0], raw
        meant[name] = quantize(x, raw)[1]  # rows are quantized one by one
    hf = llamas.write(directory / "hf", kind, lambda found: found.update(meant), **WIDE)
    return write(directory / "model.gguf", kind, config, stored, **options), hf


@pytest.mark.parametrize(
    "kind, numbers",
    [("llama", "F32"), ("llama", "Q8_0"), ("mistral", "F16"), ("qwen2", "BF16"), ("qwen3", "Q8_0")],
)
def test_hidden_states_are_those_of_the_other_format(tmp_path, kind, numbers):
    file, hf = twins(tmp_path, kind, numbers)
    x = inputs(WIDE["hidden_size"])
    expected = hidden_states(hf, x)
    np.testing.assert_allclose(hidden_states(file, x), expected, **CLOSE)
    assert np.abs(expected - x).max() > 0.1
    read, other = llama.read(file), llama.read(hf)
    assert read.settings.stack == other.settings.stack
    assert llama.root_mean_square(read.embeddings) == pytest.approx(
        llama.root_mean_square(other.embeddings), rel=1e-6
    )
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(numbers, "float32")
    assert read.layers["feed_forward"]["w2"]["weight"].dtype == dtype


def test_pieces_of_quantized_tensors(tmp_path):
    file, _ = twins(tmp_path, "llama", "Q8_0")
    array = llama.read(file).layers["feed_forward"]["w2"]["weight"]
    whole = array[(slice(0, 2), slice(0, 64), slice(0, 96))]
    for index in [
        (slice(1, 2), slice(3, 7), slice(5, 90)),
        (slice(0, 2), slice(0, 1), slice(32, 64)),
        (slice(0, 1), slice(63, 64), slice(95, 96)),
    ]:
        np.testing.assert_array_equal(array[index], whole[index])


def test_a_directory_with_one_file_will_do(tmp_path):
    file, hf = twins(tmp_path, "llama", "F32")
    (tmp_path / "alone").mkdir()
    file = file.rename(tmp_path / "alone" / "any.gguf")
    assert llama.read(tmp_path / "alone").settings.stack == llama.read(hf).settings.stack


@pytest.mark.parametrize("factor, original", [(8.0, 8192), (32.0, 4096), (4.0, None)])
def test_factors_of_frequencies_are_llama_3_s_scaling(tmp_path, factor, original):
    plain = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    factors = (plain / scaled(plain, factor, original)).astype(np.float32)
    file, _ = twins(tmp_path, "llama", "F32", more=[("rope_freqs.weight", factors)])
    stack = llama.read(file).settings.stack
    assert (stack.rope_factor, stack.rope_original_positions) == (factor, original)
    dropped = llama.read(file, drop_rope_scaling=True).settings
    assert dropped.stack.rope_factor == 1.0 and "'llama3' is left out" in str(dropped.notes)


def test_other_factors_are_refused(tmp_path):
    factors = np.linspace(1, 3, 8, dtype=np.float32)
    file, _ = twins(tmp_path, "llama", "F32", more=[("rope_freqs.weight", factors)])
    with pytest.raises(WeightsError, match=r"not Llama 3's: .*--drop_rope_scaling"):
        llama.read(file)


METADATA = [
    (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "--drop_rope_scaling"),
    (lambda w: w.add_expert_count(8), "metadata.llama.expert_count=8 is not supported"),
    (lambda w: w.add_sliding_window(16), "metadata.llama.attention.sliding_window=16 is less"),
    (lambda w: w.add_rope_dimension_count(8), "metadata.llama.rope.dimension_count=8"),
    (lambda w: w.add_float32("llama.attention.scale", 2.0), "metadata.llama.attention.scale=2.0"),
    (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts"),
]


@pytest.mark.parametrize("metadata, told", METADATA, ids=[told for _, told in METADATA])
def test_metadata_that_cannot_be_computed_is_refused(tmp_path, metadata, told):
    file, _ = twins(tmp_path, "llama", "F32", metadata=metadata)
    with pytest.raises(WeightsError) as error:
        llama.read(file)
    assert told in str(error.value)


def test_linear_scaling(tmp_path):
    def metadata(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    file, _ = twins(tmp_path, "llama", "F32", metadata=metadata)
    assert llama.read(file).settings.stack.rope_factor == 4.0


def test_other_files_are_told(tmp_path):
    file, _ = twins(
        tmp_path, "llama", "F32", more=[("blk.0.attn_q.bias", np.zeros(64, np.float32))]
    )
    with pytest.raises(WeightsError, match=r"blk\.0\.attn_q\.bias is unexpected"):
        llama.read(file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="not a whole GGUF file"):
        llama.read(file)
    file.write_bytes(b"not GGUF at all, but long enough")
    with pytest.raises(WeightsError, match="not a whole GGUF file"):
        llama.read(file)
    other = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    with pytest.raises(WeightsError, match=r"general\.architecture='gpt2' is none of llama"):
        llama.read(tmp_path / "other.gguf")


def test_a_missing_library_is_told(tmp_path, monkeypatch):
    file, _ = twins(tmp_path, "llama", "F32")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(WeightsError, match=r"pip install 'bltjax\[gguf\]'"):
        llama.read(file)

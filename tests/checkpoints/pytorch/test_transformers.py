"""transformers' BltForCausalLM as a live oracle, called and never read.

Where it departs from the published model (differences.md), the draw leaves it out, and a test of
its own below says what it does instead.
"""

import dataclasses
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import bltjax
from bltjax.checkpoints.pytorch import hf_config
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.weights import Weights
from bltjax.config import InitConfig, PatchingConfig
from tests.released import expected_shapes, released

torch = pytest.importorskip("torch", reason="the oracle needs torch==2.13.0 (CPU)")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers>=5.23")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CLOSE = dict(rtol=0, atol=1e-4)


def stack(dim, num_heads, num_kv_heads, num_layers, ffn_width, **more):
    return dict(
        hidden_size=dim,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        num_hidden_layers=num_layers,
        intermediate_size=ffn_width,
        max_position_embeddings=256,
        **more,
    )


@st.composite
def stacks(draw, dim, max_layers=2, **more):
    num_heads = draw(st.sampled_from([h for h in (1, 2, 4) if dim % (2 * h) == 0]))
    num_kv_heads = draw(st.sampled_from([h for h in (1, 2, 4) if num_heads % h == 0]))
    num_layers, ffn_width = draw(st.integers(1, max_layers)), draw(st.integers(1, 40))
    eps = draw(st.sampled_from([1e-5, 1e-3]))
    theta = draw(st.sampled_from([1e2, 1e4, 5e5]))
    rope = {"rope_theta": theta, "rope_type": "default"}
    more |= dict(rms_norm_eps=eps, rope_parameters=rope)
    return stack(dim, num_heads, num_kv_heads, num_layers, ffn_width, **more)


@st.composite
def configs(draw):
    """Settings of BltConfig; those that the format repeats are equal."""
    k, local = draw(st.integers(1, 4)), draw(st.sampled_from([8, 16, 24]))
    trunk = draw(st.sampled_from([local, 16, 32, 48, k * local]))
    shared = dict(cross_attn_k=k, hidden_size_global=trunk)
    encoder = draw(stacks(local, **shared))
    encoder["cross_attn_all_layers"] = encoder["num_hidden_layers"] == 1 and draw(st.booleans())
    decoder = draw(stacks(local, max_layers=3, **shared, cross_attn_all_layers=draw(st.booleans())))
    patcher_window = draw(st.integers(1, 12))
    return dict(
        encoder_config=encoder,
        decoder_config=decoder,
        global_config=draw(stacks(trunk)),
        patcher_config=draw(stacks(draw(st.sampled_from([8, 16])), sliding_window=patcher_window)),
        cross_attn_k=k,
        local_attention_window_len=draw(st.integers(1, 12)),
        encoder_hash_byte_group_size=draw(
            st.lists(st.integers(2, 8), min_size=1, max_size=3, unique=True)
        ),
        encoder_hash_byte_group_vocab=draw(st.integers(1, 60)),
        encoder_hash_byte_group_nb_functions=draw(st.integers(1, 3)),
        patch_in_forward=True,
    )


def make_model(settings, seed=0):
    """A BltForCausalLM of float32 weights large enough that every part shows."""
    model = transformers.BltForCausalLM(transformers.BltConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            scale = 1.2 * weight.shape[-1] ** -0.5
            weight.copy_(1 + 0.2 * noise if "norm" in name else scale * noise)
    return model


def random_tokens(rows, length, seed=0):
    """Ids with BOS first and no EOS (which transformers does not know)."""
    tokens = np.random.default_rng(seed).integers(4, 260, (rows, length), dtype=np.int32)
    tokens[:, 0] = 1
    return tokens


def as_ids(array):
    return torch.as_tensor(np.asarray(array), dtype=torch.long)


@torch.no_grad()
def oracle(model, tokens, **more):
    return model(as_ids(tokens), use_cache=False, **more).logits.numpy()


@torch.no_grad()
def patcher(model, tokens):
    """(entropies [B, N], patch lengths [B, P]) as transformers finds them."""
    config = model.config
    entropies, lengths, _ = model.model.patcher(
        as_ids(tokens),
        patch_size=config.patch_size,
        threshold=config.patching_threshold,
        max_patch_length=config.max_patch_length,
        use_cache=False,
    )
    return entropies.numpy(), lengths.numpy()


def oracle_entropies(model, tokens):
    return patcher(model, tokens)[0]


def oracle_lengths(model, tokens):
    """transformers' lengths in the published convention.

    Its rows sum to N, a patch that opens at N has length 0, and where another row of the batch has
    more patches a row ends in a length one too long, then -1 (differences.md). Row by row
    there is only the zero.
    """
    rows = []
    for row in tokens:
        (lengths,) = patcher(model, row[None])[1]
        if lengths[-1] == 0:
            rows.append([*lengths[:-1], 1])  # the byte to come opens a patch
        else:
            rows.append([*lengths[:-1], lengths[-1] + 1])
    result = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result


def clear_threshold(entropies):
    """A threshold that opens about half of the patches, away from every entropy."""
    values = np.sort(entropies.ravel())
    gaps = np.diff(values)
    middle = range(len(gaps) // 4, max(3 * len(gaps) // 4, len(gaps) // 4 + 1))
    at = max(middle, key=lambda i: gaps[i])
    return float((values[at] + values[at + 1]) / 2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("transformers")


def draws(number):
    """Each is compiled anew, so one process does them while others do other tests."""
    settings = hypothesis.settings(
        max_examples=number,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    given = hypothesis.given(settings=configs(), seed=st.integers(0, 2**16), data=st.data())
    return lambda test: settings(given(test))


@draws(5)
def test_logits_entropies_and_patches_agree_and_exports_load(directory, settings, seed, data):
    check(directory, settings, seed, data)


@pytest.mark.slow
@draws(26)
def test_more_configurations_agree(directory, settings, seed, data):
    check(directory, settings, seed, data)


def check(directory, settings, seed, data):
    model = make_model(settings, seed)
    tokens = random_tokens(2, data.draw(st.integers(14, 40), label="length"), seed)
    expected_entropies = oracle_entropies(model, tokens)
    model.config.patching_threshold = clear_threshold(expected_entropies)
    source = directory / f"{seed}-{len(list(directory.iterdir()))}"
    model.save_pretrained(source)

    ours = bltjax.load(source)
    entropies = ours.entropies(tokens)
    lengths = ours.patch_lengths(tokens)
    np.testing.assert_allclose(entropies, expected_entropies, **CLOSE)
    expected = oracle(model, tokens)  # it finds patches inside
    np.testing.assert_allclose(ours.logits(tokens), expected, **CLOSE)
    np.testing.assert_array_equal(lengths, oracle_lengths(model, tokens))
    outside = oracle(model, tokens, patch_lengths=as_ids(lengths))
    np.testing.assert_allclose(ours.logits(tokens, lengths), outside, **CLOSE)

    target = source.with_name(source.name + "-back")
    convert(source, target, "hf")
    again, info = transformers.BltForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    # PyTorch may add in another order where memory is aligned otherwise.
    np.testing.assert_allclose(oracle(again.eval(), tokens), expected, rtol=1e-5, atol=1e-5)


SMALL = dict(
    encoder_config=stack(16, 2, 2, 1, 24, cross_attn_k=2, hidden_size_global=32),
    decoder_config=stack(
        16, 2, 2, 2, 24, cross_attn_k=2, hidden_size_global=32, cross_attn_all_layers=True
    ),
    global_config=stack(32, 2, 2, 2, 40),
    patcher_config=stack(16, 2, 2, 1, 24, sliding_window=8),
    cross_attn_k=2,
    local_attention_window_len=8,
    encoder_hash_byte_group_size=[3, 4],
    encoder_hash_byte_group_vocab=50,
    encoder_hash_byte_group_nb_functions=1,
)


def opened(model, directory):
    """Saved by transformers, opened by us."""
    model.save_pretrained(directory)
    return bltjax.load(directory)


def calibrated(settings, tokens, seed=0):
    model = make_model(settings, seed)
    model.config.patching_threshold = clear_threshold(oracle_entropies(model, tokens))
    return model


def test_ours_in_transformers_where_it_has_one_matrix_more(tmp_path):
    """Published models have no decoder projection between equal widths; transformers always has."""
    from bltjax.checkpoints import formats
    from tests import directories

    changes = dict(cross_attn_k=1, dim_global=32, n_heads_global=2)
    source = tmp_path / "source"
    directories.hub(source, "meta_A_1b_like", **changes)

    def shrink(found):
        kept = {n: t for n, t in found.items() if "global" not in n and "projection" not in n}
        rng = np.random.default_rng(0)
        kept["local_encoder.patch_embedding_projection.weight"] = np.float32(
            rng.standard_normal((32, 32))
        )
        for name, tensor in found.items():
            if name.startswith("global_transformer.layers"):
                shape = [{64: 32, 176: 96}[n] for n in tensor.shape]
                kept[name] = np.float32(0.2 * rng.standard_normal(shape))
        found.clear()
        found.update(kept)

    directories.rewrite(source, shrink)
    directories.hub(source / "entropy_model", "meta_entropy")
    ours = bltjax.load(source)
    assert not ours.config.has_decoder_projection
    convert(source, tmp_path / "hf", "hf")
    model, info = transformers.BltForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = random_tokens(1, 20)
    np.testing.assert_allclose(oracle(model.eval(), tokens), ours.logits(tokens), **CLOSE)
    assert formats.read(tmp_path / "hf").blt.always_project


# What follows are departures of transformers from the published model (differences.md).


def test_departure_documents_see_each_other_across_eos(tmp_path):
    tokens = random_tokens(1, 24)
    tokens[0, 11] = 2
    model = calibrated(SMALL, tokens)
    ours = opened(model, tmp_path / "hf")
    lengths = ours.patch_lengths(tokens)
    difference = np.abs(
        ours.logits(tokens, lengths) - oracle(model, tokens, patch_lengths=as_ids(lengths))
    ).max(axis=(0, 2))
    assert difference[:12].max() < 1e-4 and difference[12:].min() > 1e-3


def test_departure_only_the_last_of_several_encoder_cross_layers_acts(tmp_path):
    encoder = SMALL["encoder_config"] | dict(num_hidden_layers=2, cross_attn_all_layers=True)
    tokens = random_tokens(1, 24)
    model = calibrated(SMALL | dict(encoder_config=encoder), tokens)
    expected = oracle(model, tokens)
    with pytest.warns(UserWarning, match="uses only the last"):
        ours = opened(model, tmp_path / "hf")
    assert np.abs(ours.logits(tokens) - expected).max() > 1e-2
    with torch.no_grad():
        for weight in model.model.local_encoder.cross_attn_layers[0].parameters():
            weight.normal_()
    np.testing.assert_array_equal(oracle(model, tokens), expected)  # it changes nothing there


def test_departure_the_default_cache_crashes():
    model = make_model(SMALL)
    with pytest.raises(AttributeError, match="num_hidden_layers"), torch.no_grad():
        model(as_ids(random_tokens(1, 8)))


def test_departure_a_length_limit_misplaces_the_last_byte(tmp_path):
    """transformers splits N bytes, the published code N + 1: byte N may open another patch."""
    tokens = random_tokens(1, 13, seed=1)
    differ = []
    for length in range(9, 13):
        model = calibrated(SMALL, tokens)
        model.config.patching_threshold = 100.0
        model.config.max_patch_length = 4
        with pytest.warns(UserWarning, match="max_patch_length=4"):
            ours = opened(model, tmp_path / str(length))
        given = tokens[:, :length]
        difference = np.abs(ours.logits(given) - oracle(model, given)).max(axis=(0, 2))
        assert difference[:-1].max(initial=0) < 1e-4
        differ.append(difference[-1] > 1e-3)
    assert any(differ) and not all(differ)


def test_departure_lengths_without_the_byte_to_come_misplace_it_in_ragged_batches():
    tokens = random_tokens(2, 12)
    model = make_model(SMALL)
    alone = [
        oracle(model, row[None], patch_lengths=as_ids([lengths]))
        for row, lengths in zip(tokens, ([1, 5, 6], [1, 3, 3, 5]), strict=True)
    ]
    together = oracle(model, tokens, patch_lengths=as_ids([[1, 5, 6, 0], [1, 3, 3, 5]]))
    np.testing.assert_allclose(together[1], alone[1][0], **CLOSE)
    np.testing.assert_allclose(together[0, :-1], alone[0][0, :-1], **CLOSE)
    assert np.abs(together[0, -1] - alone[0][0, -1]).max() > 1e-2


def test_departure_other_rules_silently_become_byte_patches(tmp_path):
    tokens = random_tokens(1, 16)
    model = calibrated(SMALL, tokens)
    model.config.patching_mode = "space"
    each_byte = oracle(model, tokens, patch_lengths=as_ids(np.ones((1, 17))))
    np.testing.assert_allclose(oracle(model, tokens), each_byte, **CLOSE)
    with pytest.raises(ValueError, match="patching_mode='space' is not supported"):
        opened(model, tmp_path / "hf")


def test_departure_left_padding_changes_the_text_after_it(tmp_path):
    tokens = random_tokens(1, 16)
    model = calibrated(SMALL, tokens)
    padded = np.concatenate([np.zeros((1, 4), np.int32), tokens], axis=1)
    mask = as_ids(padded > 0)
    shifted = oracle(model, padded, attention_mask=mask)[:, 4:]
    assert np.abs(shifted - oracle(model, tokens)).max() > 1e-2


def test_departure_old_names_of_settings_are_dropped(tmp_path):
    """`norm_eps` in a file means nothing to transformers; here it is told."""
    model = make_model(SMALL)
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    del config["global_config"]["rms_norm_eps"]
    config["global_config"]["norm_eps"] = 0.5
    path.write_text(json.dumps(config))
    again = transformers.BltForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens, lengths = random_tokens(1, 8), as_ids([[1, 4, 4]])
    np.testing.assert_allclose(
        oracle(again, tokens, patch_lengths=lengths),
        oracle(model, tokens, patch_lengths=lengths),
        **CLOSE,
    )
    with pytest.raises(ValueError, match="transformers drops it"):
        bltjax.load(tmp_path / "hf")


@pytest.mark.parametrize("size", ["1b", "7b"])
def test_our_settings_of_the_released_models_build_their_tensors(size):
    """On torch's meta device, so that nothing is allocated."""
    run, entropy = released(f"blt_{size}"), released("entropy_100m")
    patching = PatchingConfig(target_patch_bytes=None)
    weights = Weights(run.blt, entropy.entropy_model, patching, {})
    problems = []
    config = hf_config.write(weights, "bfloat16", problems)
    assert not problems
    with torch.device("meta"):
        model = transformers.BltForCausalLM(transformers.BltConfig(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == expected_shapes("hf", size)
    again = hf_config.read(json.loads(json.dumps(model.config.to_dict())), problems)
    assert not problems
    assert (again.blt, again.entropy_model) == (
        run_shapes(run.blt),
        run_shapes(again.entropy_model),
    )


def run_shapes(config):
    """Without what only training knows."""
    return dataclasses.replace(config, compute_dtype="float32", remat="none", init=InitConfig())

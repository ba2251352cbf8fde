"""Low-rank adapters: what learns, files of their own, and merging."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import bltjax
from bltjax.checkpoints import adapters
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.weights import WeightsError, flat
from bltjax.config.lora import LoRAConfig
from bltjax.model import functional
from bltjax.model.lora import is_adapter, matches, merged
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.recipe.checks import check_run
from tests import directories
from tests.recipe.test_start import TEXT, config, one_device, params_of, sources, train

pytestmark = pytest.mark.long  # one interpreter will do

__all__ = ["config", "one_device", "sources"]  # fixtures, the second for all tests
LORA = {"blt.lora.rank": 3, "blt.lora.alpha": 6.0, "blt_training.steps": 8}
EVERYWHERE = {"blt.lora.targets": ("*w[qkvo123].weight", "local_decoder.output.weight")}


@pytest.fixture(scope="module")
def trained(sources, config, tmp_path_factory):
    given = config(sources["hf"], **LORA, **EVERYWHERE)
    return train(given, tmp_path_factory.mktemp("runs") / "run")


def test_only_adapters_learn(trained, sources):
    """All else is the source's, bit for bit."""
    stage = trained.stage(trained.config(), "blt")
    found = {name: np.asarray(x) for name, x in flat(stage.params()).items()}
    own = {name for name in found if is_adapter(name)}
    before = params_of(sources["hf"])
    assert {name: x.tolist() for name, x in found.items() if name not in own} == {
        name: x.tolist() for name, x in before.items()
    }
    assert {name.rsplit(".", 2)[1] for name in own} == {"lora_A", "lora_B"}
    assert all(np.abs(found[name]).max() > 0 for name in own)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens, patches, key=None):
    return functional.apply(model, params, tokens, patches, dropout_key=key)


def test_merged_gives_the_logits_of_unmerged(trained):
    stage = trained.stage(trained.config(), "blt")
    params = stage.params()
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 260, (2, 24)), jnp.int32)
    patches = buffers_from_lengths(jnp.asarray([[1, 4, 20], [1, 12, 12]], jnp.int32), 24)
    unmerged = logits(stage.model, params, tokens, patches)
    plain = logits(*merged(stage.model, params), tokens, patches)
    np.testing.assert_allclose(plain, unmerged, rtol=0, atol=1e-5)
    base, _ = adapters.separated(params)
    model = dataclasses.replace(stage.model, lora=LoRAConfig())
    without = logits(model, base, tokens, patches)
    assert np.abs(np.asarray(without - unmerged)).max() > 1e-3


def test_a_run_loads_and_converts_merged(trained, tmp_path):
    (score,) = bltjax.load(trained.path).score([TEXT])
    summary = convert(trained.path, tmp_path / "hf", "hf")
    assert summary["models"] == ["blt", "entropy_model"]
    (of_hf,) = bltjax.load(tmp_path / "hf").score([TEXT])
    assert of_hf.nats == score.nats


def test_an_adapter_goes_alone_and_onto_its_base(trained, sources, tmp_path):
    (score,) = bltjax.load(trained.path).score([TEXT])
    summary = convert(trained.path, tmp_path / "adapter", "peft")
    assert summary["models"] == ["blt"]
    with safetensors.safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "np") as file:
        sizes = [file.get_tensor(name).size for name in file.keys()]  # noqa: SIM118
    assert summary["parameters"] == sum(sizes) and summary["bytes"] == 4 * sum(sizes)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "checksums.json"}
    (found,) = bltjax.load(sources["hf"], adapter=tmp_path / "adapter").score([TEXT])
    assert found.nats == score.nats
    convert(sources["hf"], tmp_path / "merged", "bltjax", adapter=tmp_path / "adapter")
    (found,) = bltjax.load(tmp_path / "merged").score([TEXT])
    assert found.nats == score.nats


@pytest.mark.parametrize("harm", ["base", "shape", "missing", "extra", "kind", "value"])
def test_an_adapter_for_something_else_is_refused(trained, sources, tmp_path, harm):
    convert(trained.path, tmp_path / "adapter", "peft")
    base, said = sources["hf"], tmp_path / "adapter" / "adapter_config.json"
    told = json.loads(said.read_text())
    (tmp_path / "adapter" / "checksums.json").unlink()
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    if harm == "base":
        base = shutil.copytree(sources["hf"], tmp_path / "base")
        wq = "model.global_transformer.layers.0.self_attn.q_proj.weight"
        directories.rewrite(base, lambda x: x.update({wq: x[wq] + 1e-3}))
        expected = "it was trained on other weights, those of"
    elif harm == "shape":
        told["r"], expected = 2, r"has shape \[3, \d+\], the base \[2, \d+\]"
    elif harm == "missing":
        tensors.unlink()
        expected = "adapter_model.safetensors"
    elif harm == "kind":
        told["peft_type"], expected = "LOHA", "peft_type='LOHA': only 'LORA' can be read"
    else:
        tensors.rename(tmp_path / "adapter" / "model.safetensors")
        name = next(iter(directories.load_file(tmp_path / "adapter" / "model.safetensors")))

        def change(found):
            if harm == "extra":
                found["base_model.model.model.elsewhere.lora_A.weight"] = found[name]
            else:
                found[name] = np.full_like(found[name], np.nan)

        directories.rewrite(tmp_path / "adapter", change)
        (tmp_path / "adapter" / "model.safetensors").rename(tensors)
        expected = "has no place in the base" if harm == "extra" else "values that are NaN"
    said.write_text(json.dumps(told))
    with pytest.raises(WeightsError, match=expected):
        bltjax.load(base, adapter=tmp_path / "adapter")


def test_a_source_without_adapters_has_none_to_write(sources, tmp_path):
    with pytest.raises(WeightsError, match="the source was not trained with adapters"):
        convert(sources["hf"], tmp_path / "adapter", "peft")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"blt.lora.targets": ("*.wqq.weight",)}, r"'\*\.wqq\.weight' matches no matrix"),
        ({"start_from": ""}, "adapters adapt trained weights, give their directory as start_from"),
    ],
)
def test_adapters_of_nothing_are_refused(sources, config, tmp_path, changes, said):
    given = config(sources["hf"], **LORA | changes)
    with pytest.raises(ValueError, match=said):
        check_run(given, tmp_path / "run")


def test_patterns_name_matrices_of_all_layers():
    name = "global_transformer.layers.attention.wq.weight"
    for pattern in (name, "global_transformer.layers.*.attention.w[qk].weight", "*attention*"):
        assert matches(name, pattern)
    assert not matches(name, "global_transformer.layers.*.attention.w[vo].weight")
    assert not matches("local_encoder.layers.attention.wq.weight", "global*")


def test_dropout_leaves_out_inputs_of_adapters_alone(trained):
    stage = trained.stage(trained.config(), "blt")
    model = dataclasses.replace(
        stage.model, lora=dataclasses.replace(stage.model.lora, dropout=0.5)
    )
    params = stage.params()
    tokens = jnp.full((1, 24), 100, jnp.int32)
    patches = buffers_from_lengths(jnp.asarray([[1, 4, 20]], jnp.int32), 24)

    def found(params, key=None):
        return np.asarray(logits(model, params, tokens, patches, key))

    first, again, other = (found(params, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4 and np.abs(first - found(params)).max() > 1e-4
    zeros = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "lora_B" in jax.tree_util.keystr(path) else x, params
    )
    np.testing.assert_array_equal(found(zeros, jax.random.key(0)), found(zeros))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 1)])
def test_it_is_the_same_on_any_mesh(use_mesh, sizes):
    """Gradients of adapters too."""
    from tests import golden

    name = golden.MODELS[0]
    lora = LoRAConfig(rank=4, targets=("*w[qkvo123].weight",))
    config = dataclasses.replace(golden.blt_config(name), lora=lora)
    tokens = np.random.default_rng(0).integers(4, 260, (8, 24)).astype(np.int32)
    lengths = np.tile(np.asarray([[1, 4, 20]], np.int32), (8, 1))

    def gradients():
        fresh = functional.init(config, jax.random.key(0))
        patches = buffers_from_lengths(jnp.asarray(lengths), 24)

        def loss(params):
            logits = functional.apply(config, params, jnp.asarray(tokens), patches)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return {
            name: np.asarray(x)
            for name, x in flat(jax.jit(jax.grad(loss))(fresh)).items()
            if is_adapter(name)
        }

    expected = gradients()
    with use_mesh(*sizes):
        found = gradients()
    assert found and any(np.abs(x).max() > 0 for x in found.values())
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-7, err_msg=name)


def test_peft_opens_it(trained, sources, tmp_path):
    """On top of transformers' port, whose logits are then those of the merged run."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    convert(trained.path, tmp_path / "adapter", "peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(sources["hf"])
    tokens = np.random.default_rng(0).integers(4, 260, (1, 24))
    plain = base(torch.tensor(tokens)).logits.detach().numpy()
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    logits = adapted(torch.tensor(tokens)).logits.detach().numpy()
    ours = bltjax.load(trained.path).logits(tokens)
    np.testing.assert_allclose(logits, ours, rtol=0, atol=1e-4)
    assert np.abs(logits - plain).max() > 1e-3

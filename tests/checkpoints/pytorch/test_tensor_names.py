"""The table of names, against every tensor of the released models."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch.tensor_names import (
    BLT_NAMES,
    ENTROPY_MODEL_NAMES,
    HF,
    META,
    from_published,
    to_published,
)
from bltjax.checkpoints.weights import flat, shapes
from bltjax.model import functional
from tests import golden
from tests.released import expected_shapes, released


def published_shapes(config, style):
    """Name and shape of every tensor of a model; nothing is computed."""
    return shapes(to_published(config, functional.abstract_params(config), style))


@pytest.mark.parametrize("size, count", [("1b", 386), ("7b", 405)])
def test_every_tensor_of_metas_files_has_its_place(size, count):
    found = published_shapes(released(f"blt_{size}").blt, META)
    assert found == expected_shapes("meta", size)
    assert len(found) == count


def test_every_tensor_of_metas_entropy_model_has_its_place():
    found = published_shapes(released("entropy_100m").entropy_model, META)
    assert found == expected_shapes("meta", "entropy")
    assert len(found) == 129


@pytest.mark.parametrize("size, count", [("1b", 510), ("7b", 529)])
def test_every_tensor_of_hugging_faces_files_has_its_place(size, count):
    blt = published_shapes(released(f"blt_{size}").blt, HF)
    patcher = published_shapes(released("entropy_100m").entropy_model, HF)
    assert not set(blt) & set(patcher)
    assert blt | patcher == expected_shapes("hf", size)
    assert len(blt | patcher) == count


@pytest.mark.parametrize("names", [BLT_NAMES, ENTROPY_MODEL_NAMES])
def test_no_name_stands_for_two_tensors(names):
    for field in ("meta", "hf", "path"):
        values = [getattr(name, field) for name in names]
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("style", [META, HF])
@pytest.mark.parametrize("model", golden.MODELS)
def test_published_names_and_back_change_no_bit(style, model):
    config, params = golden.blt_config(model), golden.params(model)
    tensors = {n: read_all(t) for n, t in to_published(config, params, style).items()}
    again, problems = from_published(config, tensors, style)
    assert not problems
    assert flat(again).keys() == flat(params).keys()
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(read_all(flat(again)[path]), leaf, err_msg=path)


@pytest.mark.parametrize("style", [META, HF])
def test_files_have_the_rows_of_tables_that_are_published(style):
    model = golden.blt_config("meta_B_7b_like")
    config = dataclasses.replace(model, hash=dataclasses.replace(model.hash, vocab=5000))
    path = "encoder_hash_tok_embedding.weight"
    held = flat(functional.abstract_params(config))[path].shape
    assert held[1] == config.hash.rows == 5120  # chips share 1024 rows evenly
    tables = np.random.default_rng(0).normal(0, 1, held).astype(np.float32)
    abstract = to_published(config, functional.abstract_params(config), style)
    given = {n: np.broadcast_to(np.float32(0), t.shape) for n, t in abstract.items()}
    params, _ = from_published(config, given, style)
    params["encoder_hash_tok_embedding"]["weight"] = tables
    files = {n: read_all(t) for n, t in to_published(config, params, style).items()}
    assert {n: t.shape for n, t in files.items()} == {n: t.shape for n, t in abstract.items()}
    again, problems = from_published(config, files, style)
    assert not problems
    np.testing.assert_array_equal(read_all(flat(again)[path])[:, :5000], tables[:, :5000])
    assert not read_all(flat(again)[path])[:, 5000:].any()


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=15)
def test_each_tensor_that_is_missing_unexpected_or_misshapen_is_named(data):
    config = golden.blt_config("meta_B_7b_like")
    style = data.draw(st.sampled_from([META, HF]))
    tensors = dict(to_published(config, functional.abstract_params(config), style))
    missing = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=3))
    kept = sorted(set(tensors) - missing)
    misshapen = data.draw(st.sets(st.sampled_from(kept), max_size=3))
    for name in missing:
        del tensors[name]
    for name in misshapen:
        tensors[name] = np.zeros((*tensors[name].shape[:-1], tensors[name].shape[-1] + 1))
    unexpected = data.draw(st.sets(st.sampled_from(["a.weight", "local_encoder.bias"])))
    tensors |= {name: np.zeros(3) for name in unexpected}
    _, problems = from_published(config, tensors, style)
    for name in missing:
        assert f"{name} is missing" in problems
    for name in unexpected:
        assert f"{name} is unexpected" in problems
    for name in misshapen:
        assert any(p.startswith(f"{name} has shape") for p in problems)
    dtypes = [p for p in problems if " come in " in p]  # float64 among float32
    assert len(problems) == len(missing) + len(unexpected) + len(misshapen) + len(dtypes)

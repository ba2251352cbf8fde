"""Byte models around tokenized ones in a bucket."""

import jax
import pytest

from bltjax import sharding
from bltjax.checkpoints.pytorch import llama
from bltjax.recipe.byteify import byteify
from bltjax.runtime import buckets, object_cache
from tests import llamas


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    settings = object_cache.Settings(str(tmp_path / "cache"))
    monkeypatch.setattr(object_cache, "_settings", settings)


def test_a_tokenized_model_is_read_from_a_bucket(bucket, tmp_path):
    source = llamas.write(tmp_path / "source")
    buckets.upload_below(source, bucket)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        found = llama.read(llama.local_path(str(bucket)))
        assert found.settings == llama.read(source).settings
    with pytest.raises(FileNotFoundError, match=rf"^no directory {bucket}/none: give"):
        llama.local_path(f"{bucket}/none")


def test_a_target_in_a_bucket_that_exists_is_refused(bucket, tmp_path, monkeypatch):
    """And is no directory named gs: on the local disk."""
    source = llamas.write(tmp_path / "source")
    buckets.write(bucket / "file", b"work")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match=rf"^{bucket} exists: choose another target"):
        byteify(source, str(bucket))
    assert list(buckets.below(bucket)) == ["file"]
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "cache"}

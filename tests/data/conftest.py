"""A small corpus, and its records."""

import shutil

import pytest

from bltjax.config.data import DataConfig
from bltjax.data.records import store as records
from tests.record_stores import add_entropies, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> DataConfig:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory) -> records.Store:
    """An uninterrupted store with entropies; not to be changed."""
    store = records.build(tmp_path_factory.mktemp("whole"), corpus)
    add_entropies(store)
    return store


@pytest.fixture
def store(whole, tmp_path) -> records.Store:
    """A copy of it to work on."""
    return records.open_store(shutil.copytree(whole.directory, tmp_path / "records"))

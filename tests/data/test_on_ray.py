"""What goes wrong with a cluster is told; sums of histograms are those of one process."""

import dataclasses
import os
import signal
import sys
import types

import jax
import numpy as np
import pytest

from bltjax.config import EntropyModelConfig, TransformerConfig
from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data import on_ray
from bltjax.data.records import store as records
from bltjax.data.records.entropies import TrainedModel
from bltjax.data.records.writing import Task
from bltjax.data.sources.units import Unit
from bltjax.model import functional
from bltjax.runtime import signals
from tests.processes import environment, free_port
from tests.record_stores import files_of

TINY = EntropyModelConfig(
    TransformerConfig(dim=16, num_layers=1, num_heads=2, window=5, ffn_multiple_of=8)
)


def connected(address):
    with on_ray.connect(address):
        pass


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"ray is needed .*: pip install 'bltjax\[ray\]'$"):
        connected("local")


@pytest.mark.parametrize("address", ["", "cluster", "ray://head:10001", "head:", "a:b", "host:1:2"])
def test_no_address(address):
    pytest.importorskip("ray", reason="the extra ray")
    with pytest.raises(ValueError, match=f"--ray='{address}': give HOST:PORT, auto or local"):
        connected(address)


def test_nobody_answers():
    pytest.importorskip("ray", reason="the extra ray")
    port = free_port()
    with pytest.raises(
        OSError, match=rf"--ray=127.0.0.1:{port}: no Ray cluster answers \(.*refused"
    ):
        connected(f"127.0.0.1:{port}")
    with pytest.raises(OSError, match=r"--ray=127.0.0.1:99999: no Ray cluster answers"):
        connected("127.0.0.1:99999")


def only_here(monkeypatch):
    """Returns a module that processes of a cluster lack, with something that tasks are given."""
    module = types.ModuleType("only_here")
    exec("class Absent: pass\ndef record(*_): pass\n", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    return module


class Deadly:
    """Ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.mark.long
def test_a_local_cluster(corpus, whole, store, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra ray")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they wait for all other tests
    monkeypatch.setattr(on_ray, "SUMMED", 3)
    handler = signals.Leaving(lambda number: None)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with on_ray.connect("local") as cluster:
            assert signal.getsignal(signal.SIGTERM) is handler
            check_records(cluster, corpus, tmp_path)
            check_sums(cluster, whole)
            check_endings(cluster, store)
            check_machines_without_bltjax(cluster, store, only_here(monkeypatch), monkeypatch)
    finally:
        signal.signal(signal.SIGTERM, before)


def check_records(cluster, corpus, tmp_path):
    """They are those of one process; a bad one is skipped and named, or ends the work."""
    one = files_of(records.build(tmp_path / "one", corpus).directory)
    made = records.build(tmp_path / "cluster", corpus, cluster)
    assert files_of(made.directory) == one
    assert [bad.name for bad in made.bad["web"].first] == ["1.jsonl.gz:line 21"]
    strict = dataclasses.replace(corpus, bad_records="fail")
    named = r"^bad record '1\.jsonl\.gz:line 21' of source 'web': .*; mend it, or set"
    with pytest.raises(ValueError, match=named):
        records.build(tmp_path / "strict", strict, cluster)


def check_sums(cluster, whole):
    assert len(whole.shards()) > 9  # so that sums are summed
    ours, theirs = records.score_histogram(whole.shards()), cluster.score_histogram(whole.shards())
    assert list(ours) == list(theirs)
    for key, histogram in ours.items():
        np.testing.assert_equal(theirs[key].arrays(), histogram.arrays())
    assert cluster.score_histogram([]) == {}


def check_endings(cluster, store):
    """Errors of tasks come as they are; processes that end again and again are told."""
    shard = store.shards()[0]
    shard.scores_path.write_bytes(b"no histograms")
    with pytest.raises(ValueError, match=r"scores\.npz is damaged"):
        cluster.score_histogram([shard])
    task = Task(SourceConfig("web", "nowhere"), Unit("0", "text", (), 0, -1, 10), Deadly(), [])
    with pytest.raises(OSError, match=r"^part web/0 of the text: a process .* ended 4 times while"):
        cluster.record_units(store.directory, [task], DataConfig(), None)
    shard.entropies_path.unlink()
    with pytest.raises(OSError, match=r"^the entropy model: a process .* ended 4 times while"):
        cluster.add_entropies(store, [shard], Deadly())
    with pytest.raises(Exception, match="'str' object has no attribute"):
        cluster.add_entropies(store, [shard], "no model")
    params = jax.tree.map(np.asarray, functional.init(TINY, jax.random.key(0)))
    model = TrainedModel(TINY, params, False, 512, "")
    with pytest.raises(OSError, match=r"^the entropies of .*array_record: a .* ended 4 times"):
        cluster.add_entropies(store._replace(sources=Deadly()), [shard], model)
    cluster.add_entropies(store, [shard], model)
    assert records.has_entropies(shard)


def check_machines_without_bltjax(cluster, store, module, monkeypatch):
    """Told in one line, whether a function, an argument or the model of an actor is lacking."""
    shard = store.shards()[0]
    shard.entropies_path.unlink()
    said = r"^only_here is not installed on a machine .*: run pip install 'bltjax\[ray\]' on each"
    with pytest.raises(OSError, match=said):
        cluster.score_histogram([module.Absent()])
    with pytest.raises(OSError, match=said):
        cluster.add_entropies(store, [shard], module.Absent())
    monkeypatch.setattr(on_ray, "_record", module.record)
    task = Task(SourceConfig("web", "nowhere"), Unit("0", "text", (), 0, -1, 10), "", [])
    with pytest.raises(OSError, match=said):
        cluster.record_units(store.directory, [task], DataConfig(), None)

"""A server of buckets that has faults: nothing half-written is read, and what fails is one line."""

import json
import os
import subprocess
import sys

import pytest

from bltjax.checkpoints.orbax_weights import read_record
from bltjax.runtime import buckets
from bltjax.runtime.paths import as_path
from tests.buckets.proxy import OF_SERVERS, Proxy, drawn
from tests.processes import ROOT, environment, write_corpus


@pytest.fixture
def proxied(server, monkeypatch):
    """`proxied(fault)` has this process, and those that it starts, ask through a Proxy."""
    from google.cloud.storage import retry

    made = []

    def begin(fault):
        made.append(Proxy(server.url, fault))
        for name in (buckets.EMULATOR, buckets.TENSORSTORE):
            monkeypatch.setenv(name, made[-1].url)
        buckets._client.cache_clear()
        buckets._check.cache_clear()
        return made[-1]

    quick = retry.DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.1, multiplier=2)
    monkeypatch.setattr(retry, "DEFAULT_RETRY", quick)
    yield begin
    for proxy in made:
        proxy.close()
    buckets._client.cache_clear()
    buckets._check.cache_clear()


@pytest.fixture
def own_environment():
    """The server is asked through a proxy here."""


@pytest.mark.parametrize("fault", OF_SERVERS)
def test_a_request_that_fails_is_made_again(bucket, proxied, tmp_path, fault):
    """Each has the fault the first time, also where what it asks for is done."""
    seen = set()

    def once(method, path):
        first = (method, path) not in seen
        seen.add((method, path))
        # Asked again for a large upload that is done, Google's server says so, and this one fails.
        is_lost = method == "PUT" and fault in ("unanswered", "cut off")
        return fault if first and not is_lost else None

    proxy = proxied(once)
    data, large = bytes(range(256)) * 40, tmp_path / "large"
    generation = buckets.write(bucket / "file", data, generation=0)
    assert buckets.read_object(bucket / "file") == (data, generation)
    newer = buckets.write(bucket / "file", data[::-1], generation)
    assert newer != generation and buckets.found(bucket / "file").generation == newer
    with pytest.raises(buckets.Changed, match="was written by another process"):
        buckets.write(bucket / "file", data, generation)
    large.write_bytes(os.urandom(9_000_000))  # sent in parts
    buckets.upload(large, bucket / "large")
    buckets.download(bucket / "large", tmp_path / "came")
    assert (tmp_path / "came").read_bytes() == large.read_bytes()
    buckets.copy(bucket / "file", bucket / "copy" / "of")
    assert buckets.entries(bucket)[1] == ["copy"]
    buckets.move_below(bucket / "copy", bucket / "moved")
    assert buckets.below(bucket).keys() == {"file", "large", "moved/of"}
    assert buckets.read(bucket / "moved" / "of") == data[::-1]
    buckets.delete_below(bucket)
    assert buckets.below(bucket) == {}
    assert len(proxy.faults) > 10


# Commands


def command(module, *arguments, **env):
    """Exit code and output of a command; env: changes of it, None for what is not there."""
    words = [sys.executable, "-m", f"bltjax.{module}", *map(str, arguments)]
    env = environment() | dict(NO_GCE_CHECK="true") | env
    env = {name: value for name, value in env.items() if value is not None}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


def training(workdir, places, *options):
    steps = "--config.entropy_training.steps=8", "--config.entropy_training.checkpoint_every=4"
    text = f"--config.data.root={places / 'corpus'}", f"--config.data.cache={places / 'cache'}"
    stage = "--config=tests/configs/tiny.py", "--config.stages=('entropy_model',)"
    return "train", *stage, *steps, *text, f"--workdir={workdir}", *options


@pytest.mark.slow
@pytest.mark.parametrize("seed", os.environ.get("MOMENTS", "3").split(","))
def test_training_goes_on_through_faults(bucket, server, proxied, tmp_path, seed):
    """Or ends with one line, and goes on where the server is well again; the bits are the same."""
    write_corpus(tmp_path / "corpus")
    code, said = command(*training(bucket / "whole", tmp_path))
    assert code == 0, said
    proxy = proxied(drawn(seed, 0.06))
    code, said = command(*training(bucket / "faults", tmp_path))
    assert proxy.faults
    if code:
        check_one_line(code, said)
        proxy.fault = lambda *_: None
        code, said = command(*training(bucket / "faults", tmp_path))
    assert code == 0, said
    proxied(lambda *_: None)
    paths = [bucket / name / "entropy_model" for name in ("whole", "faults")]
    lines = [buckets.read(path / "metrics.jsonl").splitlines() for path in paths]
    losses = [[json.loads(line)["loss"] for line in of_run] for of_run in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    records = [read_record(path / "checkpoints" / "8") for path in paths]
    assert records[0]["arrays"] == records[1]["arrays"]


def check_one_line(code, said):
    last = said.strip().splitlines()[-1]
    assert code in (1, 2) and "Traceback" not in said, said
    assert last.startswith("error: ") and "run it again" in last, said


@pytest.fixture
def weights(made_bucket):
    """The path of a small model in the bucket."""
    path = f"gs://{made_bucket.name}/demo"
    buckets.opened(path)
    if not buckets.below(path):
        buckets.upload_below(ROOT / "bltjax" / "demo", path)
    return as_path(path)


def asking(model, places):
    """Commands that read or write a bucket."""
    (places / "text").write_text("a text")
    return {
        "train": training(model.parent / "refused", places),
        "evaluate": ("evaluate", f"--checkpoint={model}", f"--data={places / 'text'}"),
        "generate": ("generate", f"--checkpoint={model}", "--prompt=a", "--max_new_bytes=1"),
        "convert": ("convert", "--source=demo", f"--target={model.parent / 'hf'}", "--format=hf"),
        "read": ("convert", f"--source={model}", f"--target={places / 'hf'}", "--format=hf"),
    }


NAMES = ("train", "evaluate", "generate", "convert", "read")
ROLE = "give it the role Storage Object Admin (roles/storage.objectAdmin) of gs://texts, or"


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_no_permission(weights, proxied, tmp_path, name):
    """An account that may list, and neither read nor write, gets one line."""
    write_corpus(tmp_path / "corpus")
    proxied(lambda method, path: None if "/o?" in path and method == "GET" else "403")
    code, said = command(*asking(weights, tmp_path)[name])
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("error: gs://texts/") and ROLE in said, said


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_no_credentials_and_no_bucket(weights, tmp_path, name):
    write_corpus(tmp_path / "corpus")
    words = asking(weights, tmp_path)[name]
    code, said = command(*(str(word).replace("gs://texts/", "gs://absent/") for word in words))
    assert code == 2, said
    assert said == "error: there is no bucket gs://absent: check its name, or create it\n"
    nothing = dict(HOME=str(tmp_path), GOOGLE_APPLICATION_CREDENTIALS="")
    env = dict.fromkeys((buckets.EMULATOR, buckets.TENSORSTORE))
    code, said = command(*words, **nothing, **env)
    assert (code, said.count("\n")) == (2, 1), said
    assert "run `gcloud auth application-default login`" in said, said

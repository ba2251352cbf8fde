"""Runs with a teacher: what they need, that they go on, and that files of GGUF teach too."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from bltjax import sharding
from bltjax.checkpoints import formats
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch import gguf_tokenizer
from bltjax.checkpoints.weights import flat
from bltjax.config import RunConfig, from_config_dict
from bltjax.data import tokenizer
from bltjax.data.teacher_tokens import TeacherTokenizer
from bltjax.recipe.byteify import LocalSizes, byteify
from bltjax.recipe.checks import check_run
from bltjax.recipe.stages import run
from tests import llamas, processes
from tests.configs import tiny_start
from tests.interruptions import interrupted_at
from tests.processes import metrics

pytestmark = pytest.mark.long  # one interpreter will do
pytest.importorskip("tokenizers", reason="the extra tokens")

VOCAB = 300
SMALL = LocalSizes(dim=16, heads=2, decoder_layers=1, window=16, hash_sizes=(3,), hash_vocab=101)
TEACHER = "blt_training.teacher."


@functools.cache
def tokenizer_json() -> str:
    return tokenizer.train([b"patch byte latent patch byte latent x=1;\n" * 9], VOCAB).text


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """A directory with a teacher, the byte model made of it, and a corpus."""
    top = tmp_path_factory.mktemp("teacher")
    source = llamas.write(top / "source", vocab_size=VOCAB)
    (source / "tokenizer.json").write_text(tokenizer_json())
    byteify(source, top / "bytes", sizes=SMALL)
    processes.write_corpus(top / "corpus")
    return top


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        sharding,
        "make_mesh",
        lambda config=None, devices=None: make_mesh(devices=(devices or jax.devices())[:1]),
    )


def settings(top, **changes) -> dict:
    return {
        "start_from": str(top / "bytes"),
        "data.root": str(top / "corpus"),
        "data.shard_bytes": 100_000,
        "stages": ("entropies", "blt"),
        "blt_training.optimizer.global_rate": 0.0,
        TEACHER + "source": str(top / "source"),
    } | {name.replace("__", "."): value for name, value in changes.items()}


def config_of(top, **changes) -> RunConfig:
    given = tiny_start.get_config()
    given.update_from_flattened_dict(settings(top, **changes))
    config = from_config_dict(RunConfig, given)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1))


def params_of(directory) -> dict:
    return {k: read_all(v) for k, v in flat(formats.read(directory).params["blt"]).items()}


# Bad input


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(blt_training__optimizer__global_rate=0.5), r"global_rate=0\.5 with .*set it 0"),
        (dict(start_from=""), r"source='.*' without start_from: .* give that directory"),
        (dict(blt__lora__rank=2), r"with blt\.lora\.rank=2: adapters would change"),
        ({TEACHER + "source": "", TEACHER + "tokenizer": "x"}, "'x' changes nothing without a"),
        ({TEACHER + "feed": 0.5, TEACHER + "align": 0.0}, r"align=0 with .*above 0, or feed=0"),
        ({TEACHER + "feed": 1.5}, r"feed=1\.5 must lie between 0 and 1"),
        ({TEACHER + "temperature": 0.0}, r"temperature=0\.0 must be positive"),
        (dict(entropy_training__teacher__source="x"), "the entropy model has no layers of a"),
        (dict(token_training__teacher__source="x"), "the token model has no layers of a"),
    ],
)
def test_settings_that_no_teacher_can_have(top, changes, said):
    with pytest.raises(ValueError, match=said):
        config_of(top, **changes)


def check(top, tmp_path, **changes):
    check_run(config_of(top, **changes), tmp_path / "run")


def test_a_source_that_cannot_teach_is_refused_at_once(top, tmp_path):
    def refused(said, **changes):
        with pytest.raises((ValueError, OSError), match=said):
            check(top, tmp_path, **changes)
        assert not (tmp_path / "run").exists()

    other = llamas.write(tmp_path / "other", vocab_size=VOCAB, num_hidden_layers=1)
    refused(
        r"other layers than the global transformer \(num_layers 1 there, 2 here\): give the model",
        **{TEACHER + "source": str(other)},
    )
    small = llamas.write(tmp_path / "small", vocab_size=261)
    (small / "tokenizer.json").write_text(tokenizer_json())
    refused(
        r"its tokenizer has \d+ tokens, and the model has embeddings of 261: give the tokenizer",
        **{TEACHER + "source": str(small)},
    )
    bare = llamas.write(tmp_path / "bare", vocab_size=VOCAB)
    refused(
        r"there is no tokenizer\.json: give the path of one as blt_training\.teacher\.tokenizer",
        **{TEACHER + "source": str(bare)},
    )
    headless = llamas.write(
        tmp_path / "headless", vocab_size=VOCAB, change=lambda x: x.pop("model.norm.weight")
    )
    refused(r"its norm is missing, and should have \(32,\)", **{TEACHER + "source": str(headless)})
    refused("no such file or directory", **{TEACHER + "source": str(tmp_path / "nowhere")})


def test_layers_with_other_values_are_refused(top, tmp_path):
    def change(found):
        found["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3

    other = llamas.write(tmp_path / "other", vocab_size=VOCAB, change=change)
    config = config_of(
        top,
        **{TEACHER + "source": str(other), TEACHER + "tokenizer": str(top / "source")},
    )
    with pytest.raises(ValueError, match=r"its feed_forward\.w3\.weight has other values"):
        run(check_run(config, tmp_path / "run"))


# A run


def train(config, workdir):
    run(check_run(config, workdir))
    return workdir


def test_interrupted_it_ends_as_if_nothing_had_happened_but_not_with_another_teacher(top, tmp_path):
    config = config_of(top, blt_training__steps=8, **{TEACHER + "feed": 0.5})
    whole, broken = train(config, tmp_path / "whole"), tmp_path / "broken"
    with interrupted_at(4):
        train(config, broken)
    file = top / "source" / "tokenizer.json"
    content = json.loads(tokenizer_json())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    file.write_text(json.dumps(content))
    try:
        with pytest.raises(ValueError, match=r"put what blt_training\.teacher names back"):
            train(config, broken)
    finally:
        file.write_text(tokenizer_json())
    lines = metrics(train(config, broken), "blt")
    assert lines == metrics(whole, "blt")
    assert any(line["aligned_share"] > 0 for line in lines)
    np.testing.assert_equal(params_of(broken), params_of(whole))
    before, after = params_of(top / "bytes"), params_of(whole)
    layers = {n for n in before if n.startswith("global_transformer.layers.")}
    assert layers and all(np.array_equal(before[n], after[n]) for n in layers)


# Tokenizers in GGUF files


def test_tokenizers_of_gguf_files_are_those_of_their_twins(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the extra gguf")
    content = json.loads(tokenizer_json())
    vocab = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in content["model"]["merges"]]

    def written(name, pre, **more):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_tokenizer_model(more.get("model", "gpt2"))
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(vocab)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(more.get("bos", False))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    text = "patch  byte's latent 123 naïve\n\n x=1;".encode()

    def read(path):
        return gguf_tokenizer.read(path, "--tokenizer")

    found = TeacherTokenizer(*read(written("a.gguf", "llama-bpe", bos=True)))
    twin = TeacherTokenizer(tokenizer_json())  # it has the same pattern
    np.testing.assert_array_equal(found.encode(text)[0], twin.encode(text)[0])
    assert found.bos == 1 and found.token_ends(text)[0] == 2 and twin.bos is None
    digits = TeacherTokenizer(*read(written("b.gguf", "smollm")))
    assert digits.bos is None and digits.encode(b"patch 12")[1].tolist()[-2:] == [1, 1]
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre='tekken' is none of gpt-2,"):
        read(written("c.gguf", "tekken"))
    said = r"'llama' is no byte-level BPE: give the model's tokenizer\.json as --tokenizer$"
    with pytest.raises(ValueError, match=said):
        read(written("d.gguf", "default", model="llama"))

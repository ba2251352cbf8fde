"""What a teacher knows and teaches: transformers and NumPy as oracles, gradients, ten steps."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import sharding
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch import llama
from bltjax.config import PatchingConfig, TeacherConfig, TrainingConfig
from bltjax.config.training import OptimizerConfig
from bltjax.data import tokenizer
from bltjax.data.batches.lanes import Layout
from bltjax.data.batches.loader import as_batch, whole_batches
from bltjax.data.batches.packing import OpenDocument, Packer, patch_ends
from bltjax.data.teacher_tokens import TeacherTokenizer
from bltjax.model import functional
from bltjax.patching.boundaries import patch_starts
from bltjax.recipe.byteify import LocalSizes, config_around
from bltjax.recipe.teacher import _arrays
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import start_state
from bltjax.training.step import make_train_step
from bltjax.training.teacher import distillation, token_log_likelihoods
from bltjax.vocabulary import encode
from tests import llamas

pytestmark = pytest.mark.long  # one interpreter will do
pytest.importorskip("tokenizers", reason="the extra tokens")

TEXTS = [
    b"the patch, the byte and the patches read a byte\n" * 4,
    "naïve 日本 x = 1;\n".encode() * 4,
]
VOCAB, L, P, N = 300, 96, 48, 64
SIZES = LocalSizes(dim=16, heads=2, decoder_layers=1, window=16, hash_sizes=(3,), hash_vocab=101)
FROZEN = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", global_rate=0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return llamas.write(tmp_path_factory.mktemp("teacher") / "source", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def tokens():
    return TeacherTokenizer(tokenizer.train(TEXTS, VOCAB).text)


@pytest.fixture(scope="module")
def taught(source, tokens):
    """The model, its parameters, the teacher's arrays, and a batch."""
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        opened = llama.read(source)
        config = config_around(opened.settings.stack, SIZES)
        params = functional.init(config, jax.random.key(0))
        layers = jax.tree.map(read_all, opened.layers)
        params["global_transformer"]["layers"] = sharding.put_whole(layers)
        return config, params, _arrays(opened), batch_of(tokens)


def batch_of(tokens):
    documents, rule = [], PatchingConfig("space")
    for text in TEXTS:
        ids = encode(text)
        ends = patch_ends(ids, patch_starts(rule, ids)[: len(ids)])
        documents.append(OpenDocument(ids, ends, teacher_tokens=tokens.token_ends(text)))
    packer, stream = Packer(L, P), iter(documents)
    rows = iter(functools.partial(packer.next_row, stream), None)
    return as_batch(next(whole_batches(rows, 4)), sources=True) | dict(stop=np.zeros(4, np.int32))


def steps(taught, count=1, optimizer=FROZEN, accumulation_steps=1, **teacher):
    """States before and after steps on one batch, and the metrics of each."""
    config, params, arrays, batch = taught
    settings = TrainingConfig(
        steps=100,
        optimizer=optimizer,
        teacher=TeacherConfig("source", **teacher),
        batch_size=4,
        accumulation_steps=accumulation_steps,
    )
    rule = make_optimizer(settings.optimizer, settings.steps)
    step = make_train_step(config, settings, rule, row_tokens=N)
    state, found = start_state(jax.tree.map(jnp.copy, params), rule), []
    for _ in range(count):
        state, metrics = step(state, batch, None, arrays)
        found.append({k: float(v) for k, v in metrics.items() if jnp.ndim(v) == 0})
    assert step._cache_size() == 1
    return state, found


# Oracles


def test_likelihoods_of_tokens_are_those_of_transformers(taught, source, tokens):
    torch = pytest.importorskip("torch", reason="the oracle needs torch==2.13.0 (CPU)")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers>=5.23")
    config, params, arrays, _ = taught
    ids, _ = tokens.encode(TEXTS[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(source).float().eval()
    with torch.no_grad():
        logits = torch.log_softmax(model(torch.tensor(ids[None])).logits, -1)
    expected = logits[0, np.arange(len(ids) - 1), ids[1:]].numpy()

    @jax.jit
    def likelihoods(params, arrays, ids):
        x = arrays["embeddings"][ids]
        hidden = functional.global_states(config, params, x, jnp.zeros(ids.shape, jnp.int32))
        return token_log_likelihoods(arrays, config.global_transformer.norm_eps, hidden, ids)

    found = likelihoods(params, arrays, jnp.asarray(ids[None], jnp.int32))
    assert np.asarray(found)[0, 0] == 0
    np.testing.assert_allclose(np.asarray(found)[0, 1:], expected, rtol=0, atol=1e-4)


def test_distillation_is_that_of_numpy():
    student, teacher = np.meshgrid(
        -np.array([1e-3, 0.1, 1.0, 7.0, 80.0]), -np.array([0.0, 1e-4, 0.5, 3.0, 200.0])
    )
    y, s = np.exp(teacher / 5.0), np.exp(student / 5.0)  # float64
    expected = -(y * np.log(s) + (1 - y) * np.log(1 - s))
    found = distillation(*(jnp.asarray(x, jnp.float32) for x in (student, teacher)), 5.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    slopes = jax.vmap(jax.grad(lambda s, t: distillation(s, t, 5.0)))
    hard = jnp.array([0.0, -1e-30, -1e5, -np.log(2) * 5], jnp.float32)
    assert np.isfinite(slopes(hard, jnp.zeros(4))).all()


def test_sums_over_tokens_are_those_of_plain_python(taught):
    """Of a step with all parts, from the logits of the model itself."""
    config, params, arrays, batch = taught
    _, (metrics,) = steps(taught)
    expected = plain_sums(config, params, arrays, batch)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-4), name
    assert metrics["untaught_tokens"] == 0 and 0 < metrics["aligned_share"] < 1


def plain_sums(config, params, arrays, batch):
    """Means over tokens, of each row's documents run through the teacher alone."""
    from bltjax.patching.buffers import buffers_from_lengths

    patches = buffers_from_lengths(jnp.asarray(batch["patch_lengths"]), L)
    logits = functional.apply(
        config, params, batch["tokens"], patches, jnp.asarray(batch["document_ids"])
    )
    logs = np.asarray(jax.nn.log_softmax(logits, -1), np.float64)
    run = jax.jit(lambda x: functional.global_states(config, params, x, jnp.zeros((1, N), int)))
    losses, nats, num_bytes = [], [], 0
    for b, row in enumerate(batch["teacher_tokens"]):
        for document in np.unique(batch["document_ids"][b]):
            ends = np.flatnonzero((row > 0) & (batch["document_ids"][b] == document))
            ids = row[ends] - 1
            if len(ids) < 2:
                continue
            x = np.zeros((1, N), np.int32)
            x[0, : len(ids)] = ids
            hidden = run(arrays["embeddings"][x])
            eps = config.global_transformer.norm_eps
            known = np.asarray(token_log_likelihoods(arrays, eps, hidden, jnp.asarray(x)))[0]
            for n in range(1, len(ids)):
                places = np.arange(ends[n - 1], ends[n])  # of the bytes before each of its own
                if not batch["loss_mask"][b, places].all():
                    continue
                own = logs[b, places, batch["targets"][b, places]].sum()
                y, s = np.exp(known[n] / 5.0), np.exp(own / 5.0)
                losses.append(-(y * np.log(s) + (1 - y) * np.log1p(-s)))
                nats.append(-known[n])
                num_bytes += len(places)
    bits = np.sum(nats, dtype=np.float64) / num_bytes / np.log(2)
    return dict(distill=np.mean(losses), teacher_bits_per_byte=bits)


# What learns


def changed(taught, state):
    """Names of the first modules of which something has changed."""
    before, after = taught[1], state.params
    names = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    return {name for name, tree in names.items() if any(jax.tree.leaves(tree))}


ALONE = dataclasses.replace(FROZEN, weight_decay=0.0)


def test_the_global_transformer_stays_and_all_else_learns(taught):
    state, _ = steps(taught, optimizer=ALONE, align=1e-30)
    learned = {"local_encoder", "local_decoder", "encoder_hash_tok_embedding"}
    assert changed(taught, state) == learned
    assert np.abs(pooling(state.params) - pooling(taught[1])).max() > 1e-4


def test_where_the_decoder_is_fed_patches_learn_from_the_alignment_alone(taught):
    """What makes patches of bytes has gradients of it, and of nothing else."""
    apart = []
    for align in (1e-30, 1.0):  # 0 would be refused
        state, _ = steps(taught, optimizer=ALONE, align=align, feed=1.0)
        apart.append(np.abs(pooling(state.params) - pooling(taught[1])).max())
    assert apart[0] < 1e-6 < 1e-4 < apart[1]


def pooling(params):
    """Weights that patches alone depend on."""
    return np.asarray(params["local_encoder"]["cross_attn_layers"]["wv"]["weight"])


@pytest.mark.parametrize("feed", [0.0, 1.0])
def test_ten_steps_lower_every_loss(taught, feed):
    _, metrics = steps(taught, 10, feed=feed)
    for name in ("loss", "align", "distill"):
        assert metrics[-1][name] < 0.9 * metrics[0][name], name
    assert metrics[-1]["teacher_bits_per_byte"] == metrics[0]["teacher_bits_per_byte"]


def test_the_first_share_of_the_steps_is_fed(taught):
    """Of 100 steps the first 2, then the decoder reads patches again."""
    _, mixed = steps(taught, 3, feed=0.02)
    _, fed = steps(taught, 3, feed=1.0)
    _, own = steps(taught, 1, feed=0.0)
    assert [m["loss"] for m in mixed[:2]] == pytest.approx([m["loss"] for m in fed[:2]], rel=1e-5)
    assert mixed[2]["loss"] != pytest.approx(fed[2]["loss"], rel=1e-3)
    assert mixed[0]["loss"] != pytest.approx(own[0]["loss"], rel=1e-3)


def test_without_weights_it_is_the_plain_step(taught):
    config, params, _, batch = taught
    settings = TrainingConfig(steps=100, optimizer=FROZEN, batch_size=4)
    rule = make_optimizer(FROZEN, 100)
    state = start_state(jax.tree.map(jnp.copy, params), rule)
    _, plain = make_train_step(config, settings, rule)(state, batch)
    _, (found,) = steps(taught, align=0.0, distill=0.0)
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(float(plain[name]), rel=1e-5)


def test_parts_of_a_batch_add_up(taught):
    _, (one,) = steps(taught)
    _, (two,) = steps(taught, accumulation_steps=2)
    for name in ("align", "distill", "loss", "grad_norm"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)


def test_a_layout_without_a_teacher_has_no_tokens(taught):
    assert Layout(L).teacher is None
    row = Packer(L, 0).next_row(iter([OpenDocument(encode(b"ab"))]))
    assert "teacher_tokens" not in as_batch(row._replace(patch_lengths=np.zeros(0, np.int32)))
    assert json.dumps(sorted(taught[3])).count("teacher_tokens") == 1

"""`docs/model.md` must be true: its code, its numbers, and what refers to its sections."""

import math
import re
from functools import cache

import numpy as np
import pytest
from safetensors.numpy import load_file

from bltjax.config import OptimizerConfig, PatchingConfig, TransformerConfig
from bltjax.costs.flops import parameter_report
from bltjax.model import functional
from bltjax.ops.hashing import PRIMES, ngram_hash_ids
from bltjax.patching.boundaries import RULES, lengths_from_starts, patch_starts
from bltjax.training.optimizer import schedule_multiplier
from bltjax.vocabulary import encode
from tests import golden
from tests.released import released
from tests.test_docs import PAGES, ROOT, anchors, blocks, rows, section

PAGE = "docs/model.md"
FOLDERS = ("bltjax", "tests", "benchmarks", "configs", "launch")
CODE = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
REFERENCE = re.compile(r"([\w/]+\.md)((?:#[\w-]+)(?:, #[\w-]+)*)")
UNNAMED = re.compile(r"\bspec(?:ification)?,?\s+(?:sections?\s+)?\d", re.IGNORECASE)


def references(text):
    """(page, section) of each reference: one page may be named for several sections."""
    return [(p, s) for p, many in REFERENCE.findall(text) for s in re.findall(r"#([\w-]+)", many)]


def test_every_reference_resolves():
    found = [(path, *it) for path in CODE for it in references(path.read_text())]
    assert {"model.md"} <= {page for _, page, _ in found}
    for path, page, name in found:
        (target,) = {f for f in (ROOT / page, ROOT / "docs" / page) if f.exists()} or {None}
        assert target is not None, f"{path} names {page}, which does not exist"
        assert name in anchors(target.read_text()), f"{path} names {page}#{name}"


def test_pages_that_the_package_names_exist():
    package = [path for path in CODE if (ROOT / "bltjax") in path.parents]
    found = {name for path in package for name in re.findall(r"[\w/]+\.md\b", path.read_text())}
    assert found >= {"model.md", "differences.md"}
    assert all((ROOT / name).exists() or (ROOT / "docs" / name).exists() for name in found), found


def test_references_are_found():
    assert references("(model.md#entropy, #masks) and docs/data.md#rows.") == [
        ("model.md", "entropy"),
        ("model.md", "masks"),
        ("docs/data.md", "rows"),
    ]


def test_nothing_refers_to_a_description_that_is_not_here():
    assert UNNAMED.search("as in spec" + " 2.9") and UNNAMED.search("(spec" + " section 4)")
    texts = {str(path): path.read_text() for path in CODE} | PAGES
    assert not [name for name, text in texts.items() if UNNAMED.search(text)]


# The code of the page


@cache
def page():
    names = {}
    for code in blocks(PAGES[PAGE], "python"):
        exec(code, names)
    return names


def weights(name):
    return load_file(golden.GOLDEN / f"{name}.safetensors")


@pytest.mark.parametrize("name", golden.MODELS)
def test_its_code_computes_the_published_model(name):
    config, expected, w = golden.blt_config(name), golden.arrays(name), weights(name)
    for row, ids in enumerate(expected["tokens"]):
        lengths = expected["patch_lengths"][row]
        h, patches = page()["encode"](w, config, ids, page()["patch_ids"](lengths)[0], len(lengths))
        logits = page()["blt"](w, config, ids, lengths)
        np.testing.assert_allclose(h, expected["h_encoder"][row], rtol=0, atol=1e-5)
        np.testing.assert_allclose(logits, expected["logits"][row], rtol=0, atol=1e-5)
        if config.cross_attention.encoder:
            published = expected["h_cross"][row].reshape(patches.shape)
            np.testing.assert_allclose(patches, published, rtol=0, atol=1e-5)


def test_its_code_computes_the_published_entropies_and_patches():
    config, expected = golden.entropy_config(), golden.arrays("meta_entropy")
    for row, ids in enumerate(expected["tokens"]):
        logits = page()["entropy_model"](weights("meta_entropy"), config, ids)
        nats = page()["entropies"](logits)
        np.testing.assert_allclose(logits, expected["logits"][row], rtol=0, atol=1e-5)
        np.testing.assert_allclose(nats, expected["entropies"][row], rtol=0, atol=1e-5)
        patching = PatchingConfig(threshold=float(expected["threshold"]))
        lengths = page()["patch_lengths"](ids, nats, patching)
        np.testing.assert_array_equal(lengths, np.trim_zeros(expected["patch_lengths_next"][row]))


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("rule", sorted({*RULES} - {"script"}))
def test_its_code_finds_the_patches_of_every_rule(rule, limit):
    rng = np.random.default_rng(0)
    chosen = PatchingConfig(rule, threshold=0.3, threshold_add=0.2, max_patch_length=limit)
    ids = encode("Any 3 words,\n of text \N{EN DASH} é\N{SNOWMAN}!".encode() + bytes(range(256)))
    ids[::7] = 3
    for size in (1, 2, 3, len(ids)):
        nats = rng.random(size, np.float32)
        starts = patch_starts(chosen, ids[:size], nats)
        found = page()["patch_lengths"](ids[:size], nats, chosen)
        assert found == lengths_from_starts(starts).tolist()


# Its numbers


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text.replace(",", ""))]


def test_hash():
    assert page()["PRIMES"] == PRIMES
    (text,) = re.findall(r"The bytes `abc` are .*? and \d+\.", PAGES[PAGE], re.DOTALL)
    *ids, prime, num_rows, n, first, second, third = numbers(text)
    assert bytes(i - 4 for i in ids) == b"abc" and prime == PRIMES[0]
    found = ngram_hash_ids(np.array([ids]), (n,), 1, num_rows)
    assert np.ravel(found).tolist() == [first, second, third]


def test_feed_forward_widths():
    listed = re.findall(r"(\d+) -> (\d+)", section(PAGE, "Block"))
    assert len(listed) >= 5
    for dim, width in listed:
        assert TransformerConfig(dim=int(dim)).ffn_dim == int(width)


@pytest.mark.parametrize("which", [0, 1])
def test_sizes(which):
    """The tables of shapes and of parameters, each with a line for every published size."""
    tables = re.findall(r"^\| .*?(?=^$)", section(PAGE, "Sizes"), re.MULTILINE | re.DOTALL)
    named = set()
    for names, *cells in rows(tables[which]):
        for name in re.findall(r"`(\w+)`", names):
            named.add(name)
            blt = released(name).blt
            local, middle, after = blt.local_encoder, blt.global_transformer, blt.local_decoder
            cross = blt.cross_attention
            shape = (local.dim, local.num_layers, after.num_layers, local.num_heads)
            shape += (middle.dim, middle.num_layers, middle.num_heads, cross.k)
            if which == 1:
                count = parameter_report(blt, functional.abstract_params(blt))
                parts = ("local_encoder", "global_transformer", "local_decoder", "hash_tables")
                shape = tuple(count[part] for part in parts)
            assert tuple(int(cell.replace(",", "")) for cell in cells) == shape, name
            assert local.window == after.window == 512 and blt.hash.vocab == 500_002
            assert cross.num_heads == local.num_heads == after.num_heads
    assert named == {path.stem for path in (ROOT / "configs").glob("blt_*.py")}


def test_entropy_model_size():
    config = released("entropy_100m").entropy_model
    stack, text = config.transformer, section(PAGE, "Sizes").split("\n\n")[-2]
    total = parameter_report(config, functional.abstract_params(config))["total"]
    assert numbers(text) == [stack.dim, stack.num_layers, stack.num_heads, total]
    assert (stack.window, stack.rope_theta) == (512, 10_000)


def test_rules():
    listed = [row[0].strip("`") for row in rows(section(PAGE, "Rules").split("\n\n")[1])]
    assert sorted(listed) == sorted(RULES)


def test_share_of_a_cut_normal():
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    std = math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2)))
    assert f"{std:.5f} sigma" in section(PAGE, "Initial weights")


def test_optimizer():
    text = " ".join(section(PAGE, "Optimizer").split())
    published = OptimizerConfig()  # the defaults are those of a BLT
    fields = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "clip_norm")
    (said,) = re.findall(
        r"rate (\S+), beta (\S+) and (\S+), epsilon (\S+), weight decay (\S+)\. .* norm of (\d)\. ",
        text,
    )
    assert [float(x) for x in said] == [getattr(published, field) for field in fields]
    (said,) = re.findall(r"([\d,]+) steps, ([\d,]+) of warm-up, min_ratio (\S+)\. ", text)
    steps, warmup, ratio = (float(x.replace(",", "")) for x in said)
    assert (warmup, ratio) == (published.warmup_steps, published.min_ratio)
    said = re.findall(r"([\d.]+) at (?:step ([\d,]+\d)|the last)", text)
    assert len(said) == 3
    for value, step in said:
        step = int(step.replace(",", "") or steps - 1)
        assert abs(schedule_multiplier(published, step, int(steps)) - float(value)) < 1e-6

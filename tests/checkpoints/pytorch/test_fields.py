"""Settings of published formats, taken field by field."""

import hypothesis
import pytest
from hypothesis import strategies as st

from bltjax.checkpoints.pytorch import meta_config
from bltjax.checkpoints.pytorch.feed_forward import common_widths
from bltjax.checkpoints.pytorch.fields import (
    Fields,
    Pair,
    merged,
    read_json,
    read_pairs,
    write_pairs,
)
from bltjax.checkpoints.weights import Weights
from bltjax.config import BLTConfig, PatchingConfig, TransformerConfig
from tests import directories


def test_fields_are_taken_with_their_types():
    fields = Fields("args", {"a": 1, "b": 2.0, "c": None, "d": {"e": "x"}, "f": [1, 2], "g": True})
    assert (fields.take("a", float), fields.take("b", int)) == (1.0, 2)
    assert fields.take("c", int, 5) == 5 and fields.take("missing", int, 6) == 6
    assert fields.take("d.e", str) == "x" and fields.take("f", tuple) == (1, 2)
    assert fields.take("d.e.deeper", int, 7) == 7
    assert not fields.problems
    for path, kind, says in (
        ("c", int, "args.c is missing"),
        ("g", int, "args.g=True is bool, must be int"),
        ("f", int, "args.f=[1, 2] is list, must be int"),
        ("a", tuple, "args.a=1 is int, must be a list of whole numbers"),
    ):
        assert fields.take(path, kind) is None
        assert fields.problems[-1] == says
    fields.take("c", int)
    assert len(fields.problems) == 4  # each once


def test_fields_that_nobody_took_are_named_with_the_nearest():
    fields = Fields("args", {"window": 3, "group": {"widow": 1, "known": 2}, "ignored": {"x": 1}})
    fields.take("window", int)
    fields.take("group.known", int)
    fields.take("group.window", int, 4)
    fields.ignore(["ignored"])
    fields.check_all_known()
    assert fields.problems == [
        "args.group.widow=1 is a field that nobody knows: did you mean group.window?"
    ]


def test_values_that_are_not_supported_say_why():
    fields = Fields("args", {"a": 1, "b": None, "t": True})
    for path in ("b", "absent"):
        fields.must_be(path, (3,), "no")
    fields.must_be("a", (1,), "no")
    assert not fields.problems
    fields.must_be("t", (1,), "it is no number")  # True equals 1 in Python
    assert fields.problems == ["args.t=True is not supported: it is no number"]
    fields.must_not_be_null("b", "set it")
    fields.must_not_be_null("absent", "set it")
    assert fields.problems[1:] == ["args.b=null is not supported: set it"]


def test_pairs_go_both_ways_and_shared_fields_must_agree():
    pairs = [
        Pair("local_encoder.dim", "a.dim", int),
        Pair("local_decoder.dim", "a.dim", int),
        Pair("hash.sizes", "sizes", tuple),
    ]
    problems = []
    theirs = write_pairs(BLTConfig(), pairs, problems)
    assert theirs == {"a": {"dim": 64}, "sizes": [3, 4, 5, 6, 7, 8]} and not problems
    ours = read_pairs(Fields("args", theirs), pairs)
    assert ours["local_decoder"]["dim"] == 64 and ours["hash"]["sizes"] == (3, 4, 5, 6, 7, 8)
    write_pairs(BLTConfig(local_decoder=TransformerConfig(dim=32)), pairs, problems)
    assert problems == [
        "local_encoder.dim=64 and local_decoder.dim=32 differ: the format has one field for both, "
        "a.dim"
    ]


def test_merging_lets_later_ones_win():
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {
        "a": {"b": 3, "c": 2},
        "d": 4,
    }


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "is missing"),
        (b"{", "as JSON"),
        (b"\xff", "as JSON"),
        (b"[]", "list"),
        (b'{"a": 1, "b": 2, "a": 3}', "a is there twice"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "deep"),
        (b"[" * 10**5, "as JSON"),
    ],
)
def test_files_without_an_object_are_told(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    problems = []
    assert read_json(tmp_path / "config.json", problems) == {}
    assert len(problems) == 1 and says in problems[0] and "config.json" in problems[0]


@hypothesis.given(
    dims=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    multiplier=st.floats(0.3, 3.0),
    multiple_of=st.integers(1, 300),
)
def test_widths_of_one_formula_are_found_again(dims, multiplier, multiple_of):
    """From the widths alone: a multiplier and a multiple that give each of them."""
    stacks = [
        TransformerConfig(dim=d, ffn_dim_multiplier=multiplier, ffn_multiple_of=multiple_of)
        for d in dims
    ]
    hypothesis.assume(all(s.ffn_dim for s in stacks))
    widths = {
        str(i): TransformerConfig(dim=s.dim, ffn_width=s.ffn_dim) for i, s in enumerate(stacks)
    }
    problems = []
    found = common_widths(widths, problems)
    if not problems:
        for stack in stacks:
            again = TransformerConfig(
                dim=stack.dim, ffn_dim_multiplier=found[0], ffn_multiple_of=found[1]
            )
            assert again.ffn_dim == stack.ffn_dim
    if len(dims) == 1:
        assert not problems


def test_widths_of_no_formula_are_told():
    stacks = {
        "narrow": TransformerConfig(dim=64, ffn_width=900),
        "wide": TransformerConfig(dim=640, ffn_width=7),
    }
    problems = []
    common_widths(stacks, problems)
    assert problems and "900" in problems[0] and "7" in problems[0]


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_metas_settings_say_all_that_ours_do(data):
    """Any model that its format can express comes back as it was."""
    args = directories.settings("meta_B_7b_like")
    args |= dict(
        n_kv_heads=data.draw(st.sampled_from([None, 1])),
        n_kv_heads_global=data.draw(st.sampled_from([None, 1, 2])),
        local_attention_window_len=data.draw(st.integers(1, 600)),
        cross_attn_window_encoder=data.draw(st.none() | st.integers(1, 5)),
        cross_attn_all_layers_encoder=data.draw(st.booleans()),
        downsampling_by_pooling=data.draw(st.sampled_from(["max", "min", "avg", "mean"])),
        rope_theta=data.draw(st.floats(1.0, 1e6)),
        ffn_dim_multiplier=data.draw(st.floats(0.5, 2.0)),
        max_patch_length=data.draw(st.none() | st.integers(1, 9)),
        max_seqlen=data.draw(st.integers(1, 9999)),
        init_base_std=data.draw(st.none() | st.floats(0.01, 1.0)),
    )
    patcher = dict(
        threshold=data.draw(st.floats(-1.0, 5.0)),
        threshold_add=data.draw(st.none() | st.floats(-1.0, 1.0)),
        monotonicity=data.draw(st.booleans()),
    )
    problems = []
    first = meta_config.read_blt(args, patcher, problems)
    assert not problems
    written = meta_config.write_blt(first, problems)
    patcher = meta_config.write_patcher(first.patching, problems)
    again = meta_config.read_blt(written, patcher, problems)
    assert not problems
    assert again == first


def test_metas_format_refuses_what_it_cannot_say():
    problems = []
    patching = PatchingConfig(rule="words", target_patch_bytes=None, reset_at_newlines=True)
    local = TransformerConfig(window=9, norm_eps=1e-3)
    config = BLTConfig(local_decoder=local, skip_projection=True)
    meta_config.write_blt(Weights(config, None, patching, {}), problems)
    meta_config.write_patcher(patching, problems)
    for says in ("window", "norm_eps", "skip_projection", "rule='words'", "reset_at_newlines"):
        assert sum(says in problem for problem in problems) == 1, says

"""Whatever a source does not say, and conversion takes for granted, is noted by name."""

import json
import shutil
from types import SimpleNamespace

import pytest

import bltjax
from bltjax import cli
from bltjax.checkpoints import formats
from bltjax.checkpoints.pytorch import hf_config, meta_config
from bltjax.checkpoints.pytorch.convert import convert
from tests import directories, golden

# Fields of the golden files that change nothing here, whatever their value.
SILENT = {"_name_or_path", "architectures", "transformers_version", "id2label", "label2id"}


def paths(settings, prefix=""):
    for key, value in settings.items():
        if key in SILENT:
            continue
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def without(settings, path):
    """The settings without one field."""
    copy = json.loads(json.dumps(settings))
    *groups, last = path.split(".")
    group = copy
    for key in groups:
        group = group[key]
    del group[last]
    return copy


def meaning(weights):
    """All that is read but the notes."""
    return weights._replace(params={}, notes=())


HF_NOTED = {
    *(
        f"{group}.{field}"
        for group in ("encoder_config", "global_config", "decoder_config", "patcher_config")
        for field in (
            *("rms_norm_eps", "rope_parameters.rope_theta", "hidden_act", "hidden_size"),
            *("num_key_value_heads", "intermediate_size", "num_attention_heads"),
        )
    ),
    *("patch_size", "max_patch_length", "patching_threshold", "patching_mode", "patch_in_forward"),
    *("cross_attn_k", "encoder_hash_byte_group_size", "encoder_hash_byte_group_vocab"),
    *("encoder_hash_byte_group_nb_functions", "vocab_size", "local_attention_window_len"),
    *("patcher_config.sliding_window", "patcher_config.vocab_size"),
    *("encoder_config.cross_attn_all_layers", "decoder_config.cross_attn_all_layers"),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return directories.hub(tmp_path_factory.mktemp("notes") / "hf", "hf_A_1b_like")


def check_each_field(settings, read):
    """Without any one field it is refused, noted by its name, or nothing changes; returns which.

    read: returns weights or None, and adds to a list of problems.
    """
    complete = read(settings, [])
    assert complete.notes == ()
    noted = set()
    for path in paths(settings):
        found = read(without(settings, path), [])
        if found is None or f"{path}=" in " ".join(found.notes):
            noted.add(path)
        else:
            assert found == complete, path
    return noted


def test_every_field_of_hugging_face_is_noted_when_it_is_missing():
    assert check_each_field(directories.settings("hf_A_1b_like"), hf_config.read) >= HF_NOTED


@pytest.mark.parametrize("name", [*golden.MODELS, "meta_entropy"])
def test_every_field_of_metas_is_noted_when_it_is_missing(name):
    def read(args, problems):
        if name == "meta_entropy":
            return meta_config.read_entropy_model(args, problems)
        return meta_config.read_blt(args, {"threshold": 2.0}, problems)

    noted = check_each_field(directories.settings(name), read)
    assert noted >= {"rope_theta", "norm_eps", "max_seqlen", "multiple_of", "eos_id"}
    if name != "meta_entropy":
        assert noted >= {"monotonicity", "max_patch_length", "patch_size", "patching_mode"}
        assert "patching_threshold" not in noted  # the patcher says it


def test_meta_without_its_threshold_or_its_entropy_model(tmp_path):
    source = directories.hub(tmp_path / "source", "meta_A_1b_like")
    notes = convert(source, tmp_path / "target", "hf")["notes"]
    for wanted in (
        "there is no train_args.json",
        "patching_threshold=1.33544",
        "there is no entropy model",
        "--entropy_model=DIR",
    ):
        assert sum(wanted in note for note in notes) == 1, wanted
    half = bltjax.load(tmp_path / "target")
    for use in (lambda: half.generate("a", 3), lambda: half.score("abc")):
        with pytest.raises(ValueError, match=r"need an entropy model.*--entropy_model=DIR"):
            use()
    whole = directories.meta_with_entropy_model(tmp_path / "whole")
    assert convert(whole, tmp_path / "again", "meta")["notes"] == []


def test_a_threshold_that_is_said_anywhere_is_not_noted(tmp_path):
    source = directories.hub(tmp_path / "one", "meta_A_1b_like", patching_threshold=0.5)
    weights = formats.read(source)
    assert weights.patching.threshold == 0.5
    assert not any("patching_threshold=" in note for note in weights.notes)
    local = directories.local(tmp_path / "two", "meta_A_1b_like")
    told = " ".join(formats.read(local).notes)
    assert "params.json has no data.patcher_args" in told and "patching_threshold=" in told


def test_notes_of_the_directory_of_the_entropy_model_are_told(tmp_path):
    blt = directories.meta_with_entropy_model(tmp_path / "blt")
    other = directories.hub(tmp_path / "other", "meta_entropy")
    (other / "config.json").write_text(
        json.dumps({"args": without(directories.settings("meta_entropy"), "rope_theta")})
    )
    told = " ".join(formats.read(blt, other).notes)
    assert "rope_theta=10000.0" in told and str(other) in told
    assert "instead of its own" in told and "threshold stays 4.1017" in told
    shutil.rmtree(blt / "entropy_model")
    shutil.move(other, blt / "entropy_model")
    assert "rope_theta=10000.0" in " ".join(formats.read(blt).notes)


def test_what_is_left_behind_is_named(hf, tmp_path):
    source = shutil.copytree(hf, tmp_path / "hf")
    for name in ("LICENSE", "tokenizer.json", "consolidated.pth"):
        (source / name).write_text("")
    (source / ".gitattributes").touch()
    notes = convert(source, tmp_path / "target", "meta")["notes"]
    assert "neither read nor copied: LICENSE, consolidated.pth, tokenizer.json" in " ".join(notes)
    assert convert(tmp_path / "target", tmp_path / "again", "meta")["notes"] == []


def test_settings_that_model_json_lacks_are_noted(tmp_path):
    source = directories.meta_with_entropy_model(tmp_path / "source")
    convert(source, tmp_path / "made", "bltjax")
    (tmp_path / "made" / "checksums.json").unlink()
    file = tmp_path / "made" / "model.json"
    described = json.loads(file.read_text())
    of_devices = {"attention", "attention_block"}
    assert not of_devices & {*described["blt"], *described["entropy_model"]}
    del described["patching"]["threshold"], described["blt"]["global_transformer"]["rope_theta"]
    file.write_text(json.dumps(described))
    [note] = formats.read(tmp_path / "made").notes
    assert "attention" not in note
    assert "patching.threshold=1.33544" in note
    assert "blt.global_transformer.rope_theta=500000.0" in note
    del described["patching"]
    file.write_text(json.dumps(described))
    assert "patching.threshold=1.33544" in formats.read(tmp_path / "made").notes[0]


@pytest.mark.parametrize("said, told", [("bfloat16", "says dtype 'bfloat16'"), ("float32", "")])
def test_the_dtype_that_is_said_is_compared(hf, tmp_path, said, told):
    source = directories.hub(tmp_path / "source", "hf_A_1b_like", torch_dtype=said)
    notes = formats.read(source).notes
    assert told in " ".join(notes) and bool(told) == bool(notes)


def test_commands_print_a_line_for_each_note(tmp_path, monkeypatch, capsys):
    source = directories.hub(tmp_path / "half\x1b[31m", "meta_A_1b_like")
    chosen = SimpleNamespace(
        checkpoint=str(source), entropy_model=None, adapter=None, dtype=None, bf16_compat=False
    )
    monkeypatch.setattr(cli.flags, "FLAGS", chosen)
    assert cli.open_model().entropy_config is None
    lines = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert len(lines) == 3 and "\x1b" not in "".join(lines)
    assert "patching_threshold=" in lines[1] and "there is no entropy model" in lines[2]

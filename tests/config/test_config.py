"""Settings: names, types and values are checked, and the edge to ml_collections is loss-free."""

import dataclasses
import json
import pathlib
import re

import pytest

from bltjax import config as config_lib
from bltjax.config import (
    HashConfig,
    RunConfig,
    SourceConfig,
    default_config,
    differences,
    from_config_dict,
    read_config,
    to_config_dict,
    to_dict,
)
from bltjax.config.command_line import take_settings

DIRECTORY = pathlib.Path(__file__).parents[2] / "configs"
FILES = sorted(DIRECTORY.glob("*.py"))


def with_settings(config, changes):
    """The config (a ConfigDict, or nested dicts) with settings like {"blt.hash.vocab": 3}."""
    for name, value in changes.items():
        *groups, last = name.split(".")
        group = config
        for part in groups:
            group = group[part]
        group[last] = value
    return config


def changed(**settings) -> RunConfig:
    """The default run with settings like `blt__hash__vocab=3` in place."""
    names = {name.replace("__", "."): value for name, value in settings.items()}
    return from_config_dict(RunConfig, with_settings(default_config(), names))


def parse(*arguments, path=FILES[0]) -> RunConfig:
    """The config of a file and a command line, as `bltjax.train` reads it."""
    rest, settings = take_settings(list(arguments))
    assert rest == []
    return read_config(path, settings)


def test_defaults_are_valid_and_the_result_is_hashable():
    assert from_config_dict(RunConfig, default_config()) == RunConfig()
    hash(RunConfig())


@pytest.mark.parametrize(
    "settings, key, nearest",
    [
        ({"blt": {"local_encodr": {}}}, "config.blt.local_encodr", "config.blt.local_encoder"),
        ({"patching": {"treshold": 1.0}}, "config.patching.treshold", "config.patching.threshold"),
        ({"evaluatio": {}}, "config.evaluatio", "config.evaluation"),
        ({"data": {"sources": ({"pth": ""},)}}, r"config.data.sources\[0\].pth", "path"),
    ],
)
def test_unknown_key_names_it_and_the_nearest(settings, key, nearest):
    with pytest.raises(ValueError, match=f"^{key} is not a setting: did you mean {nearest}\\?$"):
        from_config_dict(RunConfig, settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"blt": {"vocab_size": 260.0}}, "config.blt.vocab_size=260.0 is float, must be int"),
        ({"blt": {"vocab_size": None}}, "config.blt.vocab_size=None is NoneType, must be int"),
        ({"mesh": {"fsdp": True}}, "config.mesh.fsdp=True is bool, must be int"),
        ({"blt": {"remat": 1}}, "config.blt.remat=1 is int, must be str"),
        ({"evaluation": {"baselines": 1}}, "config.evaluation.baselines=1 is int, must be bool"),
        (
            {"patching": {"threshold": True}},
            "config.patching.threshold=True is bool, must be float",
        ),
        (
            {"patching": {"target_patch_bytes": "4"}},
            "config.patching.target_patch_bytes='4' is str, must be float",
        ),
        ({"blt": {"hash": {"sizes": 3}}}, "config.blt.hash.sizes=3 must be a tuple"),
        (
            {"blt": {"hash": {"sizes": (3, "4")}}},
            "config.blt.hash.sizes[1]='4' is str, must be int",
        ),
        ({"blt": 3}, "config.blt=3 must be a group of settings, not a value"),
    ],
)
def test_wrong_type_names_field_value_and_type(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_config_dict(RunConfig, settings)


def test_whole_numbers_are_floats_and_lists_are_tuples():
    run = from_config_dict(RunConfig, {"patching": {"threshold": 2}, "stages": ["blt"]})
    assert type(run.patching.threshold) is float
    assert run.stages == ("blt",)


BLOCKS = dict(blt__diffusion_block=4)
PREFIX = dict(blt_training__diffusion__masks="prefix")
SOURCES = (dict(name="a"), dict(name="b", path="b.jsonl"))

# Each: settings, and what the message must say.
PROBLEMS = [
    (dict(blt__global_transformer__num_layers=0), "blt.global_transformer.num_layers=0"),
    (
        dict(blt__global_transformer__dim=130),
        "blt.global_transformer.dim=130 blt.global_transformer.num_heads=4 head_dim",
    ),
    (
        dict(blt__global_transformer__num_kv_heads=3),
        "blt.global_transformer.num_heads=4 blt.global_transformer.num_kv_heads=3",
    ),
    (dict(blt__global_transformer__num_kv_heads=0), "blt.global_transformer.num_kv_heads=0"),
    (dict(blt__global_transformer__head_dim=0), "blt.global_transformer.head_dim=0"),
    (
        dict(blt__global_transformer__dim=60),
        "blt.global_transformer.dim=60 blt.global_transformer.num_heads=4 width 15",
    ),
    (dict(blt__global_transformer__head_dim=7), "blt.global_transformer.head_dim=7 even"),
    (dict(blt__global_transformer__window=8), "blt.global_transformer.window=8 None"),
    (dict(blt__local_encoder__window=0), "blt.local_encoder.window=0 must be positive"),
    (dict(blt__local_decoder__window=None), "blt.local_decoder.window None 512"),
    (dict(entropy_model__transformer__window=None), "entropy_model.transformer.window None 512"),
    (dict(blt__local_encoder__dim=32), "blt.local_encoder.dim=32 blt.local_decoder.dim=64"),
    (dict(blt__local_encoder__ffn_dim_multiplier=0.0), "blt.local_encoder.ffn_dim_multiplier=0.0"),
    (dict(blt__local_encoder__rope_theta=0.0), "blt.local_encoder.rope_theta=0.0"),
    (dict(blt__local_encoder__norm_eps=0.0), "blt.local_encoder.norm_eps=0.0"),
    (dict(blt__cross_attention__k=0), "blt.cross_attention.k=0"),
    (
        dict(blt__cross_attention__num_heads=3),
        "blt.local_encoder.dim=64 blt.cross_attention.num_heads=3",
    ),
    (
        dict(blt__cross_attention__num_heads_decoder=3),
        "blt.local_encoder.dim=64 blt.cross_attention.num_heads_decoder=3",
    ),
    (
        dict(blt__cross_attention__num_kv_heads=3),
        "blt.cross_attention.num_heads=4 num_kv_heads=3 divisor",
    ),
    (dict(blt__cross_attention__num_kv_heads=0), "blt.cross_attention.num_kv_heads=0"),
    (dict(blt__local_encoder__ffn_width=0), "blt.local_encoder.ffn_width=0"),
    (dict(blt__cross_attention__window_encoder=0), "blt.cross_attention.window_encoder=0"),
    (dict(blt__cross_attention__window_decoder=-1), "blt.cross_attention.window_decoder=-1"),
    (dict(blt__pooling="sum"), "blt.pooling='sum' max"),
    (dict(blt__hash__vocab=0), "blt.hash.vocab=0"),
    (dict(blt__hash__sizes=(3, 17)), "blt.hash.sizes=(3, 17) 1..16"),
    (dict(blt__hash__num_functions=12), "blt.hash num_functions=12 11 functions"),
    (dict(token_model__hash__sizes=(0, 2)), "token_model.hash.sizes=(0, 2) 1..16"),
    (dict(token_model__hash_dim=0), "token_model.hash_dim=0 positive"),
    (
        dict(token_training__optimizer__hash_rate=2.0),
        "token_training.optimizer.hash_rate=2.0 nothing 1.0",
    ),
    (
        dict(token_model__hash__sizes=(2,), token_training__optimizer__local_rate=2.0),
        "token_training.optimizer.local_rate=2.0 nothing 1.0",
    ),
    (dict(tokenizer__pattern="words"), "tokenizer.pattern='words' ('letters', 'marks')"),
    (
        dict(tokenizer__path="a.json", tokenizer__pattern="marks"),
        "tokenizer.pattern='marks' tokenizer.path='a.json' 'letters'",
    ),
    (dict(blt__vocab_size=256), "blt.vocab_size=256 260"),
    (dict(blt__compute_dtype="float16"), "blt.compute_dtype='float16' bfloat16"),
    (dict(blt__remat="all"), "blt.remat='all' full"),
    (dict(entropy_model__attention="fast"), "entropy_model.attention='fast' cudnn"),
    (dict(entropy_model__attention_block=0), "entropy_model.attention_block=0 positive"),
    (dict(blt__attention_block=2**17), "blt.attention_block=131072 65536"),
    (dict(blt__attention_block=200), "blt.attention_block=200 multiple of 128"),
    (
        dict(entropy_model__init__std_factor="depth"),
        "entropy_model.init.std_factor='depth' current_depth",
    ),
    (dict(patching__patch_size=0), "patching.patch_size=0"),
    (dict(patching__max_patch_length=0), "patching.max_patch_length=0"),
    (dict(patching__target_patch_bytes=0.5), "patching.target_patch_bytes=0.5 1 1073741824"),
    (dict(data__validation_fraction=1.0), "data.validation_fraction=1.0"),
    (dict(data__bad_records="ignore"), "data.bad_records='ignore' skip"),
    (dict(data__workers=-1), "data.workers=-1"),
    (dict(data__max_bytes=0), "data.max_bytes=0"),
    (dict(data__max_document_bytes=0), "data.max_document_bytes=0"),
    (dict(blt__hash__initial_rows="ones"), "blt.hash.initial_rows='ones'"),
    (dict(data__shard_bytes=0), "data.shard_bytes=0"),
    (dict(data__cache_bytes=0), "data.cache_bytes=0"),
    (dict(data__root="hf://"), "data.root='hf://' dataset"),
    (dict(data__root="synthetic://?bytes=1e6"), "'synthetic://?bytes=1e6' data.max_bytes"),
    (dict(data__root="synthetic:"), "data.root='synthetic:' 'synthetic://'"),
    (dict(data__sources=(dict(path="synthetic://"),)), "data.sources[0].path kind='synthetic'"),
    (dict(data__sources=(dict(kind="synthetic", path="x"),)), "data.sources[0].path='x' drawn"),
    (dict(data__sources=SOURCES, data__root="x"), "data.root='x' data.sources one"),
    (dict(data__sources=(*SOURCES, dict(name="a"))), "data.sources: 'a'"),
    (dict(data__sources=({**SOURCES[0], "weight": 1.0}, SOURCES[1])), "data.sources: 1 2 weight"),
    (dict(data__sources=(dict(name="a/b"),)), "data.sources[0].name='a/b' letters"),
    (dict(data__sources=(dict(kind="csv"),)), "data.sources[0].kind='csv' parquet"),
    (dict(data__sources=(dict(weight=-1.0),)), "data.sources[0].weight=-1.0"),
    (dict(data__sources=(dict(kind="huggingface"),)), "data.sources[0].path='' dataset"),
    (
        dict(entropy_training__row_bytes=0, entropy_training__row_patches=9),
        "entropy_training.row_bytes=0 8",
    ),
    (dict(blt_training__steps=0), "blt_training.steps=0"),
    (dict(blt_training__row_bytes=4), "blt_training.row_bytes=4 8"),
    (
        dict(blt_training__row_bytes=64, blt_training__row_patches=65),
        "blt_training.row_bytes=64 blt_training.row_patches=65",
    ),
    (dict(blt_training__optimizer__schedule="step"), "blt_training.optimizer.schedule='step'"),
    (dict(blt_training__optimizer__clip_norm=0.0), "blt_training.optimizer.clip_norm=0.0"),
    (dict(blt_training__optimizer__warmup_steps=-1), "blt_training.optimizer.warmup_steps=-1 0"),
    (dict(blt_training__optimizer__weight_decay=-0.5), "optimizer.weight_decay=-0.5 0"),
    (dict(blt_training__optimizer__beta1=1.0), "blt_training.optimizer.beta1=1.0 1)"),
    (dict(blt_training__z_loss=float("nan")), "blt_training.z_loss=nan finite"),
    (dict(blt_training__skip_norm_above=0.5), "blt_training.skip_norm_above=0.5 1"),
    (dict(blt__diffusion_block=300), "blt.diffusion_block=300 256"),
    (dict(blt__diffusion_block=-1), "blt.diffusion_block=-1 0"),
    (dict(**BLOCKS, blt_training__diffusion__t_min=0.0), "blt_training.diffusion.t_min=0.0 0.001"),
    (dict(**BLOCKS, blt_training__diffusion__weight=-1.0), "diffusion.weight=-1.0 at least 0"),
    (dict(**BLOCKS, blt_training__diffusion__row_blocks=-1), "diffusion.row_blocks=-1 0"),
    (dict(**BLOCKS, blt_training__diffusion__t_per="byte"), "diffusion.t_per='byte' 'row'"),
    (dict(**BLOCKS, blt_training__diffusion__masks="all"), "diffusion.masks='all' 'prefix'"),
    (
        dict(**BLOCKS, **PREFIX, blt_training__diffusion__t_min=0.2),
        "blt_training.diffusion.t_min=0.2 prefix 0.1",
    ),
    (
        dict(blt__diffusion_block=1, **PREFIX),
        "diffusion.masks='prefix' blt.diffusion_block=1 blt_training.diffusion.weight=0",
    ),
    (
        dict(blt_training__diffusion__t_min=0.2),
        "blt_training.diffusion.t_min=0.2 blt.diffusion_block=0 4",
    ),
    (
        dict(entropy_training__diffusion__t_min=0.2),
        "entropy_training.diffusion.t_min=0.2 nothing entropy model",
    ),
    (
        dict(**BLOCKS, blt__lora__rank=2),
        "blt.lora.rank=2 blt.diffusion_block=4 blt_training.diffusion.weight=0.1 weight=0",
    ),
    (
        dict(**BLOCKS, blt_training__optimizer__local_rate=0.0),
        "local_rate=0 blt.diffusion_block=4 blt_training.diffusion.weight=0",
    ),
    (dict(profile__first_step=-1), "profile.first_step=-1 0"),
    (
        dict(blt_training__optimizer__schedule="wsd", blt_training__optimizer__min_ratio=0.0),
        "blt_training.optimizer.min_ratio=0.0 blt_training.optimizer.schedule='wsd'",
    ),
    (dict(mesh__data=-1, mesh__fsdp=-1), "mesh=(-1, -1, 1)"),
    (dict(mesh__tensor=0), "mesh=(-1, 1, 0)"),
    (dict(evaluation__sample_bytes=0), "evaluation.sample_bytes=0"),
    (dict(stages=("blt", "train")), "stages=('blt', 'train') evaluate"),
    (dict(stages=()), "stages=() evaluate"),
]


@pytest.mark.parametrize("settings, says", PROBLEMS, ids=[next(reversed(s)) for s, _ in PROBLEMS])
def test_problem_names_field_and_values(settings, says):
    with pytest.raises(ValueError) as error:
        changed(**settings)
    pieces = re.findall(r"\S+=\([^)]*\)|\S+", says)
    assert not [piece for piece in pieces if piece not in str(error.value)], str(error.value)
    assert ";" not in str(error.value), "one mistake, one problem"


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"blt\.remat='all'.*; mesh="):
        changed(blt__remat="all", mesh__tensor=0)


def test_a_root_is_a_single_source():
    assert changed().data.named_sources() == (SourceConfig(name="text", path=""),)
    (of_hub,) = changed(data__root="hf://org/corpus:20231101.en").data.named_sources()
    assert (of_hub.kind, of_hub.path, of_hub.subset) == ("huggingface", "org/corpus", "20231101.en")
    (drawn,) = changed(data__root="synthetic://").data.named_sources()
    assert (drawn.kind, drawn.path) == ("synthetic", "")
    named = changed(data__sources=SOURCES).data
    assert [source.name for source in named.named_sources()] == ["a", "b"]


def test_settings_that_look_alike_are_valid():
    changed(blt_training__row_bytes=0, blt_training__row_patches=512)
    changed(blt_training__optimizer__min_ratio=0.0)
    changed(blt__hash__sizes=(), blt__hash__vocab=0)
    changed(start_from="x", blt_training__diffusion__t_min=0.2)  # which may have blocks
    changed(**BLOCKS, blt__lora__rank=2, blt_training__diffusion__weight=0.0)
    changed(token_model__hash__sizes=(2,), token_training__optimizer__hash_rate=2.0)
    changed(blt__global_transformer__dim=130, blt__global_transformer__head_dim=32)
    changed(blt__cross_attention__num_kv_heads=4, blt__cross_attention__num_heads_decoder=2)


def optional_fields(config, name=""):
    """(path, a value) of every setting that may be None."""
    examples = {
        "num_kv_heads": 2,
        "num_heads_decoder": 2,
        "num_kv_heads_decoder": 2,
        "ffn_width": 40,
        "rope_original_positions": 64,
        "head_dim": 16,
        "window": 8,
        "base_std": 0.5,
        "window_encoder": 2,
        "window_decoder": 2,
        "attention_block": 128,
        "hash_dim": 16,
        "target_patch_bytes": 3.5,
        "max_patch_length": 4,
        "max_bytes": 10,
        "max_document_bytes": 10,
        "first_step": 7,
    }
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from optional_fields(value, f"{name}{field.name}__")
        elif "None" in str(field.type):
            yield f"{name}{field.name}", examples[field.name]


NEVER_NONE = (
    "blt__local_encoder__window",
    "blt__local_decoder__window",
    "entropy_model__transformer__window",
)


@pytest.mark.parametrize("path, value", list(optional_fields(RunConfig())))
def test_optional_settings_take_none_and_values(path, value):
    if path not in NEVER_NONE:
        assert get(changed(**{path: None}), path) is None
    if path != "blt__global_transformer__window":
        assert get(changed(**{path: value}), path) == value
    with pytest.raises(TypeError):  # ml_collections knows the type even where the default is None
        changed(**{path: "many"})


def get(config, path):
    for name in path.split("__"):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("path", [None, *FILES], ids=lambda path: path.stem if path else "default")
def test_round_trip(path):
    run = read_config(path) if path else from_config_dict(RunConfig, default_config())
    assert from_config_dict(RunConfig, to_config_dict(run)) == run
    assert from_config_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
    assert differences(json.loads(json.dumps(to_dict(run))), to_dict(run)) == []


def test_a_file_is_read_as_by_the_command_line():
    path = FILES[0].parent / "quickstart.py"
    run = parse("--config.blt.hash.vocab=7", path=path)
    assert read_config(path, {"blt.hash.vocab": 7}) == run != read_config(path)


def test_a_file_may_take_an_argument(tmp_path):
    path = tmp_path / "sized.py"
    path.write_text(
        "from bltjax.config import default_config\n"
        "def get_config(argument='small:1'):\n"
        "    config = default_config()\n"
        "    config.data.root = argument\n"
        "    return config\n"
    )
    assert read_config(path).data.root == "small:1"
    assert read_config(f"{path}:large:2").data.root == "large:2"
    with pytest.raises(
        ValueError, match=r"rooot is not a setting: did you mean config\.data\.root"
    ):
        read_config(path, {"data.rooot": "x"})
    with pytest.raises(OSError, match=r"missing\.py"):
        read_config(tmp_path / "missing.py")


def test_differences_name_the_field_and_leave_out_free_ones():
    old = to_dict(RunConfig())
    free = to_dict(
        changed(
            mesh__fsdp=8,
            blt_training__log_every=1,
            entropy_training__checkpoint_every=7,
            blt_training__keep_checkpoints=9,
            blt__attention="tiles",
            entropy_model__attention_block=1024,
        )
    )
    assert differences(old, free) == []
    new = to_dict(changed(blt__hash__sizes=(3,), blt_training__steps=7))
    assert differences(old, new) == [
        "config.blt.hash.sizes: [3, 4, 5, 6, 7, 8] there, [3] here",
        "config.blt_training.steps: 1000 there, 7 here",
    ]
    sources = [
        dict(data=dict(sources=[dict(name=name) for name in names])) for names in ("ab", "ac")
    ]
    assert differences(*sources) == ["config.data.sources[1].name: 'b' there, 'c' here"]
    del old["patching"]["rule"]
    assert differences(old, to_dict(RunConfig())) == [
        "config.patching.rule: None there, 'entropy' here"
    ]


@pytest.mark.parametrize(
    "argument, path, expected",
    [
        (
            "blt_training.optimizer.learning_rate=1e-3",
            "blt_training__optimizer__learning_rate",
            1e-3,
        ),
        ("blt.global_transformer.num_layers=5", "blt__global_transformer__num_layers", 5),
        ("blt.global_transformer.head_dim=2", "blt__global_transformer__head_dim", 2),
        ("blt.remat=dots", "blt__remat", "dots"),
        ("blt.hash.sizes=(3, 4)", "blt__hash__sizes", (3, 4)),
        ("blt.init.base_std=0.5", "blt__init__base_std", 0.5),
        ("patching.target_patch_bytes=6", "patching__target_patch_bytes", 6.0),
        ("patching.reset_at_newlines=true", "patching__reset_at_newlines", True),
        ("data.root=some/where", "data__root", "some/where"),
        ("data.max_bytes=12", "data__max_bytes", 12),
        ("stages=('blt', 'evaluate')", "stages", ("blt", "evaluate")),
        ("stages=blt,evaluate", "stages", ("blt", "evaluate")),
        ("stages=blt", "stages", ("blt",)),
        ("blt.global_transformer.head_dim=None", "blt__global_transformer__head_dim", None),
        ("mesh.data=-1", "mesh__data", -1),
    ],
)
def test_command_line_overrides(argument, path, expected):
    name, value = argument.split("=")
    apart = [f"-config.{name}", value]
    for form in ([f"--config.{argument}"], apart if value != "true" else apart[:1]):
        run = parse(*form)
        assert get(run, path) == expected
        assert type(get(run, path)) is type(expected)


def test_ffn_dim_is_the_published_width():
    widths = {2048: 5632, 1024: 2816, 4096: 11008, 1280: 3584, 768: 2048}  # model.md#sizes
    for dim, width in widths.items():
        assert config_lib.TransformerConfig(dim).ffn_dim == width


@pytest.mark.parametrize("vocab, rows", [(1009, 1009), (32_768, 32_768), (500_002, 501_760)])
def test_rows_of_large_hash_tables_divide_over_chips(vocab, rows):
    assert HashConfig(vocab=vocab).rows == rows


@pytest.mark.parametrize(
    "line, says",
    [
        ("import sys; sys.exit(3)", r"line 2: SystemExit: 3$"),
        ("raise SystemExit", "line 2: SystemExit: $"),
        (
            "config_lib.default_config().blt_trainig.steps = 3",
            r"line 2: AttributeError: 'blt_trainig' Did you mean \"blt_training\"",
        ),
        ("{}['a\\nb']", "line 2: KeyError: a b$"),
    ],
)
def test_a_file_that_fails_is_told_on_one_line(tmp_path, line, says):
    path = tmp_path / "mine.py"
    path.write_text(f"from bltjax import config as config_lib\n{line}\n")
    with pytest.raises(ValueError, match=rf"mine\.py, {says}"):
        config_lib.read_config(path)

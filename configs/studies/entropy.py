"""What the points of a study share: records of the corpus, and the entropy model.

Command:
    python -m bltjax.train --config=configs/studies/entropy.py:laptop,corpus=PATH --workdir=DIR
    python -m bltjax.preprocess --config=configs/studies/entropy.py:laptop,corpus=PATH --workdir=DIR
Hardware:  SIZE before the comma, as configs/studies/blt.py.
Expect:    the runs of blt.py and tokens.py read DIR/records; benchmarks/studies/ starts all three.

PATH: a file; a directory of text files; or one whose files of records (JSON lines, Parquet, Arrow,
ArrayRecord) or, if it has nothing else, whose directories are sources of their own; or several of
these, with colons between. Without it the text is the running Python's library.
"""

import os
from pathlib import Path

from bltjax.config import default_config

# Width, layers, heads, window.
MODEL = {"laptop": (64, 1, 4, 32), "gpu": (256, 6, 4, 512), "pod": (768, 14, 12, 512)}
STEPS = {"laptop": (1600, 2, 512), "gpu": (10_000, 32, 4096), "pod": (100_000, 64, 8192)}
RATE = {"laptop": 1e-2, "gpu": 1e-3, "pod": 4e-4}
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".array_record")


def get_config(arguments: str = "laptop"):
    size, _, corpus = arguments.partition(",corpus=")
    if size not in MODEL:
        raise ValueError(f"{size!r} must be one of {', '.join(MODEL)}")
    config = default_config()
    config.stages = ("entropy_model",)
    found = [p for path in corpus.split(os.pathsep) if path for p in sources(Path(path))]
    config.data.sources = tuple(dict(name=p.name.split(".")[0], path=str(p)) for p in found)
    config.data.validation_fraction = 0.04
    config.data.shard_bytes = 100_000 if size == "laptop" else 64_000_000

    stack = config.entropy_model.transformer
    stack.dim, stack.num_layers, stack.num_heads, stack.window = MODEL[size]
    stack.ffn_multiple_of = 32
    training = config.entropy_training
    training.steps, training.batch_size, training.row_bytes = STEPS[size]
    training.checkpoint_every = 200 if size == "laptop" else 1000
    training.optimizer.learning_rate = RATE[size]
    training.optimizer.warmup_steps = training.steps // 20
    if size == "laptop":
        training.optimizer.matrices = "muon"
    else:
        config.entropy_model.compute_dtype, config.entropy_model.remat = "bfloat16", "full"
    return config


def sources(path: Path) -> list[Path]:
    """Files and directories at a path that are sources of their own; the path itself if none is."""
    entries = sorted(p for p in path.glob("*") if not p.name.startswith("."))
    records = [p for p in entries if p.name.endswith(RECORDS)]
    return records or (entries if all(p.is_dir() for p in entries) else []) or [path]

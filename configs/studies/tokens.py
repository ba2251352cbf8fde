"""A transformer over tokens, or over bytes, of the studies: `configs/studies/tokens.py:SIZE`.

Command:
    python -m bltjax.train --config=configs/studies/tokens.py:laptop,level=0 --workdir=DIR \
        --config.data.records=RECORDS
Hardware:  as configs/studies/blt.py.
Expect:    a point of a plot; benchmarks/studies/ starts these runs, and gives them their steps.

Arguments as of blt.py: SIZE[,level=N][,dim=N][,vocab=N][,tables=1]. vocab: of the byte-level BPE;
with 260 it has no merges, and the model is a plain transformer over bytes. tables: with as many
hash n-gram tables as the BLT of the level has, of the same rows and width, over its own ids.
"""

from bltjax.config import default_config

# Of each level: width, layers and heads, those of the global transformers of blt.py.
LEVELS = {
    "laptop": [(192, 2, 4), (240, 3, 4), (288, 4, 4)],
    "gpu": [(512, 8, 8), (768, 10, 12), (1024, 12, 16)],
    "pod": [(1280, 24, 10), (2048, 25, 16), (2560, 26, 20)],
}
BATCH = {"laptop": (2, 1024), "gpu": (32, 4096), "pod": (512, 8192)}  # rows, bytes of a row
TOKEN_BYTES = 4  # of the mean token; a study gives the number of its corpus
BYTES_ONLY = 260  # ids of bytes and special ones
VOCABULARY = {"laptop": 4096, "gpu": 16_384, "pod": 65_536}
# Of hash tables: rows, and the widths of the levels, which are those of the local stacks of blt.py.
TABLES = {
    "laptop": (8192, [64, 80, 96]),
    "gpu": (100_000, [256, 320, 384]),
    "pod": (500_002, [768, 1024, 1024]),
}
# Their n-grams: of bytes, as the BLTs have them; of tokens, times two or three hash functions.
BYTE_GRAMS = {"laptop": (2, 3, 4, 5), "gpu": (3, 4, 5, 6, 7, 8), "pod": (3, 4, 5, 6, 7, 8)}
TOKEN_GRAMS = (2, 3)
FFN_MULTIPLE = {"laptop": 32, "gpu": 128, "pod": 256}
SMALL_RATE = 7e-3  # at laptop size, of every width, with Muon
RATE_TIMES_WIDTH = {"gpu": 0.5, "pod": 0.5}


def get_config(arguments: str = "laptop"):
    size, level, dim, vocabulary, tables = parse(arguments)
    config = default_config()
    config.stages = ("token_model", "evaluate")
    config.evaluation.baselines = False

    width, layers, heads = LEVELS[size][level]
    model = config.token_model
    model.vocab_size = vocabulary
    stack = model.transformer
    stack.dim, stack.num_layers, stack.num_heads = dim or width, layers, heads
    stack.ffn_multiple_of = FFN_MULTIPLE[size]
    if vocabulary == BYTES_ONLY and size == "laptop":
        # Few bytes teach no long context: 2.68 bits per byte after 1 MB instead of 2.97.
        stack.window, stack.rope_theta = 128, 1e4

    training = config.token_training
    training.steps, (training.batch_size, row_bytes) = 1000, BATCH[size]
    training.row_bytes = row_bytes // (1 if vocabulary == BYTES_ONLY else TOKEN_BYTES)
    training.checkpoint_every = 200 if size == "laptop" else 1000
    optimizer = training.optimizer
    if size == "laptop":
        optimizer.learning_rate, optimizer.matrices = SMALL_RATE, "muon"
    else:
        optimizer.learning_rate = RATE_TIMES_WIDTH[size] / stack.dim
    optimizer.warmup_steps, optimizer.min_ratio = 50, 0.01

    if tables:
        hashing, (hashing.vocab, widths) = model.hash, TABLES[size]
        bytes_only, of_bytes = vocabulary == BYTES_ONLY, BYTE_GRAMS[size]
        hashing.sizes = of_bytes if bytes_only else TOKEN_GRAMS
        hashing.num_functions = len(of_bytes) // len(hashing.sizes)
        model.hash_dim = widths[level]
        if size == "laptop":
            hashing.initial_rows, optimizer.hash_updates = "zeros", "touched"
            optimizer.hash_rate = 2.5
        else:
            optimizer.hash_rate = stack.dim / model.hash_dim

    if size != "laptop":
        model.compute_dtype, model.remat = "bfloat16", "dots" if size == "gpu" else "full"
        config.evaluation.batch_size = 64
    if size == "pod":
        config.mesh.data, config.mesh.fsdp = -1, 8
    return config


def parse(arguments: str) -> tuple[str, int, int | None, int, bool]:
    """(size, level, dim, vocabulary, tables) of "gpu,level=1,dim=640,vocab=8192,tables=1"."""
    size, *more = arguments.split(",")
    given = {name: int(number) for name, number in (item.split("=") for item in more)}
    if size not in LEVELS or set(given) - {"level", "dim", "vocab", "tables"}:
        raise ValueError(
            f"{arguments!r} must be one of {', '.join(LEVELS)} with level=, dim=, vocab= or tables="
        )
    vocabulary, tables = given.get("vocab", VOCABULARY[size]), bool(given.get("tables", 0))
    return size, given.get("level", 0), given.get("dim"), vocabulary, tables

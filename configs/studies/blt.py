"""A byte latent transformer of the studies: `configs/studies/blt.py:SIZE[,level=N][,dim=N]`.

Command:
    python -m bltjax.train --config=configs/studies/blt.py:laptop,level=0 --workdir=DIR \
        --config.data.records=RECORDS
Hardware:  SIZE: laptop (CPU cores, minutes), gpu (one GPU, hours), pod (64 chips or more, days).
Expect:    a point of a plot; benchmarks/studies/ starts these runs, and gives them their steps,
           their patching and the records of an entropy model (configs/studies/entropy.py).

level: 0, 1 or 2, the size of the model. dim: another width of the global transformer. Its widths,
depths and rates at a level are those of configs/studies/tokens.py.
"""

from bltjax.config import default_config

# Of each level: width, layers and heads of the global transformer; width, heads and decoder layers
# of the local ones. Heads do not grow with the width, so that any even multiple of them will do.
LEVELS = {
    "laptop": [(192, 2, 4, 64, 2, 2), (240, 3, 4, 80, 2, 2), (288, 4, 4, 96, 2, 2)],
    "gpu": [(512, 8, 8, 256, 4, 4), (768, 10, 12, 320, 5, 5), (1024, 12, 16, 384, 6, 6)],
    "pod": [(1280, 24, 10, 768, 12, 7), (2048, 25, 16, 1024, 16, 9), (2560, 26, 20, 1024, 16, 9)],
}
BATCH = {"laptop": (2, 1024), "gpu": (32, 4096), "pod": (512, 8192)}  # rows, bytes of a row
WINDOW = {"laptop": 128, "gpu": 512, "pod": 512}
TABLE = {"laptop": 8192, "gpu": 100_000, "pod": 500_002}  # rows of a hash table
FFN_MULTIPLE = {"laptop": 32, "gpu": 128, "pod": 256}
# Of the entropy model that entropy.py trains, for its share of the FLOPs: width, layers, heads,
# window; steps, rows, bytes of a row.
ENTROPY = {"laptop": (64, 1, 4, 32), "gpu": (256, 6, 4, 512), "pod": (768, 14, 12, 512)}
ENTROPY_STEPS = {"laptop": (1600, 2, 512), "gpu": (10_000, 32, 4096), "pod": (100_000, 64, 8192)}
SMALL_RATE = 7e-3  # at laptop size, of every width, with Muon: configs/quickstart.py
RATE_TIMES_WIDTH = {"gpu": 0.5, "pod": 0.5}  # of each stack by its own width, with Adam


def get_config(arguments: str = "laptop"):
    size, level, dim = parse(arguments)
    config = default_config()
    config.stages = ("blt", "evaluate")
    config.evaluation.baselines = False

    stack = config.entropy_model.transformer
    stack.dim, stack.num_layers, stack.num_heads, stack.window = ENTROPY[size]
    stack.ffn_multiple_of = 32
    training = config.entropy_training
    training.steps, training.batch_size, training.row_bytes = ENTROPY_STEPS[size]

    width, layers, heads, local_width, local_heads, decoder_layers = LEVELS[size][level]
    blt = config.blt
    for stack in (blt.local_encoder, blt.local_decoder):
        stack.dim, stack.num_heads, stack.num_layers = local_width, local_heads, 1
        stack.window = WINDOW[size]
    blt.local_decoder.num_layers = decoder_layers
    trunk = blt.global_transformer
    trunk.dim, trunk.num_layers, trunk.num_heads = dim or width, layers, heads
    for stack in (blt.local_encoder, trunk, blt.local_decoder):
        stack.ffn_multiple_of = FFN_MULTIPLE[size]
    blt.cross_attention.k, blt.cross_attention.num_heads = 2, local_heads
    blt.hash.vocab = TABLE[size]

    training = config.blt_training
    training.steps, (training.batch_size, training.row_bytes) = 1000, BATCH[size]
    training.checkpoint_every = 200 if size == "laptop" else 1000
    optimizer = training.optimizer
    optimizer.warmup_steps, optimizer.min_ratio = 50, 0.01
    if size == "laptop":
        optimizer.learning_rate, optimizer.local_rate, optimizer.hash_rate = SMALL_RATE, 0.5, 2.5
        optimizer.matrices, optimizer.hash_updates = "muon", "touched"
        blt.hash.sizes, blt.hash.initial_rows = (2, 3, 4, 5), "zeros"
    else:
        optimizer.learning_rate = RATE_TIMES_WIDTH[size] / trunk.dim
        optimizer.local_rate = optimizer.hash_rate = trunk.dim / local_width
        config.entropy_model.compute_dtype, config.entropy_model.remat = "bfloat16", "full"
        blt.compute_dtype, blt.remat = "bfloat16", "dots" if size == "gpu" else "full"
        config.evaluation.batch_size = 64
    if size == "pod":
        config.mesh.data, config.mesh.fsdp = -1, 8
    return config


def parse(arguments: str) -> tuple[str, int, int | None]:
    """(size, level, dim) of "gpu,level=1,dim=640"."""
    size, *more = arguments.split(",")
    given = dict(item.split("=") for item in more)
    if size not in LEVELS or set(given) - {"level", "dim"}:
        raise ValueError(f"{arguments!r} must be one of {', '.join(LEVELS)} with level= or dim=")
    return size, int(given.get("level", 0)), int(given["dim"]) if "dim" in given else None

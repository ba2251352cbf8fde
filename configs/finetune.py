"""Text or conversations on top of weights: `configs/finetune.py:PAIRS`, a file or folder of them.

Command:   python -m bltjax.train --config=configs/finetune.py --workdir=runs/tuned \
               --config.data.root=TEXT
           python -m bltjax.train --config=configs/finetune.py:PAIRS --workdir=runs/tuned \
               --config.start_from=DIR
Hardware:  2 CPU cores, minutes for small models; what the weights need for large ones.
Expect:    the shapes of the weights that it starts from, which are those of the model in the
           package unless others are named. Without PAIRS it reads the text at data.root.

All parameters learn. Low-rank adapters: --config.blt.lora.rank=8.
"""

from bltjax.config import default_config


def get_config(pairs: str = ""):
    config = default_config()
    config.stages = ("entropies", "blt", "evaluate")
    config.start_from = "demo"
    if pairs:
        config.data.sources = (dict(name="pairs", path=pairs, kind="chat"),)
        config.patching.turns = True
    config.data.validation_fraction, config.data.shard_bytes = 0.05, 1_000_000
    config.data.seed = 42
    config.evaluation.baselines = False

    training = config.blt_training
    training.steps, training.batch_size, training.row_bytes = 1000, 4, 512
    training.checkpoint_every = training.validate_every = 100
    training.keep_best = True
    training.optimizer.learning_rate, training.optimizer.warmup_steps = 1e-3, 50
    return config

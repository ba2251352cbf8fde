"""A byte model around SmolLM2-135M in two stages: the first by itself, then `:all`.

Command:   hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M
           python -m bltjax.byteify --source=SmolLM2-135M --target=smol-bytes \
               --vocabulary_steps=300
           python -m bltjax.train --config=configs/byteify_smollm2.py --workdir=runs/smol-align \
               --config.data.root=CORPUS
           python -m bltjax.train --config=configs/byteify_smollm2.py:all --workdir=runs/smol-all \
               --config.data.root=CORPUS
Hardware:  2 CPU cores and 4 GB of memory, 8 in the second stage; seconds a step.
Expect:    the shapes of smol-bytes: 167.3M parameters, 109.7M of them beside hash tables and 106.2M
           in the layers of SmolLM2.

In the first stage (`:align`) the global transformer stays, and the local models learn from it as it
reads tokens. The second goes on from runs/smol-align: everything learns, the local models at twice
the rate of the layers. The rates are those of Bolmo's 1B model in its stages. Other places:
--config.start_from=DIR, --config.blt_training.teacher.source=DIR.
"""

from bltjax.config import default_config


def get_config(stage: str = "align"):
    config = default_config()
    config.stages = ("entropies", "blt", "evaluate")
    config.data.seed, config.data.shard_bytes = 42, 1_000_000
    config.data.max_document_bytes = 16_384
    config.evaluation.baselines = False
    config.evaluation.max_bytes = 1_000_000

    training = config.blt_training
    training.batch_size, training.row_bytes = 2, 512
    training.log_every, training.checkpoint_every, training.keep_checkpoints = 20, 500, 1
    training.validate_every = 100
    optimizer = training.optimizer
    optimizer.schedule, optimizer.hash_updates = "linear", "touched"
    optimizer.clip_norm = 0.5
    if stage == "align":
        config.start_from = "smol-bytes"
        training.teacher.source, training.teacher.feed = "SmolLM2-135M", 0.5
        training.steps, optimizer.warmup_steps = 2000, 100
        optimizer.learning_rate, optimizer.global_rate = 7e-4, 0.0
    elif stage == "all":
        config.start_from = "runs/smol-align"
        training.steps, optimizer.warmup_steps = 1000, 100
        optimizer.learning_rate, optimizer.global_rate = 5.2e-5, 0.5
    else:
        raise ValueError(f"the stage {stage!r} is neither 'align' nor 'all'")
    return config

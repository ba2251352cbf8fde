"""The 100M entropy model of the released BLT, alone.

Command:
    python -m bltjax.train --config=configs/entropy_100m.py --workdir=DIR --config.data.root=CORPUS
Hardware:  meant for 8 TPU or GPU chips, 8 rows each as in the published recipe.
           Parameters, gradients and Adam moments in float32 take 1.6 GB, whole on every chip.
Expect:    99,512,064 parameters.
           2.20e8 FLOPs per byte forward at 8,192-byte rows.
           524,288 bytes a step, 52.4 GB in all; a smaller corpus is read again.

The blt_*.py runs train the same model as their first stage.
"""

from bltjax.config import default_config


def get_config():
    config = default_config()
    config.stages = ("entropy_model",)

    entropy = config.entropy_model
    entropy.transformer.dim, entropy.transformer.num_layers = 768, 14
    entropy.transformer.num_heads, entropy.transformer.window = 12, 512
    entropy.transformer.rope_theta = 1e4  # the released stacks of BLT itself have 5e5
    entropy.compute_dtype, entropy.remat = "bfloat16", "full"

    training = config.entropy_training
    training.steps, training.batch_size, training.row_bytes = 100_000, 64, 8192
    training.checkpoint_every = training.validate_every = 1000
    optimizer = training.optimizer
    optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps = 4e-4, "cosine", 500
    optimizer.min_ratio, optimizer.beta2 = 0.1, 0.95
    optimizer.weight_decay, optimizer.clip_norm = 0.1, 10.0
    return config

"""The 2B model of the BLT paper.

Command:
    python -m bltjax.train --config=configs/blt_2b.py --workdir=DIR --config.data.root=CORPUS
Hardware:  meant for 64 TPU v5p chips, 32 rows each; not yet run there.
           Parameters, gradients and Adam moments in float32 take 85 GB, 11 GB a chip
           with fsdp=8; activations come on top.
Expect:    5,323,750,400 parameters, 2,251,738,112 parameters without hash tables; the entropy
           model has 99,512,064 parameters.
           1.33e9 FLOPs per byte forward at 8,192-byte rows and 4.5 bytes a patch.
           16,777,216 bytes a step, 403 GB in all; a smaller corpus is read again.

The paper gives the sizes (Table 10) and the optimizer; the rows hold its 8k bytes of context.
The number of steps is a choice of this file.
"""

from bltjax.config import default_config


def get_config():
    config = default_config()

    entropy = config.entropy_model  # as in entropy_100m.py
    entropy.transformer.dim, entropy.transformer.num_layers = 768, 14
    entropy.transformer.num_heads, entropy.transformer.window = 12, 512
    entropy.transformer.rope_theta = 1e4
    entropy.compute_dtype, entropy.remat = "bfloat16", "full"
    training = config.entropy_training
    training.steps, training.batch_size, training.row_bytes = 100_000, 64, 8192
    training.checkpoint_every = training.validate_every = 1000
    optimizer = training.optimizer
    optimizer.learning_rate, optimizer.warmup_steps = 4e-4, 500
    optimizer.min_ratio, optimizer.clip_norm = 0.1, 10.0

    config.patching.rule = "entropy"
    config.patching.target_patch_bytes = 4.5

    blt = config.blt
    local = blt.local_encoder
    local.dim, local.num_layers, local.num_heads = 1024, 1, 16
    blt.global_transformer.dim, blt.global_transformer.num_layers = 2560, 26
    blt.global_transformer.num_heads = 20
    local = blt.local_decoder
    local.dim, local.num_layers, local.num_heads = 1024, 9, 16
    # Table 10 lists 20 heads, which do not divide the width 1024: heads of width 64 instead,
    # as in the sizes where they do.
    blt.cross_attention.k, blt.cross_attention.num_heads = 3, 16
    blt.compute_dtype, blt.remat = "bfloat16", "full"

    training = config.blt_training
    training.steps = 24_000  # 403 GB of text
    training.batch_size, training.row_bytes = 2048, 8192
    training.checkpoint_every = training.validate_every = 1000
    optimizer = training.optimizer
    optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps = 4e-4, "cosine", 2000
    optimizer.min_ratio, optimizer.beta2 = 0.0, 0.95
    optimizer.weight_decay, optimizer.clip_norm = 0.1, 1.0

    config.evaluation.batch_size = 64
    config.evaluation.baselines = False  # n-gram counts of a large corpus do not fit in memory
    config.mesh.data, config.mesh.fsdp = -1, 8
    return config

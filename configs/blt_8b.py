"""The 8B model of the BLT paper, as in its large run (sections 4.4 and 5.2).

Command:
    python -m bltjax.train --config=configs/blt_8b.py --workdir=DIR --config.data.root=CORPUS
Hardware:  meant for 256 TPU v5p chips, 4 rows for every 4 at a time; not yet run there. It
           compiles for 128 of them, where it takes 38 GiB of a chip's 95
           (python -m bltjax.aot --config=configs/blt_8b.py --topology=v5p:4x4x8).
Expect:    10,553,570,560 parameters, 6,713,555,200 parameters without hash tables; the entropy
           model has 99,512,064 parameters.
           3.50e9 FLOPs per byte forward at 16,384-byte rows and 4.5 bytes a patch.
           16,777,216 bytes a step, 4.50 TB in all; a smaller corpus is read again.

Patches open where entropy rises by more than a threshold (the approximate monotonic rule), and the
entropy model forgets at newlines, so that repetitive text does not end in huge patches. The rows
hold the 16k bytes of context of the paper's large corpus; the steps are those of its Table 1.
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

    config.patching.rule = "monotonic"
    config.patching.reset_at_newlines = True
    config.patching.target_patch_bytes = 4.5

    blt = config.blt
    local = blt.local_encoder
    local.dim, local.num_layers, local.num_heads = 1280, 1, 20
    blt.global_transformer.dim, blt.global_transformer.num_layers = 4096, 32
    blt.global_transformer.num_heads = 32
    local = blt.local_decoder
    local.dim, local.num_layers, local.num_heads = 1280, 6, 20
    blt.cross_attention.k, blt.cross_attention.num_heads = 4, 20
    blt.compute_dtype, blt.remat = "bfloat16", "full"

    training = config.blt_training
    training.steps = 268_000  # 4.50 TB of text
    training.batch_size, training.row_bytes = 1024, 16_384
    training.accumulation_steps = 4
    training.checkpoint_every = training.validate_every = 1000
    optimizer = training.optimizer
    optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps = 4e-4, "cosine", 2000
    optimizer.min_ratio, optimizer.beta2 = 0.0, 0.95
    optimizer.weight_decay, optimizer.clip_norm = 0.1, 1.0

    config.evaluation.batch_size = 64
    config.evaluation.baselines = False  # n-gram counts of a large corpus do not fit in memory
    # Global attention over a row of patches is the largest activation: split its heads.
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 8, 4
    return config

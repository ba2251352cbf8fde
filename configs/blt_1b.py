"""The 1B model of the BLT paper.

Command:
    python -m bltjax.train --config=configs/blt_1b.py --workdir=DIR --config.data.root=CORPUS
Hardware:  meant for 64 TPU v5p chips, 4 rows each at a time; not yet run there. The BLT's stage
           compiles for them, and for 256 v5e chips, where it takes 7.3 GiB of a chip's 16
           (python -m bltjax.aot --config=configs/blt_1b.py --topology=v5e:16x16).
           One GPU of 80 GB: docs/scaling.md#one-gpu.
Expect:    4,533,879,808 parameters, 1,461,867,520 parameters without hash tables; the entropy
           model has 99,512,064 parameters.
           9.95e8 FLOPs per byte forward at 16,384-byte rows and 4.5 bytes a patch.
           16,777,216 bytes a step, 101 GB in all; a smaller corpus is read again.

The paper gives the sizes (Table 10) and the optimizer. The rows hold 16k bytes, twice its context
at this size: documents are packed, and the longer ones are not cut. The steps are those of its
ablations, 100 GB (Tables 7-9).
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
    blt.global_transformer.dim, blt.global_transformer.num_layers = 2048, 25
    blt.global_transformer.num_heads = 16
    local = blt.local_decoder
    local.dim, local.num_layers, local.num_heads = 1024, 9, 16
    blt.cross_attention.k, blt.cross_attention.num_heads = 2, 16
    blt.compute_dtype, blt.remat = "bfloat16", "full"

    training = config.blt_training
    training.steps = 6_000  # 101 GB of text
    training.batch_size, training.row_bytes = 1024, 16_384
    training.accumulation_steps = 4
    training.checkpoint_every = training.validate_every = 1000
    optimizer = training.optimizer
    optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps = 4e-4, "cosine", 2000
    optimizer.min_ratio, optimizer.beta2 = 0.0, 0.95
    optimizer.weight_decay, optimizer.clip_norm = 0.1, 1.0

    config.evaluation.batch_size = 64
    config.evaluation.baselines = False  # n-gram counts of a large corpus do not fit in memory
    config.mesh.data, config.mesh.fsdp = -1, 8
    return config

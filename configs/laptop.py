"""The quickstart recipe with a larger model, for about an hour of two CPU cores.

Command:   python -m bltjax.train --config=configs/laptop.py --workdir=runs/laptop
Hardware:  2 CPU cores, about an hour.
Expect:    33,343,104 parameters, 8,177,280 parameters without hash tables; 1.58 bits per byte
           of held-out files (measured before rows were packed from many open documents), where an
           n-gram model of order 5 has 2.06 and xz 1.72.
"""

from bltjax.config import default_config


def get_config():
    config = default_config()
    config.data.seed, config.data.shard_bytes = 42, 100_000

    entropy = config.entropy_model.transformer
    entropy.dim, entropy.num_layers, entropy.num_heads = 96, 2, 2
    entropy.window, entropy.ffn_multiple_of = 128, 32
    training = config.entropy_training
    training.steps, training.batch_size, training.row_bytes = 600, 4, 1024
    training.checkpoint_every = training.validate_every = 200
    training.optimizer.learning_rate, training.optimizer.warmup_steps = 6e-3, 50

    blt = config.blt
    for stack in (blt.local_encoder, blt.local_decoder):
        stack.dim, stack.num_heads = 128, 2
        stack.window, stack.ffn_multiple_of = 128, 32
    blt.local_encoder.num_layers, blt.local_decoder.num_layers = 1, 2
    trunk = blt.global_transformer
    trunk.dim, trunk.num_layers, trunk.num_heads, trunk.ffn_multiple_of = 384, 4, 6, 32
    blt.cross_attention.k, blt.cross_attention.num_heads = 2, 2
    blt.hash.vocab = 32_768

    training = config.blt_training
    training.steps, training.batch_size, training.row_bytes = 3000, 4, 1024
    training.checkpoint_every = training.validate_every = 300
    training.optimizer.learning_rate, training.optimizer.warmup_steps = 4e-3, 100
    return config

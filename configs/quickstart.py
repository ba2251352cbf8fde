"""From the text every machine has to a measured byte latent transformer, in minutes.

Command:   make train
           python -m bltjax.train --config=configs/quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores, about 4 minutes.
Expect:    13,698,880 parameters, 1,115,968 parameters without hash tables; about 2.02 bits per
           byte of held-out files, where n-gram models of order 3 and 5 have 2.20 and 2.06.
"""

from bltjax.config import default_config


def get_config():
    config = default_config()
    config.data.seed, config.data.shard_bytes = 42, 100_000

    entropy = config.entropy_model.transformer
    entropy.dim, entropy.num_layers, entropy.num_heads = 64, 1, 4
    entropy.window, entropy.ffn_multiple_of = 64, 32
    training = config.entropy_training
    training.steps, training.batch_size, training.row_bytes = 300, 4, 1024
    training.checkpoint_every = training.validate_every = 100
    training.optimizer.learning_rate = 1e-2
    training.optimizer.warmup_steps = 20

    blt = config.blt
    for stack in (blt.local_encoder, blt.local_decoder):
        stack.dim, stack.num_layers, stack.num_heads = 64, 1, 4
        stack.window, stack.ffn_multiple_of = 64, 32
    blt.global_transformer.dim, blt.global_transformer.num_layers = 192, 2
    blt.global_transformer.num_heads, blt.global_transformer.ffn_multiple_of = 4, 32
    blt.cross_attention.k, blt.cross_attention.num_heads = 2, 4
    blt.hash.vocab = 32_768
    training = config.blt_training
    training.steps, training.batch_size, training.row_bytes = 1000, 2, 1024
    training.checkpoint_every = training.validate_every = 200
    training.optimizer.learning_rate = 1e-2
    training.optimizer.warmup_steps = 50
    return config

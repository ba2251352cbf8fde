"""The quickstart recipe with a larger model, for about an hour of two CPU cores.

Command:   python -m bltjax.train --config=configs/laptop.py --workdir=runs/laptop
Hardware:  2 CPU cores, about an hour.
Expect:    28,989,408 parameters, 3,823,584 parameters without hash tables; about 1.42 bits per byte
           of held-out files, 0.20 more without the patches, where n-gram models of order 3 and 5
           have 2.20 and 2.06 and xz 1.72; its entropy model has 1.96.

24.6 MB are read, the 10.6 MB of training text 2.3 times: a model of more than twice the parameters
beside its tables, which reads half as much in the same time, was worse after ten minutes (1.68
bits per byte, this one 1.57).
"""

from bltjax.config import default_config


def get_config():
    config = default_config()
    config.data.seed, config.data.shard_bytes = 42, 100_000
    config.data.max_document_bytes = 65_536

    entropy = config.entropy_model.transformer
    entropy.dim, entropy.num_layers, entropy.num_heads = 96, 2, 6
    entropy.window, entropy.ffn_multiple_of = 32, 32
    training = config.entropy_training
    training.steps, training.batch_size, training.row_bytes = 2000, 4, 512
    training.checkpoint_every = training.validate_every = 500
    training.optimizer.learning_rate, training.optimizer.warmup_steps = 1e-2, 50
    training.optimizer.matrices = "muon"

    blt = config.blt
    for stack in (blt.local_encoder, blt.local_decoder):
        stack.dim, stack.num_layers, stack.num_heads = 96, 1, 4
        stack.window, stack.ffn_multiple_of = 64, 32
    blt.local_decoder.num_layers = 2
    trunk = blt.global_transformer
    trunk.dim, trunk.num_layers, trunk.num_heads, trunk.ffn_multiple_of = 256, 4, 4, 32
    blt.cross_attention.k, blt.cross_attention.num_heads = 2, 4
    blt.hash.sizes, blt.hash.vocab = (2, 3, 4, 5), 65_536
    blt.hash.initial_rows = "zeros"

    training = config.blt_training
    training.steps, training.batch_size, training.row_bytes = 3000, 8, 1024
    training.checkpoint_every = training.validate_every = 300
    optimizer = training.optimizer
    optimizer.learning_rate, optimizer.warmup_steps = 7e-3, 50
    optimizer.local_rate, optimizer.hash_rate = 0.5, 2.5
    optimizer.matrices, optimizer.hash_updates = "muon", "touched"
    return config

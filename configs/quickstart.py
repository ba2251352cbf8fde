"""From the text every machine has to a measured byte latent transformer, in minutes.

Command:   make train
           python -m bltjax.train --config=configs/quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores, about 4 minutes.
Expect:    9,504,576 parameters, 1,115,968 parameters without hash tables; about 1.85 bits per
           byte of held-out files, 0.11 more without the patches; n-gram models of order 3 and 5
           have 2.32 and 2.29.

What a small run needs (docs/results.md has the figures): the beginnings of many files rather than a
few whole ones; Muon, and slower local parts, so that the decoder reads the patches; tables of short
n-grams that begin at zero; small batches.
"""

from bltjax.config import default_config


def get_config():
    config = default_config()
    config.data.seed, config.data.shard_bytes = 42, 100_000
    config.data.max_document_bytes = 4096

    entropy = config.entropy_model.transformer
    entropy.dim, entropy.num_layers, entropy.num_heads = 64, 1, 4
    entropy.window, entropy.ffn_multiple_of = 32, 32
    training = config.entropy_training
    training.steps, training.batch_size, training.row_bytes = 900, 2, 512
    training.checkpoint_every = training.validate_every = 300
    training.optimizer.learning_rate, training.optimizer.warmup_steps = 1e-2, 50
    training.optimizer.matrices = "muon"

    blt = config.blt
    for stack in (blt.local_encoder, blt.local_decoder):
        stack.dim, stack.num_layers, stack.num_heads = 64, 1, 4
        stack.window, stack.ffn_multiple_of = 64, 32
    blt.global_transformer.dim, blt.global_transformer.num_layers = 192, 2
    blt.global_transformer.num_heads, blt.global_transformer.ffn_multiple_of = 4, 32
    blt.cross_attention.k, blt.cross_attention.num_heads = 2, 4
    blt.hash.sizes, blt.hash.vocab = (2, 3, 4, 5), 32_768
    blt.hash.initial_rows = "zeros"
    training = config.blt_training
    training.steps, training.batch_size, training.row_bytes = 480, 4, 1024
    training.checkpoint_every = training.validate_every = 160
    optimizer = training.optimizer
    optimizer.learning_rate, optimizer.warmup_steps = 7e-3, 50
    optimizer.local_rate, optimizer.hash_rate = 0.5, 2.5
    optimizer.matrices, optimizer.hash_updates = "muon", "touched"
    return config

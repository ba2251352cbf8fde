"""The quickstart's twin in tokens: as many bytes of the same text, and about as many FLOPs.

Command:   python -m bltjax.train --config=configs/quickstart_tokens.py --workdir=runs/tokens
Hardware:  2 CPU cores, about 2 minutes.
Expect:    1,672,128 parameters; about 2.01 bits per byte of held-out files, over their bytes, of
           which a token has 2.96; the quickstart has 1.85. (Learning rates of 3.5e-3 and 1.4e-2
           give 2.06 and 2.01. With whole files and Adam it was 2.10.)
"""

from bltjax.config import default_config


def get_config():
    config = default_config()
    config.stages = ("token_model", "evaluate")
    config.data.seed, config.data.shard_bytes = 42, 100_000
    config.data.max_document_bytes = 4096  # the beginnings that the quickstart reads

    # The shape of the quickstart's global transformer.
    transformer = config.token_model.transformer
    transformer.dim, transformer.num_layers = 192, 2
    transformer.num_heads, transformer.ffn_multiple_of = 4, 32
    config.token_model.vocab_size = 2048
    training = config.token_training
    # Tokens, of 3.2 bytes: rows of about as many bytes as the quickstart's.
    training.steps, training.batch_size, training.row_bytes = 480, 4, 320
    training.checkpoint_every = training.validate_every = 160
    training.optimizer.learning_rate, training.optimizer.warmup_steps = 7e-3, 50
    training.optimizer.matrices = "muon"
    return config

"""A run of seconds for the tests of the trainer, on a corpus that the test gives."""

from bltjax.config import default_config


def get_config():
    config = default_config()
    # Without a sample: to compile the loops that write it takes longer than all other stages.
    config.stages = ("entropy_model", "entropies", "blt", "evaluate")
    config.data.validation_fraction, config.data.shard_bytes = 0.3, 2000

    transformer = config.entropy_model.transformer
    transformer.dim, transformer.num_heads = 16, 2
    transformer.window, transformer.ffn_multiple_of = 16, 8
    blt = config.blt
    for stack in (blt.local_encoder, blt.global_transformer, blt.local_decoder):
        stack.dim, stack.num_heads, stack.ffn_multiple_of = 16, 2, 8
    blt.local_encoder.window = blt.local_decoder.window = 16
    blt.cross_attention.num_heads = 2
    blt.hash.sizes, blt.hash.vocab = (3, 4), 101

    for training, steps in ((config.entropy_training, 12), (config.blt_training, 24)):
        training.steps, training.batch_size, training.row_bytes = steps, 2, 64
        training.log_every, training.checkpoint_every = 1, 4
        training.optimizer.learning_rate, training.optimizer.warmup_steps = 1e-2, 4
    config.evaluation.batch_size = 2
    config.evaluation.baselines = True
    config.evaluation.sample_bytes = 8
    return config

"""The model in the package, `demo`: of Python, its documentation, and the King James Bible.

Command:   python -m bltjax.train --config=configs/demo.py --workdir=runs/demo
           python -m bltjax.train --config=configs/demo.py:CORPUS --workdir=runs/demo
           python -m benchmarks.make_demo --corpus=CORPUS --workdir=runs/demo
Hardware:  one CPU core, 21 minutes.
Expect:    3,475,264 parameters, 1,115,968 parameters without hash tables; with the entropy model
           less than 8 MB in bfloat16. What was measured is on the card, bltjax/demo/README.md.

The first command reads the standard library of the running Python alone, the second also a folder
with Python's documentation (*python_docs*) and the Bible (*bible*). The third is the second, and
puts the result into the package. The card says where the texts are to be had.
"""

from bltjax.config import default_config

SHARES = {"library": 0.4, "docs": 0.3, "bible": 0.3}  # of the bytes that are read
FILES = {"docs": "*python_docs*", "bible": "*bible*"}


def get_config(corpus: str = ""):
    config = default_config()
    config.data.seed, config.data.shard_bytes = 42, 100_000
    config.data.max_document_bytes = 16_384
    if corpus:
        paths = {"library": ""} | {name: f"{corpus}/{files}" for name, files in FILES.items()}
        config.data.sources = tuple(
            dict(name=name, path=path, weight=SHARES[name]) for name, path in paths.items()
        )

    entropy = config.entropy_model.transformer
    entropy.dim, entropy.num_layers, entropy.num_heads = 64, 1, 4
    entropy.window, entropy.ffn_multiple_of = 32, 32
    training = config.entropy_training
    training.steps, training.batch_size, training.row_bytes = 2000, 4, 512
    training.checkpoint_every = training.validate_every = 500
    training.optimizer.learning_rate, training.optimizer.warmup_steps = 1e-2, 50
    training.optimizer.matrices = "muon"

    blt = config.blt
    for stack in (blt.local_encoder, blt.local_decoder):
        stack.dim, stack.num_layers, stack.num_heads = 64, 1, 4
        stack.window, stack.ffn_multiple_of = 64, 32
    trunk = blt.global_transformer
    trunk.dim, trunk.num_layers, trunk.num_heads, trunk.ffn_multiple_of = 192, 2, 4, 32
    blt.cross_attention.k, blt.cross_attention.num_heads = 2, 4
    blt.hash.sizes, blt.hash.vocab, blt.hash.initial_rows = (2, 3, 4, 5), 9216, "zeros"

    training = config.blt_training
    training.steps, training.batch_size, training.row_bytes = 1400, 8, 1024
    training.checkpoint_every = training.validate_every = 200
    optimizer = training.optimizer
    optimizer.learning_rate, optimizer.warmup_steps = 7e-3, 50
    optimizer.local_rate, optimizer.hash_rate = 0.5, 2.5
    optimizer.matrices, optimizer.hash_updates = "muon", "touched"

    config.evaluation.sentence = (
        "for name, value in self.items():  # Patches are short where text is hard."
    )
    return config

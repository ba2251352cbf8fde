"""The corpus of a run as the token model reads it: the tokenizer, and rows of its ids.

Documents, their order, their mixture and which are held out are those of the byte models.
"""

import itertools
from collections.abc import Iterator

import jax

from bltjax import sharding
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import RunConfig
from bltjax.data import tokenizer
from bltjax.data.batches.lanes import Layout
from bltjax.data.records.store import Store
from bltjax.data.tokenizer import Tokenizer
from bltjax.recipe import corpus

SAMPLE_BYTES = 1_000_000  # on which the bytes of a token are measured


def ensure_tokenizer(config: RunConfig, directory: RunDirectory, store: Store) -> Tokenizer:
    """Returns the tokenizer of a working directory: the one there is, the one given, or a new one.

    Of several processes the first makes it. Raises ValueError where the model has too few ids,
    OSError where the given tokenizer cannot be read.
    """
    path, given, model = directory.tokenizer, config.tokenizer.path, config.token_model
    if jax.process_index() == 0 and not path.exists():
        if given:
            found = tokenizer.load(given)
        else:
            texts = sample(config, store, config.tokenizer.train_bytes)
            found = tokenizer.train(texts, model.vocab_size, config.tokenizer.pattern)
        found.byte_lengths(model.vocab_size)  # raises where the model has too few ids
        found.save(path)
    sharding.barrier("the tokenizer is there")
    return tokenizer.load(path)


def training_data(config: RunConfig, store: Store, found: Tokenizer, layout: Layout):
    """Returns the TrainingData of the token model's steps, and the mean bytes of a token."""
    texts = list(sample(config, store, SAMPLE_BYTES))
    ids = (found.encode(text, add_bos=False, add_eos=False) for text in texts)
    mean = sum(map(len, texts)) / sum(map(len, ids))
    tokens = corpus.needed_bytes(config, config.token_training)
    shards = corpus.select(config, store, int(tokens * mean))
    return corpus.training_data(config, store, shards, layout, entropies=False), mean


def sample(config: RunConfig, store: Store, num_bytes: int) -> Iterator[bytes]:
    """Yields training documents in their order, about `num_bytes`, or as many as there are."""
    shards = corpus.select(config, store, num_bytes)
    left = min(num_bytes, sum(shard.num_bytes for shard in shards))
    order = corpus.training_data(config, store, shards, Layout(8), entropies=False).documents
    for place in itertools.count():
        if left <= 0:
            return
        _, document = order[place]
        left -= len(document.data)
        yield document.data

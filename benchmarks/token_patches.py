"""Patches that are a tokenizer's tokens, for study: records whose entropies tell where tokens end.

The rule `entropy` opens a patch behind each byte whose entropy is above the threshold. So records
have 1 where a token ends and 0 elsewhere, and the threshold is between: entropies go with documents
through packing and rows that cut them, and nothing of a run needs to know. It is an oracle. Where a
token ends is decided by the bytes to come, so patches tell something of the next byte, and a model
of them can neither generate nor score other text.
"""

from pathlib import Path

import numpy as np

from bltjax.checkpoints import formats
from bltjax.checkpoints.pytorch.convert import write_new
from bltjax.config import DataConfig, PatchingConfig
from bltjax.data.records import store as records
from bltjax.data.teacher_tokens import TeacherTokenizer
from bltjax.runtime.progress import progress_bar

PATCHING = PatchingConfig(rule="entropy", target_patch_bytes=None, threshold=0.5)


def entropies_of(tokenizer: TeacherTokenizer, data: bytes) -> np.ndarray:
    """Returns 1 at the last byte of each token and 0 elsewhere, float16 [len(data) + 2].

    The first and the last entry are BOS and EOS, as in records.
    """
    return (tokenizer.token_ends(data) > 0).astype(np.float16)


def record(directory: Path, data: DataConfig, tokenizer: TeacherTokenizer):
    """Makes records with the tokens' ends for entropies, or goes on with them.

    Raises ValueError where they are another tokenizer's.
    """
    store = records.build(directory, data)
    claim = records.claim_entropies(store, dict(ends_of_tokens=tokenizer.digest))
    missing = records.without_entropies(store.directory, store.all_shards)
    with progress_bar("tokens", sum(shard.num_bytes for shard in missing)) as bar:
        for shard in missing:
            texts = (document.data for document in records.Documents([shard]))
            records.write_entropies(shard, (entropies_of(tokenizer, x) for x in texts), claim)
            bar.update(shard.num_bytes)


def write_copy(source: Path, target: Path):
    """Writes a byte model again, with patches as such records have them; needs a mesh to be set."""
    weights = formats.read(source)._replace(patching=PATCHING)
    write_new(formats.plan(weights, formats.BLTJAX), target, weights.num_bytes(), progress=False)

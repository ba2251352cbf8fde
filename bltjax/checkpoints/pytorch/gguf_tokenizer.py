"""The tokenizer in a GGUF file, as a tokenizer.json of the library `tokenizers`.

Of byte-level BPE ("gpt2" in these files) alone, and of ways to cut words that are known.
"""

import json
from pathlib import Path
from typing import Any

from bltjax.checkpoints.pytorch.gguf_files import open_gguf

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cut(numbers: str) -> dict:
    pattern = dict(Regex=_CONTRACTIONS + numbers + _AFTER_NUMBERS)
    split = dict(type="Split", pattern=pattern, behavior="Isolated", invert=False)
    return dict(type="Sequence", pretokenizers=[split, _byte_level(False)])


def _byte_level(cut: bool) -> dict:
    return dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=cut)


_DIGITS = dict(type="Digits", individual_digits=True)
CUTS: dict[str, dict[str, Any]] = {  # by tokenizer.ggml.pre
    "gpt-2": _byte_level(True),
    "smollm": dict(type="Sequence", pretokenizers=[_DIGITS, _byte_level(True)]),
    "llama-bpe": _cut(r"\p{N}{1,3}"),
    "qwen2": _cut(r"\p{N}"),
}


def read(file: Path, setting: str) -> tuple[str, int | None]:
    """Returns the content of a tokenizer.json, and the id that begins each text, or None.

    setting: that may name another tokenizer, for errors. Raises ValueError where the
    file has no tokenizer, or one of another kind.
    """
    metadata, _, _ = open_gguf(file, ("tokenizer.ggml.",))
    found = metadata.get("tokenizer", {}).get("ggml", {})
    kind, cut = found.get("model"), found.get("pre")
    remedy = f"give the model's tokenizer.json as {setting}"
    if kind != "gpt2" or "merges" not in found:
        raise ValueError(f"tokenizer.ggml.model={kind!r} is no byte-level BPE: {remedy}")
    if cut not in CUTS:
        raise ValueError(f"tokenizer.ggml.pre={cut!r} is none of {', '.join(CUTS)}: {remedy}")
    tokens = found["tokens"]
    unknown = found.get("unknown_token_id")
    model = dict(
        type="BPE",
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[merge.split(" ", 1) for merge in found["merges"]],
        unk_token=None if unknown is None else tokens[unknown],
        ignore_merges=cut == "llama-bpe",
    )
    content = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[],
        normalizer=None,
        pre_tokenizer=CUTS[cut],
        post_processor=None,
        decoder=_byte_level(True),
        model=model,
    )
    begins = found.get("add_bos_token", cut == "llama-bpe")
    return json.dumps(content), found.get("bos_token_id") if begins else None

"""What callers ask of generation, checked: options by name, and numbers for each prompt."""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from bltjax.config import BLTConfig, EntropyModelConfig, PatchingConfig
from bltjax.inference.engine import Decoding, Prompt
from bltjax.inference.model_steps import Configs
from bltjax.inference.sampling import Sampling
from bltjax.patching.boundaries import needs_entropies
from bltjax.vocabulary import encode


def configure(
    config: BLTConfig,
    entropy_config: EntropyModelConfig | None,
    patching: PatchingConfig,
    *,
    stop: str | bytes | Sequence[str | bytes] = (),
    threshold: float | None = None,
    **options,
) -> tuple[Configs, dict]:
    """Configs and options of `engine.generate`; the options are fields of Sampling and Decoding.

    Raises ValueError for an option that there is not, or a value that makes no sense.
    """
    if threshold is not None:
        if not needs_entropies(patching):
            raise ValueError(f"threshold={threshold}: the patching rule {patching.rule!r} has none")
        patching = dataclasses.replace(patching, threshold=threshold)
        if problems := patching.problems("patching"):
            raise ValueError("; ".join(problems))
    of_sampling, of_decoding = (
        {
            field.name: options.pop(field.name)
            for field in dataclasses.fields(cls)
            if field.name in options
        }
        for cls in (Sampling, Decoding)
    )
    if options:
        raise ValueError(f"unknown option {min(options)!r}: Model.generate tells which there are")
    stops = [stop] if isinstance(stop, (str, bytes)) else stop
    stops = [s.encode("utf-8", "ignore") if isinstance(s, str) else s for s in stops]
    if b"" in stops:
        raise ValueError("stop holds an empty string, with which every text ends: leave it out")
    needed = entropy_config if needs_entropies(patching) else None
    return Configs(config, needed, patching), dict(
        sampling=Sampling(**of_sampling), stops=stops, decoding=Decoding(**of_decoding)
    )


def ask(prompts: Sequence[str | bytes], max_new_bytes, seed, trained: int | None) -> list[Prompt]:
    """A row for each prompt; max_new_bytes and seed: one number, or one for each.

    trained: bytes of a row in training, where known; warns of texts that may get longer.
    """
    many = each("max_new_bytes", max_new_bytes, len(prompts), 2**30)
    seeds = each("seed", seed, len(prompts), 2**32)
    rows = [
        Prompt(encode(prompt, add_eos=False), *numbers)
        for prompt, *numbers in zip(prompts, many, seeds, strict=True)
    ]
    longest = max((len(row.ids) + row.max_new_bytes for row in rows), default=0)
    if trained is not None and longest > trained:
        warnings.warn(
            f"a text may get {longest} bytes long, and the model was trained on {trained}: "
            "shorten the prompt or lower max_new_bytes to stay within what it has seen",
            stacklevel=4,
        )
    return rows


def each(name: str, value, count: int, limit: int) -> list[int]:
    """One number for each prompt, from one for all or one for each."""
    values = list(value) if isinstance(value, (Sequence, np.ndarray)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} values for {count} prompts: give one for each")
    for number in values:
        if not (isinstance(number, (int, np.integer)) and 0 <= number < limit):
            raise ValueError(f"{name}={number!r} must be a whole number from 0, below {limit}")
    return [int(number) for number in values]

"""Generates text for requests of lm-evaluation-harness, with options in its words."""

import collections
import json
import warnings
from collections.abc import Mapping, Sequence

from bltjax.vocabulary import text_bytes

BYTES_PER_TOKEN = 4  # for limits in tokens: about the mean length of a token in English text
DEFAULT_MAX_TOKENS = 256
_PASSED_ON = ("top_k", "top_p", "min_p", "repetition_penalty")


def generate_until(model, requests: Sequence[tuple[str, Mapping]]) -> list[str]:
    """Generates a continuation of each context with a model, up to the first stop string.

    Each request is (context, options): `until`, one string or several; `max_gen_toks`, of which
    each stands for BYTES_PER_TOKEN bytes; `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
    `repetition_penalty`. Unknown options are ignored with a warning. A request that comes twice is
    drawn with seeds 0 and 1. Bytes that are no UTF-8 become U+FFFD.
    """
    seen, groups = collections.Counter(), collections.defaultdict(list)
    for i, (context, given) in enumerate(requests):
        options = generation_options(given)
        settings = json.dumps(options, sort_keys=True)
        repetition = seen[context, settings] if options["temperature"] else 0
        seen[context, settings] += 1
        groups[settings, repetition].append(i)
    texts = [""] * len(requests)
    for (settings, repetition), members in groups.items():
        options = json.loads(settings)
        stop = [text_bytes(s) for s in options.pop("stop")]
        prompts = [text_bytes(requests[i][0]) for i in members]
        found = model.generate(prompts, **options, stop=stop, seed=repetition)
        for i, text in zip(members, found, strict=True):
            texts[i] = text.decode("utf-8", "replace")
    return texts


def generation_options(given: Mapping) -> dict:
    """Translates the harness's options into those of `generate`.

    Raises ValueError for a max_gen_toks that is no number of bytes.
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    limits = ("max_gen_toks", "max_new_tokens", "max_tokens")
    given_limit = next((name for name in limits if rest.get(name) is not None), None)
    tokens = rest.pop(given_limit, DEFAULT_MAX_TOKENS)
    if not (isinstance(tokens, int) and tokens > 0):
        raise ValueError(f"max_gen_toks={tokens!r} must be a whole number from 1")
    temperature = float(rest.pop("temperature", None) or 0.0)
    do_sample = rest.pop("do_sample", None)
    if do_sample is False:
        temperature = 0.0
    elif do_sample and not temperature:
        temperature = 1.0
    options = dict(
        max_new_bytes=BYTES_PER_TOKEN * tokens,
        temperature=temperature,
        stop=[s for s in until if text_bytes(s)],
    )
    if temperature:
        options |= {n: rest[n] for n in _PASSED_ON if rest.get(n) is not None}
    elif rest.get("repetition_penalty") is not None:
        options["repetition_penalty"] = rest["repetition_penalty"]
    if unknown := sorted(rest.keys() - set(_PASSED_ON)):
        warnings.warn(f"generation options {unknown} are not known, and left out", stacklevel=3)
    return options

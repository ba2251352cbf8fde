"""The three requests of lm-evaluation-harness, answered by a model: plain functions of plain data.

A model is anything with `score`, `score_continuations` and `generate`, as `bltjax.load` gives them.
An answer depends on its request alone.
"""

import collections
import json
import warnings
from collections.abc import Mapping, Sequence

from bltjax.runtime.progress import OnProgress

BYTES_PER_TOKEN = 4  # tasks count tokens of other models' tokenizers; of text about so many bytes
DEFAULT_MAX_TOKENS = 256
_PASSED_ON = ("top_k", "top_p", "min_p", "repetition_penalty")


def loglikelihood(
    model, pairs: Sequence[tuple[str, str]], on_progress: OnProgress = None
) -> list[tuple[float, bool]]:
    """(log p, whether it is what greedy decoding writes) of each continuation after its context."""
    scores = model.score_continuations(pairs, on_progress=on_progress)
    return [(-score.nats, score.is_greedy) for score in scores]


def loglikelihood_rolling(
    model, texts: Sequence[str], on_progress: OnProgress = None
) -> list[float]:
    """log p of each document as `score` counts it: a long one in rows that follow each other."""
    return [-score.nats for score in model.score(texts, on_progress=on_progress)]


def generate_until(model, requests: Sequence[tuple[str, Mapping]]) -> list[str]:
    """What a model writes after each context, up to the first of its stop strings.

    Each request is (context, options): `until`, one string or several; `max_gen_toks`, of which
    each stands for BYTES_PER_TOKEN bytes; `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
    `repetition_penalty`. Options that are not known are left out with a warning. The same request
    twice is drawn twice, with seeds 0 and 1. Bytes that are no UTF-8 become U+FFFD.
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
        stop = [_encoded(s) for s in options.pop("stop")]
        prompts = [_encoded(requests[i][0]) for i in members]
        found = model.generate(prompts, **options, stop=stop, seed=repetition)
        for i, text in zip(members, found, strict=True):
            texts[i] = text.decode("utf-8", "replace")
    return texts


def generation_options(given: Mapping) -> dict:
    """The harness's options as those of `generate`: max_new_bytes, temperature, stop and others.

    Raises ValueError for a max_gen_toks that is no number of bytes.
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    tokens = next(
        (
            rest.pop(name)
            for name in ("max_gen_toks", "max_new_tokens", "max_tokens")
            if rest.get(name) is not None
        ),
        DEFAULT_MAX_TOKENS,
    )
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
        stop=[s for s in until if _encoded(s)],
    )
    if temperature:
        options |= {n: rest[n] for n in _PASSED_ON if rest.get(n) is not None}
    elif rest.get("repetition_penalty") is not None:
        options["repetition_penalty"] = rest["repetition_penalty"]
    if unknown := sorted(rest.keys() - set(_PASSED_ON)):
        warnings.warn(f"generation options {unknown} are not known, and left out", stacklevel=3)
    return options


def _encoded(text: str) -> bytes:
    """UTF-8; what it cannot hold is left out, as everywhere."""
    return text.encode("utf-8", "ignore")

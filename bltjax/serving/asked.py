"""Reads requests: their fields as prompts, sampling, stop strings and limits."""

import itertools
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from bltjax.config.chat import ROLES, ChatConfig
from bltjax.data import conversations
from bltjax.inference.jobs import Job, Request
from bltjax.inference.sampling import GREEDY_BELOW, Sampling
from bltjax.serving.errors import RequestError
from bltjax.serving.fields import CHAT, COMPLETIONS, checked
from bltjax.serving.text import BOS_TOKEN
from bltjax.vocabulary import encode, text_bytes

CHAT_BYTES = 512  # of an answer, where a request sets no limit
SEEDS = 2**32


class Prompt(NamedTuple):
    """The beginning of a text."""

    data: bytes
    shows_bos: bool = False  # the BOS before it was given by name, and has an entry of its own


class Asked(NamedTuple):
    """A request for texts, checked."""

    prompts: list[Prompt]
    n: int  # texts for each prompt
    max_new_bytes: int
    sampling: Sampling
    stops: tuple[bytes, ...]
    seed: int  # of the first text of each prompt; the others have the numbers after it
    num_top: int | None  # most probable ids beside each byte; None: no log-probabilities
    echo: bool
    stream: bool
    include_usage: bool
    threshold: float | None  # nats, of the patching rule; None: the trained one
    shared: int = 0  # first bytes of a prompt that other requests are likely to begin with, too

    @property
    def num_texts(self) -> int:
        return len(self.prompts) * self.n

    @property
    def is_scored(self) -> bool:
        """Returns whether the log-probabilities of the prompts are asked for."""
        return self.echo and self.num_top is not None

    @property
    def needs_no_loop(self) -> bool:
        """Returns whether scores tell all: nothing is written, or the most probable byte."""
        greedy = self.sampling.temperature < GREEDY_BELOW and not self.sampling.valid_utf8
        one = self.max_new_bytes == 1 and greedy and self.sampling.repetition_penalty == 1
        return self.max_new_bytes == 0 or (self.is_scored and one and not self.stops)

    def jobs(self) -> list[Job]:
        """Returns a job for each text; those of one prompt stand together and share its reading."""
        wanted = dict(
            sampling=self.sampling,
            stops=self.stops,
            log_probs=self.num_top is not None,
            threshold=self.threshold,
            shared=self.shared and 1 + self.shared,  # with BOS
        )
        return [
            Job(request, **wanted)
            for prompt in self.prompts
            for request in self._requests(encode(prompt.data, add_eos=False))
        ]

    def _requests(self, ids) -> list[Request]:
        seeds = [(self.seed + i) % SEEDS for i in range(self.n)]
        return [Request(ids, self.max_new_bytes, seed) for seed in seeds]


def completion(body) -> Asked:
    """Returns what the body of `/v1/completions` asks for. Raises RequestError."""
    given = checked(body, COMPLETIONS)
    if given["best_of"] not in (None, given["n"]):
        raise RequestError(
            f"best_of={given['best_of']} must be n={given['n']}: leave it out", "best_of"
        )
    stops = [given["stop"]] if isinstance(given["stop"], str) else given["stop"]
    if given["threshold"] is not None and given["echo"] and given["logprobs"] is not None:
        raise RequestError(
            "threshold: prompts are scored with the trained one: leave it out", "threshold"
        )
    return Asked(
        prompts=prompts_of(given["prompt"]),
        max_new_bytes=given["max_tokens"],
        stops=tuple(map(text_bytes, stops)),
        num_top=given["logprobs"],
        echo=given["echo"],
        **_common(given),
    )


def chat(body, template: ChatConfig) -> Asked:
    """Returns what the body of `/v1/chat/completions` asks for. Raises RequestError."""
    given = checked(body, CHAT)
    if given["messages"] is None:
        raise RequestError("messages is missing: give a list of them", "messages")
    if given["top_logprobs"] is not None and not given["logprobs"]:
        raise RequestError("top_logprobs needs logprobs=true: give both", "top_logprobs")
    messages = [_of_known_role(message) for message in given["messages"]]
    try:
        prompt = conversations.to_bytes(messages, template, answer=True)
    except ValueError as error:
        raise RequestError(str(error), "messages") from None
    stops = [given["stop"]] if isinstance(given["stop"], str) else given["stop"]
    ends = [template.delimiter(name) for name in ("end", *ROLES)]
    return Asked(
        prompts=[Prompt(prompt)],
        max_new_bytes=given["max_completion_tokens"] or given["max_tokens"] or CHAT_BYTES,
        stops=(*map(text_bytes, stops), *ends),
        num_top=(given["top_logprobs"] or 0) if given["logprobs"] else None,
        echo=False,
        shared=_system_bytes(messages, template),
        **_common(given),
    )


def _of_known_role(message: dict) -> dict:
    """Returns a message whose role is not OpenAI's newer name of the system's."""
    return dict(message, role="system") if message.get("role") == "developer" else message


def _system_bytes(messages: Sequence[dict], template: ChatConfig) -> int:
    """Returns the bytes of the messages of the system that a conversation begins with."""
    first = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    return len(conversations.to_bytes(first, template)) if first else 0


def prompts_of(value: str | Sequence) -> list[Prompt]:
    """Returns the prompts in a field that holds one or several."""
    if isinstance(value, str):
        return [Prompt(text_bytes(value))]
    if isinstance(value[0], int):
        return [_of_integers(value)]
    return [
        Prompt(text_bytes(part)) if isinstance(part, str) else _of_integers(part) for part in value
    ]


def _of_integers(values: Sequence[int]) -> Prompt:
    shows_bos = bool(values) and values[0] == BOS_TOKEN
    rest = values[1:] if shows_bos else values
    if BOS_TOKEN in rest:
        raise RequestError(
            f"prompt holds {BOS_TOKEN} after its beginning: only its first integer may be BOS, the "
            "others are bytes 0 to 255",
            "prompt",
        )
    return Prompt(bytes(rest), shows_bos)


def _common(given: dict) -> dict:
    sampling = Sampling(
        repetition_penalty=given["repetition_penalty"],
        temperature=given["temperature"],
        top_k=max(given["top_k"] or 0, 0) or None,
        top_p=given["top_p"],
        min_p=given["min_p"] or None,
        valid_utf8=given["valid_utf8"],
    )
    options, seed = given["stream_options"], given["seed"]
    if not isinstance(options.get("include_usage", False), bool | None):
        raise RequestError("stream_options.include_usage must be true or false", "stream_options")
    return dict(
        n=given["n"],
        sampling=sampling,
        seed=secrets.randbelow(SEEDS) if seed is None else seed % SEEDS,
        stream=given["stream"],
        include_usage=bool(options.get("include_usage")),
        threshold=given["threshold"],
    )

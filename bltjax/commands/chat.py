"""Talks with a model in the terminal: `bltjax chat --checkpoint=DIR`.

Each line of the input is a turn of yours; the answer is written as it comes. `/reset` begins anew,
`/exit` or the end of the input ends. What was read of the conversation is not read again. The last
line is JSON: the messages, and what the answers took. The model must have been trained on
conversations (docs/finetuning.md).
"""

import json
import sys
import time

from absl import flags

from bltjax import cli
from bltjax.runtime.terminal import byte_writer

PROMPT = "> "
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")  # of Model.chat


def main(argv):
    cli.no_arguments(argv, "give --checkpoint")
    chosen = flags.FLAGS
    if chosen.checkpoint is None:
        cli.fail("give --checkpoint=DIR")
    sys.stdout.reconfigure(errors="backslashreplace")
    options = {name: chosen[name].value for name in OPTIONS}
    options |= dict(max_new_bytes=chosen.max_new_bytes)
    try:
        model = cli.open_model()
        model.chat_template()  # refused before anything is asked
        messages, took = talk(model, chosen.system, options)
    except (ValueError, KeyError, OSError) as error:
        cli.fail(error)
    print(json.dumps(dict(messages=messages, **took)))


def talk(model, system: str | None, options: dict) -> tuple[list[dict], dict]:
    """Answers the lines of the input; returns the messages, and bytes and seconds of answers."""
    begun = [] if system is None else [dict(role="system", content=system)]
    messages, num_bytes, seconds = list(begun), 0, 0.0
    show = byte_writer()
    for line in lines():
        if line == "/reset":
            messages = list(begun)
            continue
        messages.append(dict(role="user", content=line))
        started, answer = time.perf_counter(), b""
        for piece in model.chat_stream(messages, **options):
            show(piece)
            answer += piece
        show(b"")
        print(flush=True)
        num_bytes, seconds = num_bytes + len(answer), seconds + time.perf_counter() - started
        messages.append(dict(role="assistant", content=answer.decode("utf-8", "replace")))
    return messages, dict(answered_bytes=num_bytes, seconds=seconds)


def lines():
    """Yields the lines of the input that are not empty, up to `/exit`; asks a terminal for them."""
    while True:
        if sys.stdin.isatty():
            print(PROMPT, end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def define_flags():
    cli.define_model_flags()
    flags.DEFINE_string("system", None, "What the conversation begins with, from the system.")
    flags.DEFINE_integer("max_new_bytes", 512, "Bytes of an answer at most.", lower_bound=1)
    cli.define_sampling_flags()


if __name__ == "__main__":
    cli.run(main, define_flags)

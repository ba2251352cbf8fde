"""Generates text: `bltjax generate --checkpoint=DIR --prompt=TEXT`.

Prints the prompt and the continuation while it is written; then bytes per second and how often each
stack ran. The last line is JSON. A terminal shows control characters and bytes that are not UTF-8
as \\xNN; files and pipes get the text as it is. `--raw` writes the bytes of the continuation and
nothing else.
"""

import json
import sys
import time

from absl import flags

from bltjax import cli
from bltjax.runtime.paths import as_path, read_whole
from bltjax.runtime.terminal import byte_writer, printable
from bltjax.vocabulary import text_bytes

OPTIONS = (  # of Model.generate, which explains them
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "valid_utf8",
    "stop",
    "threshold",
    "max_drafts",
    "blocks",
)


def generate(model, prompt: bytes, show, with_prompt: bool = False, **options) -> dict:
    """Passes the continuation to `show` in pieces, and returns it with what it took."""
    text, first_bytes, started, first = b"", 0, time.perf_counter(), None
    pieces = model.stream(prompt, **options)  # what it refuses is refused before the prompt shows
    if with_prompt:
        show(prompt)
    for piece, so_far in pieces:
        first, counts = first or time.perf_counter(), so_far
        show(piece)
        text += piece
        first_bytes = first_bytes or len(text)
    ended = time.perf_counter()
    first = first or ended
    written = counts.patches - counts.prompt_patches
    return dict(
        text=printable(text),
        **counts._asdict(),
        prompt_bytes=len(prompt),
        bytes_per_patch=len(text) / written if written else None,
        seconds=ended - started,
        seconds_to_first=first - started,
        bytes_per_second=(len(text) - first_bytes) / (ended - first) if ended > first else None,
    )


def summary(found: dict) -> str:
    """Returns the work of a generation in words."""
    per_patch, speed = found["bytes_per_patch"], found["bytes_per_second"]
    lines = [
        f"{found['new_bytes']} bytes after {found['prompt_bytes']}, "
        f"the first ones after {found['seconds_to_first']:.2f} s, which compile, "
        + (f"then {speed:.0f} bytes/s" if speed else "and no more"),
        f"entropy model, encoder and decoder: {found['steps']} steps; "
        f"global stack: {found['global_calls']} calls"
        + (f", a patch of {per_patch:.2f} bytes on average" if per_patch else "")
        if found["patches"]
        else f"{found['steps']} steps",  # a model of tokens
    ]
    if found["drafted"]:
        share = found["accepted"] / found["drafted"]
        lines.append(f"drafts: {found['accepted']} of {found['drafted']} stood ({share:.0%})")
    return "\n".join(lines)


def main(argv):
    cli.no_arguments(argv, "give --checkpoint and --prompt")
    chosen = flags.FLAGS
    if chosen.checkpoint is None or (chosen.prompt is None) == (chosen.prompt_file is None):
        cli.fail("give --checkpoint=DIR and one of --prompt=TEXT and --prompt_file=FILE")
    sys.stdout.reconfigure(errors="backslashreplace")
    show = byte_writer(chosen.raw)
    try:
        prompt = _prompt(chosen)
        options = {name: chosen[name].value for name in OPTIONS}
        options |= dict(max_new_bytes=chosen.max_new_bytes, seed=chosen.seed)
        found = generate(cli.open_model(), prompt, show, with_prompt=not chosen.raw, **options)
    except (ValueError, KeyError, OSError) as error:
        cli.fail(error)
    if not chosen.raw:
        show(b"")
        print()
        print(summary(found))
        print(json.dumps(found))


def _prompt(chosen) -> bytes:
    if chosen.prompt is not None:
        return text_bytes(chosen.prompt)  # any bytes, as they were typed
    if chosen.prompt_file == "-":
        return sys.stdin.buffer.read()
    return read_whole(as_path(chosen.prompt_file))


def define_flags():
    cli.define_model_flags()
    flags.DEFINE_string("prompt", None, "What the text begins with; may be empty.")
    cli.define_path("prompt_file", "A file that holds it; - is standard input.")
    flags.DEFINE_integer("max_new_bytes", 256, "Bytes to write at most.", lower_bound=0)
    cli.define_sampling_flags()
    flags.DEFINE_bool("valid_utf8", False, "Write nothing that is not UTF-8.")
    flags.DEFINE_multi_string("stop", [], "A string that ends the text; may be given again.")
    flags.DEFINE_float("threshold", None, "Nats; higher: fewer patches than in training.")
    flags.DEFINE_integer("max_drafts", 0, "Bytes drafted past the end of a patch; 0: none.")
    flags.DEFINE_integer("blocks", 0, "Bytes that are filled in together; 0: none.", 0)
    flags.DEFINE_bool("raw", False, "Write the bytes alone, as they are.")


if __name__ == "__main__":
    cli.run(main, define_flags)

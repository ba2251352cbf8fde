"""Ways to draft bytes, by a model that fills in blocks: `python benchmarks/drafts.py`.

Text after the beginnings of held-out documents, from the working directory of a run with
`blt.diffusion_block` (--checkpoint): plain decoding; drafts past the end of a patch (BLT-S); blocks
that are verified (BLT-DV), filled in at once, as far as bytes are sure ("ends at"), or by sure
bytes in several passes; blocks that are not (BLT-D). Told are the drafts for each byte written, the
share of them that stood, also of those that the patch had room for ("in patch"), bytes written per
call of the global stack and per pass of the decoder, the weights that were read per byte of one row
(Fast BLT, equation 8, with the encoder by its own passes and entropies included), and the time of
whole calls of `Model.generate` beside plain decoding, in turns. `bits/byte`: of what was written,
as the model itself scores it: text of BLT-D is another than plain decoding writes. Prints a table
and, last, a JSON line.

    python -m bltjax.train --config=quickstart --workdir=runs/blocks --config.blt.diffusion_block=4
    python benchmarks/drafts.py --checkpoint=runs/blocks
"""

import json
import math
import os

import jax
import measuring
from absl import app, flags
from trained import model_and_texts, timed

from bltjax import cli
from bltjax.inference.jobs import BlockDrafts, Counts

COLUMNS = {"rows": "", "temperature": ".1f", "way": "", "drafts/byte": ".2f", "stood": ".0%"}
COLUMNS |= {"in patch": ".0%", "bytes/call": ".2f", "bytes/pass": ".2f", "kB/byte": ",.0f"}
COLUMNS |= {"bytes/s": ",.0f", "speed": ".2f", "bits/byte": ".3f"}
PLAIN = "plain"


def ways(block: int) -> dict[str, dict]:
    """Returns options of `generate` by the names of the ways."""
    return {
        PLAIN: {},
        f"BLT-S {block}": dict(max_drafts=block),
        f"BLT-DV {block}": dict(blocks=block),
        f"BLT-DV {block}, ends at 0.5": ends_at(block, 0.5),
        f"BLT-DV {block}, ends at 0.7": ends_at(block, 0.7),
        f"BLT-DV {block}, 0.7": dict(blocks=BlockDrafts(block, confidence=0.7)),
        f"BLT-D {block}": dict(blocks=BlockDrafts(block, verified=False)),
        f"BLT-D {block}, 0.7": dict(blocks=BlockDrafts(block, False, confidence=0.7)),
        f"BLT-D {block}, 1.5 nats": dict(blocks=BlockDrafts(block, False, entropy_bound=1.5)),
    }


def ends_at(block: int, confidence: float) -> dict:
    return dict(blocks=BlockDrafts(block, confidence=confidence, max_passes=1))


def main(argv):
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}: only flags are taken")
    chosen = flags.FLAGS
    model, texts = model_and_texts()
    if not model.config.diffusion_block:
        cli.fail(f"{chosen.checkpoint} does not fill in blocks: train it with blt.diffusion_block")
    prompts, rows = [text[: chosen.prompt] for text in texts], []
    for count in map(int, chosen.batches):
        for temperature in map(float, chosen.temperatures):
            rows += measure(model, prompts, count, temperature)
            measuring.print_table(COLUMNS, rows[-len(ways(2)) :])
    print()
    measuring.print_table(COLUMNS, rows)
    about = measuring.machine(os.cpu_count()) | dict(jax=jax.__version__)
    print(json.dumps(dict(benchmark="drafts", machine=about, rows=rows)))


def measure(model, prompts, count: int, temperature: float) -> list[dict]:
    options = dict(rows=count, temperature=temperature)
    prompts = (prompts * count)[: max(count, len(prompts))]
    known = ways(model.config.diffusion_block)
    actions = {
        name: lambda more=more: timed(model, prompts, **options, **more)
        for name, more in known.items()
    }
    for action in actions.values():
        action()  # compiles
    found, table = measuring.alternate(actions, flags.FLAGS.repeats), []
    for name, runs in found.items():
        texts, counts, _ = runs[0]
        if temperature == 0 and "BLT-D " not in name and texts != found[PLAIN][0][0]:
            cli.fail(f"greedy text of {name} is another than without")
        speed = counts.new_bytes / measuring.median([run[2] for run in runs])
        row = dict(rows=count, temperature=temperature, way=name)
        row["drafts/byte"] = counts.drafted / counts.new_bytes
        row["stood"] = counts.accepted / counts.drafted if counts.drafted else None
        row["in patch"] = counts.accepted / counts.in_patch if counts.in_patch else None
        written = counts.new_bytes / count  # each pass and call serves all rows
        row["bytes/call"] = written / counts.global_calls
        row["bytes/pass"] = written / decoder_passes(name, counts)
        row["kB/byte"] = weights_read(model, name, counts) / written / 1e3
        row["bytes/s"] = speed
        row["bits/byte"] = bits_per_byte(model, prompts, texts)
        table.append(row | {"speed": speed / table[0]["bytes/s"] if table else 1.0})
    return table


def decoder_passes(name: str, counts: Counts) -> int:
    """Passes of the decoder: each step has one; verifying and closing patches may add some."""
    return counts.steps + counts.fills + (0 if name == PLAIN else counts.global_calls)


def weights_read(model, name: str, counts: Counts) -> float:
    """Bytes of weights that all passes read, without embeddings, of which a byte reads a row."""
    sizes = {
        part: layers_of(model.params["blt"][part]) for part in model.params["blt"] if part in PARTS
    }
    entropies = layers_of(model.params.get("entropy_model", {}))
    encoder_passes = counts.steps * (2 if counts.fills else 1)  # of the next byte before a block
    return (
        encoder_passes * sizes["local_encoder"]
        + counts.steps * entropies
        + decoder_passes(name, counts) * sizes["local_decoder"]
        + counts.global_calls * sizes["global_transformer"]
    )


PARTS = ("local_encoder", "global_transformer", "local_decoder")


def layers_of(params: dict) -> int:
    return sum(
        x.nbytes
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if "embed" not in jax.tree_util.keystr(path[:1])
    )


def bits_per_byte(model, prompts, texts) -> float:
    scores = model.score_continuations(
        [(p, t) for p, t in zip(prompts, texts, strict=True) if t][: flags.FLAGS.documents]
    )
    return sum(s.nats for s in scores) / math.log(2) / sum(s.num_bytes for s in scores)


def define_flags():
    flags.DEFINE_string("checkpoint", "runs/blocks", "The working directory of a run.")
    flags.DEFINE_integer("documents", 8, "Held-out documents, the longest.", lower_bound=1)
    flags.DEFINE_integer("prompt", 256, "Bytes of each that are a prompt.", lower_bound=0)
    flags.DEFINE_integer("new", 256, "Bytes to write after each.", lower_bound=1)
    flags.DEFINE_list("batches", ["1", "8", "32"], "Rows at once.")
    flags.DEFINE_list("temperatures", ["0", "0.8"], "Of the text.")
    flags.DEFINE_integer("repeats", 5, "Of each measurement.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=cli.parse)

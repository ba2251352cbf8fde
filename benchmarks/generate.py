"""Bytes a second of generation: `python benchmarks/generate.py`.

Greedy text after random prompts, with random weights of the `small` size and an entropy model 256
wide with 2 layers, whose threshold makes patches of about 4.5 bytes. Times are of whole calls of
`Model.generate`, prompts included, compilation not. With --against=transformers the peer does the
same with the same weights, in turns, in a process of its own and without its cache, whose text is
another. It computes the whole prefix for every byte, so it writes pieces of --piece bytes at
--pieces places spread evenly over the text that bltjax wrote, and a byte costs it what they cost
on average. `same` is the share of those bytes that agree.

    python benchmarks/generate.py --against=transformers
    python benchmarks/generate.py --against=transformers --lengths=1024x1024 --batches=1 --pieces=2
    python benchmarks/generate.py --lengths=1024x256,4096x256,16128x256 --batches=1

`of bound`, of one row: seconds that reading the weights that a byte and its share of a patch need
takes at this machine's bandwidth, as a share of those that a byte takes. Prints a table and, last,
a JSON line.
"""

import dataclasses
import tempfile
from pathlib import Path

import measuring
import numpy as np
from absl import app, flags

from bltjax import cli
from bltjax.config import EntropyModelConfig, TransformerConfig, to_dict

ENTROPY_MODEL = EntropyModelConfig(TransformerConfig(256, 2, 4, window=512, rope_theta=10_000.0))
THRESHOLDS = {"small": 5.147, "tiny": 5.3}
COLUMNS = {"prompt": ",", "new": ",", "rows": "", "who": "", "bytes/s": ",.1f", "ms a byte": ".2f"}
COLUMNS |= {"patch": ".2f", "global calls": "", "of bound": ".0%", "speed": ".0f", "same": ".0%"}


def main(_):
    chosen, rows, versions = flags.FLAGS, [], {}
    model = dataclasses.replace(measuring.SIZES[chosen.size], remat="none")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            weights = str(Path(scratch) / "weights")
            with measuring.Worker("writer", chosen.threads) as ours:
                ours.ask(
                    "draw",
                    directory=weights,
                    model=to_dict(model),
                    entropy_model=to_dict(ENTROPY_MODEL),
                    threshold=THRESHOLDS[chosen.size],
                )
                needed = ours.ask("open", directory=weights)
                versions |= ours.ask("about")
                peer = None
                if chosen.against:
                    peer = measuring.Worker("their_writer", chosen.threads)
                    peer.ask("open", directory=weights)
                    versions |= peer.ask("about")
                for prompt, new in map(measuring.parse_shape, chosen.lengths):
                    for count in map(int, chosen.batches):
                        found = measure(ours, peer, needed, prompt, new, count)
                        measuring.print_table(COLUMNS, found)
                        rows += found
                if peer:
                    peer.__exit__()
    except measuring.WorkerError as error:
        cli.fail(error)
    print()
    measuring.print_table(COLUMNS, rows)
    options = dict(size=chosen.size, max_drafts=chosen.max_drafts, quorum=chosen.quorum)
    measuring.print_result("generate", versions=versions, options=options, rows=rows)


def measure(ours, peer, needed, prompt: int, new: int, count: int) -> list[dict]:
    chosen, rng = flags.FLAGS, np.random.default_rng(0)
    # BOS is one of the positions of a prompt.
    prompts = [rng.bytes(prompt - 1).decode("latin-1") for _ in range(count)]
    options = dict(max_drafts=chosen.max_drafts, quorum=chosen.quorum)

    def write():
        return ours.ask("write", prompts=prompts, new_bytes=new, **options)

    text = write()["texts"]  # compiles
    actions = dict(ours=write, bandwidth=lambda: ours.ask("bandwidth"))
    if peer:
        places = np.linspace(0, new - chosen.piece, chosen.pieces).astype(int).tolist()

        def write_pieces():
            return [
                peer.ask(
                    "write",
                    prompts=[p + t[:at] for p, t in zip(prompts, text, strict=True)],
                    new_bytes=chosen.piece,
                )
                for at in places
            ]

        actions["theirs"] = write_pieces
    found = measuring.alternate(actions, chosen.repeats)
    seconds = [run["seconds"] for run in found["ours"]]
    counts = found["ours"][0]["counts"]
    a_byte = measuring.median(seconds) / (count * new)
    patches = counts["patches"] - counts["prompt_patches"]
    row = {"prompt": prompt, "new": new, "rows": count, "who": measuring.OURS}
    row |= {
        "bytes/s": 1 / a_byte,
        "ms a byte": 1e3 * a_byte,
        "patch": count * new / patches if patches else None,
    }
    row |= {"global calls": counts["global_calls"], "seconds": seconds, "counts": counts}
    if count == 1:
        read = needed["byte"] + needed["patch"] * counts["global_calls"] / new
        row["bandwidth"] = measuring.median(found["bandwidth"])
        row["of bound"] = read / row["bandwidth"] / a_byte
    if not peer:
        return [row]
    their_seconds = [sum(p["seconds"] for p in run) for run in found["theirs"]]
    theirs = measuring.median(their_seconds) / (count * chosen.piece * len(places))
    row["speed"] = theirs / a_byte
    same = [
        a == b
        for at, piece in zip(places, found["theirs"][0], strict=True)
        for mine, text_of_peer in zip(text, piece["texts"], strict=True)
        for a, b in zip(mine[at : at + chosen.piece], text_of_peer, strict=True)
    ]
    peer_row = {"prompt": prompt, "new": new, "rows": count, "who": measuring.THEIRS}
    peer_row |= {"bytes/s": 1 / theirs, "ms a byte": 1e3 * theirs, "seconds": their_seconds}
    return [row, peer_row | {"same": float(np.mean(same))}]


def define_flags():
    flags.DEFINE_enum("size", "small", list(THRESHOLDS), "The model's.")
    flags.DEFINE_list("lengths", ["256x256"], "Positions of prompts x bytes to write, of each run.")
    flags.DEFINE_list("batches", ["1", "8", "32"], "Rows of each run.")
    flags.DEFINE_integer("max_drafts", 0, "Bytes drafted past the end of a patch.")
    flags.DEFINE_float("quorum", 0.5, "Share of the rows that wait before the global stack runs.")
    flags.DEFINE_integer("repeats", 5, "Of each measurement.", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "Cores of each process.", lower_bound=1)
    flags.DEFINE_enum("against", None, [measuring.THEIRS], "The peer.")
    flags.DEFINE_integer("piece", 8, "Bytes that the peer writes at a time.", lower_bound=1)
    flags.DEFINE_integer("pieces", 5, "Places where it does.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=measuring.parse)

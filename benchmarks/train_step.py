"""Training steps a second, and their memory: `python benchmarks/train_step.py`.

A step is forward, backward, clipping and AdamW, on random bytes in random patches of 4.5 bytes on
average. With --against=transformers the peer does the same with the same weights, in a process of
its own, in turns; nothing is timed unless both give the same logits, and the losses before and
after the first update are compared too. Prints a table and, last, a JSON line.

    python benchmarks/train_step.py --against=transformers
    python benchmarks/train_step.py --config=configs/blt_1b.py --shapes=8x8192 --dtype=bfloat16 \
        --remat=full --apart --against=transformers       # one GPU

speed: how many times as fast bltjax is. memory: its peak as a share of the peer's. `first s` is the
first step, compilation included; `peak MB` the most that a process ever held, `of steps MB` the
most in steps that were timed. With --apart a peer that fails, for want of memory say, is told with
its `error`, and our row stays. --checkpointing is to the peer what --remat=full is to bltjax. On a
GPU it is the device's memory that counts, and MFU is the share of the data sheet's bfloat16 peak
that goes into the model's own FLOPs.
"""

import comparing
import measuring
from absl import app


def main(_):
    comparing.compare("train_step", "train")


if __name__ == "__main__":
    comparing.define_flags()
    app.run(main, flags_parser=measuring.parse)

"""Forward passes a second, and their memory: `python benchmarks/forward.py`.

From random bytes to logits, without gradients; otherwise as `train_step.py`, whose docstring tells
what is printed.

    python benchmarks/forward.py --against=transformers
"""

import comparing
import measuring
from absl import app


def main(_):
    comparing.compare("forward", "forward")


if __name__ == "__main__":
    comparing.define_flags()
    app.run(main, flags_parser=measuring.parse)

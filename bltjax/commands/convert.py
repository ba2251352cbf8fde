"""Converts weights: `bltjax convert --source=DIR --target=DIR --format=hf`.

Detects the format of the source. The target appears when it is complete: a conversion that fails or
is stopped leaves none.
"""

import json
import os
import sys

from absl import flags

from bltjax import cli
from bltjax.checkpoints.pytorch.convert import FORMATS, convert
from bltjax.config.model import DTYPES
from bltjax.runtime.terminal import printable


def main(argv):
    chosen = flags.FLAGS
    cli.no_arguments(argv, "give --source, --target and --format")
    if None in (chosen.source, chosen.target, chosen.format):
        cli.fail("give --source=DIR, --target=DIR and --format=bltjax, hf, meta or peft")
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed: leave accelerators to others
    try:
        result = convert(
            chosen.source,
            chosen.target,
            chosen.format,
            entropy_model=chosen.entropy_model,
            adapter=chosen.merge_adapter,
            dtype=chosen.dtype,
            progress=True,
            dry_run=chosen.dry_run,
        )
    except (ValueError, OSError) as error:
        cli.fail(error)
    for note in result["notes"]:
        print(f"note: {printable(note)}", file=sys.stderr)
    for name, kind in result.pop("tensors", {}).items():
        print(f"{name:72} {kind}")
    done = "would write" if chosen.dry_run else "wrote"
    print(
        f"{done} {printable(result['target'])} in {result['format']} format: "
        f"{' and '.join(result['models'])}, {result['parameters']:,} parameters, "
        f"{result['bytes'] / 1e9:.2f} GB ({', '.join(result['dtypes'])}), {result['seconds']} s"
    )
    print(json.dumps(result))


def define_flags():
    cli.define_path("source", "Weights: bltjax's, a run's, Hugging Face's or Meta's, or demo.")
    cli.define_path("target", "A directory that is not there yet.")
    flags.DEFINE_enum("format", None, FORMATS, "Of the target.")
    cli.define_path("entropy_model", "A directory with the entropy model, if the source has none.")
    cli.define_path("merge_adapter", "A directory with an adapter, added to the source's matrices.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Cast the parameters; default: as in the source.")
    flags.DEFINE_bool("dry_run", False, "Only check, and list what would be written.")


if __name__ == "__main__":
    cli.run(main, define_flags)

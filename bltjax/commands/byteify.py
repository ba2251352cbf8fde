"""Makes a byte model of a tokenized one: `bltjax byteify --source=LLAMA_DIR --target=DIR`.

The layers of the source, a model of the Llama family, become the global transformer; all around
them is new, and learns in a run with `start_from`. The target appears when it is complete.
"""

import json
import os
import sys

from absl import flags

from bltjax import cli
from bltjax.runtime.terminal import printable


def main(argv):
    chosen = flags.FLAGS
    cli.no_arguments(argv, "give --source and --target")
    if None in (chosen.source, chosen.target):
        cli.fail("give --source=DIR and --target=DIR")
    hash_sizes = _numbers(chosen.hash_sizes)
    os.environ["JAX_PLATFORMS"] = "cpu"  # little is computed: leave accelerators to others
    from bltjax.recipe.byteify import LocalSizes, byteify  # late: JAX takes seconds

    try:
        result = byteify(
            chosen.source,
            chosen.target,
            sizes=LocalSizes(
                dim=chosen.local_dim,
                heads=chosen.local_heads,
                encoder_layers=chosen.encoder_layers,
                decoder_layers=chosen.decoder_layers,
                window=chosen.window,
                k=chosen.k,
                hash_sizes=hash_sizes,
                hash_vocab=chosen.hash_vocab,
            ),
            vocabulary_steps=chosen.vocabulary_steps,
            tokenizer=chosen.tokenizer,
            entropy_model=chosen.entropy_model,
            drop_rope_scaling=chosen.drop_rope_scaling,
            seed=chosen.seed,
            progress=True,
        )
    except (ValueError, OSError) as error:
        cli.fail(error)
    for note in result["notes"]:
        print(f"note: {printable(note)}", file=sys.stderr)
    distance = result["word_distance"]
    print(
        f"wrote {printable(result['target'])}: {result['parameters']:,} parameters, of which "
        f"{result['kept_parameters']:,} are the source's, {result['bytes'] / 1e9:.2f} GB "
        f"({', '.join(result['dtypes'])}), {result['seconds']} s; root mean square of token "
        f"embeddings {result['embedding_rms']:.4g}, of patches {result['patch_rms']:.4g}"
        + (f"; distance of words {distance:.3f}" if distance is not None else "")
    )
    print(json.dumps(result))


def _numbers(words: list[str]) -> tuple[int, ...]:
    try:
        return tuple(map(int, words))
    except ValueError:
        cli.fail(f"--hash_sizes={','.join(words)} must be whole numbers with commas between them")


def define_flags():
    cli.define_path(
        "source",
        "A directory of Hugging Face's with a model of the Llama family (Llama, SmolLM2, Mistral, "
        "Qwen2, Qwen3), or a GGUF file.",
    )
    cli.define_path("target", "A directory that is not there yet.")
    cli.define_path(
        "entropy_model",
        "A directory with an entropy model, whose rule and threshold place the patches; default: "
        "patches end with words.",
    )
    flags.DEFINE_integer(
        "vocabulary_steps",
        0,
        "Steps in which the new encoder learns what the source has for its words.",
        0,
    )
    cli.define_path(
        "tokenizer", "A directory or a tokenizer.json, of these words; default: the source's own."
    )
    flags.DEFINE_bool("drop_rope_scaling", False, "Leave out how the source scales positions.")
    flags.DEFINE_integer("local_dim", None, "Of bytes; default: a third of the source's width.", 1)
    flags.DEFINE_integer("local_heads", None, "Default: one for 64 features.", 1)
    flags.DEFINE_integer("encoder_layers", 1, "Of the local encoder.", 1)
    flags.DEFINE_integer(
        "decoder_layers", None, "Of the local decoder; default: 4, or 6 from width 2,048 on.", 1
    )
    flags.DEFINE_integer("window", 512, "Bytes that a byte sees.", 1)
    flags.DEFINE_integer(
        "k", None, "Vectors of a patch; default: those that fill the source's width.", 1
    )
    flags.DEFINE_list("hash_sizes", "3,4,5,6,7,8", "Lengths of n-grams, a table each.")
    flags.DEFINE_integer("hash_vocab", 50_000, "Rows of a table; the paper has 500002.", 1)
    flags.DEFINE_integer("seed", 0, "Of the new parameters.", 0)


if __name__ == "__main__":
    cli.run(main, define_flags)

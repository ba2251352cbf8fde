"""Lists every setting of a config: `bltjax settings`.

A line for each: its name after `--config.`, its type, its default and its meaning. `--only=rate`
keeps those with the text in their line. docs/configs.md has the same as tables.
"""

from absl import flags

from bltjax import cli
from bltjax.config import SourceConfig
from bltjax.config.names import Setting, in_group, settings, type_name


def lines(only: str = "") -> list[str]:
    """Returns a line for each setting whose line has the text `only`, whatever its case."""
    found = [*settings().values(), *in_group(SourceConfig(), "data.sources[N].")]
    return [line for line in map(_line, found) if only.lower() in line.lower()]


def _line(setting: Setting) -> str:
    kind = type_name(setting.hint)
    return f"{setting.name}={setting.default!r}  ({kind})  {setting.meaning}"


def main(argv):
    cli.no_arguments(argv, "give --only=TEXT for some of the settings")
    found = lines(flags.FLAGS.only)
    if not found:
        cli.fail(f"--only={flags.FLAGS.only} is in the line of no setting: give another text")
    print("\n".join(found))


def define_flags():
    flags.DEFINE_string("only", "", "A text: lists the settings that have it in their line.")


if __name__ == "__main__":
    cli.run(main, define_flags)

"""The command of a study: its flags, what it shares, its points, its results.

A study is a file with two functions: `plan` says which points there are, `report` makes pictures
and a page of their rows.
"""

import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from benchmarks.studies import pages, points, shared
from benchmarks.studies.points import Point
from benchmarks.studies.shared import Shared
from bltjax import cli
from bltjax.runtime import signals

SIZES = ("laptop", "gpu", "pod")
# Of a point in training: measured on one of two busy EPYC cores, where BLTs had 26 to 41 GFLOP/s
# and tokens 43 to 53; and guesses.
FLOPS_PER_SECOND = {"laptop": 3.5e10, "gpu": 1e14, "pod": 1e16}


class Settings(NamedTuple):
    """What the flags say."""

    directory: Path
    out: Path
    corpus: str
    patterns: list[str]
    size: str
    jobs: int
    dry_run: bool


CORPUS_HELP = "A file or directory, see configs/studies/entropy.py; default: Python's."


def define_flags(sources: str = "*", corpus_help: str = CORPUS_HELP):
    flags.DEFINE_string("workdir", None, "Where the points are kept; run again, it goes on there.")
    flags.DEFINE_string("out", None, "Where results go; default: WORKDIR/results.")
    flags.DEFINE_string("corpus", "", corpus_help)
    flags.DEFINE_list("sources", sources, "Patterns of the names of its sources that are read.")
    flags.DEFINE_enum("size", "laptop", SIZES, "For which hardware the models are.")
    flags.DEFINE_integer("jobs", None, "Points at a time; default: one, on a laptop two.", 1)
    flags.DEFINE_bool("dry_run", False, "Only list the points and what they would cost.")


def settings() -> Settings:
    """The flags, checked; ends the command with a line where they are wrong."""
    given = flags.FLAGS
    if given.workdir is None:
        cli.fail("give --workdir=DIR")
    if importlib.util.find_spec("matplotlib") is None:
        cli.fail("studies draw pictures: pip install -e '.[plots,tokens]'")
    directory = Path(given.workdir)
    return Settings(
        directory=directory,
        out=Path(given.out) if given.out else directory / "results",
        corpus=os.path.abspath(given.corpus) if given.corpus else "",
        patterns=given.sources,
        size=given.size,
        jobs=given.jobs or (2 if given.size == "laptop" else 1),
        dry_run=given.dry_run,
    )


def prepare(given: Settings, name: str = "shared", **more) -> Shared:
    """What points share, made if need be, or as far as it is known in a dry run."""
    directory = given.directory / name
    if given.dry_run:
        return shared.assumed(directory, given.size)
    return shared.prepare(directory, given.size, given.corpus, given.patterns, **more)


def carry_out(given: Settings, planned: Sequence[Point]) -> list[dict]:
    """Runs the points -> their rows, also in results.csv. A dry run ends the command here."""
    directory = given.directory / "points"
    if given.dry_run:
        speed = FLOPS_PER_SECOND[given.size]
        points.print_plan(list(planned), directory, given.jobs, speed)
        sys.exit(0)
    failed = points.run(list(planned), directory, given.jobs)
    rows = [row for point in planned if (row := points.read(point, directory))]
    if not rows:
        cli.fail(f"every point failed: look into {directory}/*.log")
    given.out.mkdir(parents=True, exist_ok=True)
    pages.write_csv(given.out / "results.csv", rows)
    if failed:
        print(f"failed: {', '.join(failed)}; run again to try again", file=sys.stderr)
    return rows


def finish(given: Settings, rows: Sequence[dict]):
    print(f"results: {given.out / 'README.md'}")
    print(json.dumps(dict(out=str(given.out), rows=list(rows))))


def main(
    plan: Callable[[Settings], Sequence[Point]], report: Callable[[Sequence[dict], Path], None]
):
    """A study whose results are its points' rows, as a command."""

    def run(argv):
        check(argv)
        given = settings()
        with guarded():
            rows = carry_out(given, plan(given))
            report(rows, given.out)
            finish(given, rows)

    define_flags()
    app.run(run, flags_parser=cli.parse)


def check(argv):
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}: give --workdir, and nothing else but flags")


def _stop(number, frame):
    raise signals.Stopped(f"stopped by {signal.Signals(number).name}: run the same command again")


@contextlib.contextmanager
def guarded():
    """What a user can mend, and a signal, end the command with a line."""
    try:
        with signals.handling(_stop):
            yield
    except signals.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(signals.STOPPED)
    except (ValueError, OSError) as error:
        cli.fail(error)

"""Claims a working directory for one config, and writes JSON files into it."""

import json
from pathlib import Path

from bltjax.config import RunConfig, differences, to_dict
from bltjax.runtime.files import LOCK, alone, replacing


def claim_workdir(config: RunConfig, workdir: Path):
    """Write the config into a new working directory, or compare with those there.

    Raises ValueError where they differ, OSError where nothing can be written.
    """
    claim = dict(config=to_dict(config))
    path = workdir / "config.json"
    try:
        if workdir.exists() and not path.exists():
            _refuse_other_files(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        with alone(workdir):  # several processes may begin at once
            if not path.exists():
                _refuse_other_files(workdir)
                _write(path, claim)
                return
    except OSError as error:
        raise OSError(f"--workdir={workdir} cannot be written ({error}): choose another") from error
    try:
        there = json.loads(path.read_text())
        changed = differences(there["config"], claim["config"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or choose a new --workdir"
        ) from error
    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(
            f"{workdir} holds a run of another config ({changed[0]}{more}): choose another "
            "--workdir, or give the settings it was started with"
        )


def _refuse_other_files(workdir: Path):
    # Another process may be about to write the claim, or was killed while it wrote it.
    names = {p.name for p in workdir.iterdir()}
    if "config.json" not in names and names - {"config.partial", LOCK}:
        raise ValueError(
            f"{workdir} is not empty and holds no run (no config.json): choose a new --workdir"
        )


def write_json(path: Path, value: dict, once: bool = False):
    """Atomically: a killed process leaves the old file or the new one, never half of one.

    With `once` a file that is there stays as it is.
    """
    with alone(path.parent):
        if not (once and path.exists()):
            _write(path, value)


def _write(path: Path, value: dict):
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())

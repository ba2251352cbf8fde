"""Facts that the processes of one run must have in common, to be compared when they start."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax

import bltjax
from bltjax.config import RunConfig, to_dict
from bltjax.runtime.paths import is_remote

OF_A_MACHINE = ("data.cache", "data.cache_bytes")  # settings that may differ
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint")


def facts(config: RunConfig, workdir: str | os.PathLike) -> dict[str, str]:
    """Returns the working directory, every setting, and the versions of code, as texts by name."""
    found = {"--workdir": str(workdir) if is_remote(workdir) else os.path.realpath(workdir)}
    found |= dict(_settings("--config", to_dict(config)))
    for name in OF_A_MACHINE:
        del found[f"--config.{name}"]
    found |= {f"the version of {name}": version(name) for name in ("bltjax", *LIBRARIES)}
    found["the digest of bltjax's code"] = code_digest()
    found["the version of Python"] = ".".join(platform.python_version_tuple()[:2])
    found["the number of processes"] = str(jax.process_count())
    return found


def code_digest() -> str:
    """Returns a digest of the Python files of the package."""
    package, digest = Path(bltjax.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _settings(name: str, value) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _settings(f"{name}.{key}", part)
    else:
        yield name, json.dumps(value)

"""JSON files with a digest of their own content, so that a flipped bit in one is noticed."""

import hashlib
import json
from pathlib import Path

from bltjax.runtime.files import write_json
from bltjax.runtime.plain_files import check_regular

DIGEST = "digest"  # the key beside the others


def digest(value) -> str:
    """Returns 32 hexadecimal digits that tell JSON values apart, whatever the order of keys."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_checked(path: Path, value: dict):
    """Writes an object atomically, with its digest; its directory is made if need be."""
    write_json(path, value | {DIGEST: digest(value)})


def read_checked(path: Path) -> dict:
    """Reads an object that `write_checked` wrote, without the digest.

    A file without a digest, of an earlier version, is taken as it is. Raises ValueError that says
    what is wrong with the content, OSError where the file cannot be read.
    """
    check_regular(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if value.pop(DIGEST, None) not in (None, digest(value)):
        raise ValueError("its digest is of another content")
    return value

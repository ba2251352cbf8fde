"""JSON files with a digest of their own content, so that a flipped bit in one is noticed."""

import hashlib
import json
from pathlib import Path

from bltjax.runtime.files import write_json
from bltjax.runtime.paths import read_whole
from bltjax.runtime.plain_files import check_regular

DIGEST = "digest"  # the key beside the others


def digest(value) -> str:
    """Returns 32 hexadecimal digits that tell JSON values apart, whatever the order of keys."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def with_digest(value: dict) -> dict:
    """Returns an object with its digest beside its other fields."""
    return value | {DIGEST: digest(value)}


def without_digest(value: dict) -> dict:
    """Returns what `with_digest` was given; ValueError where the content is another one.

    An object without a digest, of an earlier version, is taken as it is.
    """
    has_digest = DIGEST in value
    # In an object without one, the name of the last field may be what is damaged.
    name = DIGEST if has_digest else next(reversed(value), "")
    content = {field: v for field, v in value.items() if field != name}
    if (value.get(name) == digest(content)) != has_digest:
        raise ValueError("its digest is of another content")
    return content if has_digest else value


def write_checked(path: Path, value: dict):
    """Writes an object atomically, with its digest; its directory is made if need be."""
    write_json(path, with_digest(value))


def read_checked(path: Path) -> dict:
    """Reads an object that `write_checked` wrote, without the digest.

    A file without a digest, of an earlier version, is taken as it is. Raises ValueError that says
    what is wrong with the content, OSError where the file cannot be read.
    """
    check_regular(path)
    text = read_whole(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return without_digest(value)

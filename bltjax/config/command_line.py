"""Takes settings out of a command line: `--config.blt.hash.vocab=7`, in text, and reads them."""

import ast
import re
import typing

from bltjax.config.names import groups, settings, unknown
from bltjax.config.reading import is_optional, plain_type

WORDS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
WANTED = {int: "a whole number", float: "a number", bool: "true or false"}
SHOWN = 60  # letters of a value in a message


def take_settings(argv: list[str]) -> tuple[list[str], dict[str, typing.Any]]:
    """Returns a command line without its settings, and their values by name; the last one counts.

    Forms: `--config.NAME=VALUE`, `--config.NAME VALUE`, and `--config.NAME` for true. Raises
    ValueError for a name or a value that is wrong.
    """
    rest: list[str] = []
    found: dict[str, typing.Any] = {}
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--":
            return [*rest, argument, *waiting], found
        name, equals, text = argument.partition("=")
        if not re.match(r"--?config\.", name, re.IGNORECASE):
            rest.append(argument)
            continue
        name = name.lstrip("-")[len("config.") :]
        hint = _hint(name, argument)
        if not equals and hint is bool:
            text = "true"
        elif not equals and waiting and not re.match(r"-[^\d.]|-$", waiting[0]):
            text = waiting.pop(0)
        elif not equals:
            raise ValueError(f"--config.{name} has no value: give --config.{name}=VALUE")
        found[name] = read_value(name, text)
    return rest, found


def _hint(name: str, argument: str):
    if name in settings():
        return settings()[name].hint
    if name in groups():
        inside = [s for s in (*settings(), *groups()) if s.rpartition(".")[0] == name]
        shown = ", ".join(s.rpartition(".")[2] for s in inside)
        raise ValueError(
            f"{_short(argument)} cannot be set: config.{name} is a group of settings, set one in "
            f"it, such as --config.{inside[0]} (others: {shown})"
        )
    raise ValueError(unknown(name, "--config."))


def read_value(name: str, text: str):
    """Returns the value of a setting that is given as text; raises ValueError for a wrong one."""
    hint = settings()[name].hint
    try:
        return _value(hint, text)
    except (ValueError, KeyError):
        wanted = WANTED.get(plain_type(hint), "a tuple")
        wanted += " or None" if is_optional(hint) else ""
        raise ValueError(f"--config.{name}={_short(text)} must be {wanted}") from None


def _value(hint, text: str):
    plain = plain_type(hint)
    if is_optional(hint) and text == "None":
        return None
    if plain is bool:
        return WORDS[text.lower()]
    return plain(text) if plain in (int, float, str) else _tuple(text)


def _tuple(text: str) -> tuple:
    """Reads a tuple as Python writes it, one entry alone, or words with commas between them."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if re.search(r"[][(){}\"']", text):
            raise ValueError(text) from None
        return tuple(text.split(","))
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

"""The fields of requests: one table for checks, for `/openapi.json` and for the page in docs/.

A schema is JSON schema, of which `fits` knows what the table uses.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bltjax.runtime.terminal import short
from bltjax.serving.errors import RequestError
from bltjax.serving.text import BOS_TOKEN

MAX_STOPS = 4
MAX_CHOICES = 128
MAX_NEW_BYTES = 2**20  # what there is room for is less, see Scheduler


class Field(NamedTuple):
    """A field of a request; null is its default."""

    name: str
    schema: dict
    default: Any
    wanted: str  # completes "must be ..."
    meaning: str


STRING = dict(type="string")
BOOL = dict(type="boolean")
BYTES = dict(type="array", items=dict(type="integer", minimum=0, maximum=BOS_TOKEN))
STRINGS = dict(type="array", items=STRING, minItems=1)
NO_OBJECT = dict(type="object")
STOPS = dict(type="array", items=dict(type="string", minLength=1), maxItems=MAX_STOPS)


def whole(least: int, most: int) -> dict:
    return dict(type="integer", minimum=least, maximum=most)


def number(least: float, most: float) -> dict:
    return dict(type="number", minimum=least, maximum=most)


THRESHOLD = Field(
    "threshold",
    number(-1e6, 1e6),
    None,
    "a number of nats",
    "instead of the trained one: a higher one makes longer patches",
)

COMMON = (
    Field("model", STRING, "", "a string", "any name; there is one model"),
    Field(
        "temperature", number(0, 2), 1.0, "a number from 0 to 2", "0: always the most probable byte"
    ),
    Field(
        "top_p",
        dict(type="number", exclusiveMinimum=0, maximum=1),
        None,
        "a number above 0, at most 1",
        "draw from the most probable bytes that together have this probability",
    ),
    Field(
        "top_k",
        whole(-1, 2**30),
        None,
        "a whole number from -1",
        "of the k most probable bytes; 0 and -1: of all",
    ),
    Field(
        "min_p",
        number(0, 1),
        None,
        "a number from 0 to 1",
        "of bytes with at least this share of the best byte's probability",
    ),
    Field(
        "repetition_penalty",
        number(1e-6, 1e6),
        1.0,
        "a number from 1e-6 to 1e6",
        "above 1: bytes that occurred become rarer",
    ),
    Field("valid_utf8", BOOL, False, "true or false", "write nothing that is not UTF-8"),
    Field("n", whole(1, MAX_CHOICES), 1, f"a whole number from 1 to {MAX_CHOICES}", "texts"),
    Field(
        "stop",
        dict(anyOf=[dict(type="string", minLength=1), STOPS]),
        (),
        f"a string, or at most {MAX_STOPS} of them, none empty",
        "ends the text, and is left out of it",
    ),
    Field(
        "seed",
        whole(-(2**63), 2**63 - 1),
        None,
        "a whole number of 64 bits",
        "of what is drawn: the same one gives the same text, in any company; null: any",
    ),
    THRESHOLD,
    Field("stream", BOOL, False, "true or false", "send the text as it is written"),
    Field(
        "stream_options",
        NO_OBJECT,
        {},
        "an object",
        "`include_usage`: a last piece with `usage`",
    ),
)

COMPLETIONS = (
    Field(
        "prompt",
        dict(
            anyOf=[
                STRING,
                STRINGS,
                dict(BYTES, minItems=1),
                dict(type="array", items=BYTES, minItems=1),
            ]
        ),
        "",
        f"a string, a list of strings, a list of bytes 0 to 255 ({BOS_TOKEN} first is BOS), or a "
        "list of such lists",
        "what the text begins with; integers are raw bytes",
    ),
    Field(
        "max_tokens",
        whole(0, MAX_NEW_BYTES),
        16,
        f"a whole number from 0 to {MAX_NEW_BYTES}",
        "bytes to write at most",
    ),
    Field("echo", BOOL, False, "true or false", "begin the text with the prompt"),
    Field(
        "logprobs",
        whole(0, 5),
        None,
        "a whole number from 0 to 5",
        "log-probabilities of each byte, and of so many most probable ones; with `echo` of the "
        "prompt too",
    ),
    Field("best_of", whole(1, MAX_CHOICES), None, "the same as n", "only the value of `n`"),
    *COMMON,
)

CHAT = (
    Field(
        "messages",
        dict(type="array", items=dict(type="object"), minItems=1),
        None,
        "a list of at least one object with role and content",
        "the conversation: `role` is system (or developer), user or assistant; `content` a string, "
        "or parts of the type text",
    ),
    Field(
        "max_completion_tokens",
        whole(1, MAX_NEW_BYTES),
        None,
        f"a whole number from 1 to {MAX_NEW_BYTES}",
        "bytes of the answer at most; 512",
    ),
    Field(
        "max_tokens",
        whole(1, MAX_NEW_BYTES),
        None,
        f"a whole number from 1 to {MAX_NEW_BYTES}",
        "the older name of it",
    ),
    Field("logprobs", BOOL, False, "true or false", "log-probabilities of each byte"),
    Field(
        "top_logprobs",
        whole(0, 20),
        None,
        "a whole number from 0 to 20",
        "and of so many most probable ones; needs `logprobs`",
    ),
    *COMMON,
)

PATCHES = (
    Field("prompt", COMPLETIONS[0].schema, "", COMPLETIONS[0].wanted, "the text; one of them"),
    THRESHOLD,
)
TOKENIZE = (Field("prompt", STRING, None, "a string", "the text"),)
DETOKENIZE = (Field("tokens", BYTES, None, COMPLETIONS[0].wanted, "bytes 0 to 255"),)

# What is not there, and the values with which a client asks for nothing of it.
MISSING = dict(
    audio=(),
    frequency_penalty=(0,),
    function_call=("none", "auto"),
    functions=([],),
    logit_bias=({},),
    modalities=(["text"],),
    prediction=(),
    presence_penalty=(0,),
    response_format=({"type": "text"},),
    suffix=("",),
    tool_choice=("none", "auto"),
    tools=([],),
    web_search_options=(),
)


def checked(body: Any, fields: Sequence[Field]) -> dict:
    """Returns the values of all fields, with defaults where a request says nothing.

    Keys that no field has are ignored. Raises RequestError for a value out of range, and for what
    there is not.
    """
    if not isinstance(body, Mapping):
        raise RequestError(f"the body is {short(body)}: send a JSON object")
    for name, neutral in MISSING.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise RequestError(
                f"{name}={short(value)} is not supported here: leave it out",
                name,
                code="unsupported",
            )
    found = {}
    for field in fields:
        value = body.get(field.name)
        if value is None:
            value = field.default
        elif not fits(value, field.schema):
            raise RequestError(f"{field.name}={short(value)} must be {field.wanted}", field.name)
        found[field.name] = value
    return found


def fits(value, schema: Mapping) -> bool:
    """Returns whether a value is what a schema says."""
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    kind = schema["type"]
    if kind in ("integer", "number"):
        return _is_number(value, whole=kind == "integer") and _within(value, schema)
    if kind == "string":
        return isinstance(value, str) and len(value) >= schema.get("minLength", 0)
    if kind == "array":
        if not isinstance(value, list) or len(value) < schema.get("minItems", 0):
            return False
        if len(value) > schema.get("maxItems", len(value)):
            return False
        return all(fits(item, schema["items"]) for item in value)
    return isinstance(value, dict(boolean=bool, object=dict)[kind])


def _is_number(value, whole: bool) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


def _within(value, schema: Mapping) -> bool:
    if "exclusiveMinimum" in schema and not value > schema["exclusiveMinimum"]:
        return False
    return schema.get("minimum", value) <= value <= schema.get("maximum", value)

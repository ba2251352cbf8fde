"""The description of the routes in `/openapi.json`, made of the table of fields."""

from collections.abc import Sequence
from importlib.metadata import version

from bltjax.serving.fields import CHAT, COMPLETIONS, DETOKENIZE, PATCHES, TOKENIZE, Field

POSTS = {
    "/v1/completions": ("Writes on from prompts, or scores them.", COMPLETIONS, ()),
    "/v1/chat/completions": ("Answers a conversation.", CHAT, ("messages",)),
    "/v1/patches": ("Shows the patches of a text.", PATCHES, ()),
    "/tokenize": ("Gives the bytes of a text.", TOKENIZE, ("prompt",)),
    "/detokenize": ("Gives the text of bytes.", DETOKENIZE, ("tokens",)),
}
GETS = {
    "/": ("A page that shows patches.", "text/html"),
    "/health": ("Says whether the server takes requests.", "application/json"),
    "/metrics": ("Counters for Prometheus.", "text/plain"),
    "/v1/models": ("Names the model.", "application/json"),
    "/v1/models/{name}": ("Tells whether it is the model.", "application/json"),
    "/tokenizer_info": ("Names the special tokens.", "application/json"),
}
REFUSALS = {
    "400": "a value that makes no sense, or that there is no room for",
    "401": "the key is missing or wrong",
    "404": "no such model",
    "413": "the body is too large",
    "415": "the body is no application/json",
    "429": "too many texts wait",
    "500": "the model has failed",
    "503": "the server ends",
}


def description(root_path: str = "") -> dict:
    """Returns the OpenAPI 3.1 document of the server; root_path: before all paths."""
    refusals = {
        code: _response(meaning, "#/components/schemas/Error") for code, meaning in REFUSALS.items()
    }
    paths: dict = {}
    for path, (summary, fields, required) in POSTS.items():
        content = {"application/json": dict(schema=schema(fields, required))}
        answers = {"200": _response("the answer")} | refusals
        if any(field.name == "stream" for field in fields):
            answers["200"]["content"]["text/event-stream"] = {}
        body = dict(required=True, content=content)
        paths[path] = dict(post=dict(summary=summary, requestBody=body, responses=answers))
    for path, (summary, kind) in GETS.items():
        answers = {"200": dict(description="the answer", content={kind: {}})} | refusals
        paths[path] = dict(get=dict(summary=summary, responses=answers))
        if "{name}" in path:
            place = {"name": "name", "in": "path", "required": True}
            paths[path]["get"]["parameters"] = [dict(place, schema=dict(type="string"))]
    return dict(
        openapi="3.1.0",
        info=dict(title="bltjax", version=version("bltjax")),
        servers=[dict(url=root_path or "/")],
        paths=paths,
        components=dict(schemas=dict(Error=ERROR)),
    )


def schema(fields: Sequence[Field], required: Sequence[str] = ()) -> dict:
    """Returns the JSON schema of a body; keys that it does not name are ignored."""
    properties = {
        field.name: dict(anyOf=[field.schema, dict(type="null")], description=field.meaning)
        if field.name not in required
        else dict(field.schema, description=field.meaning)
        for field in fields
    }
    return dict(type="object", properties=properties, required=list(required))


def _response(meaning: str, reference: str | None = None) -> dict:
    content = {"$ref": reference} if reference else dict(type="object")
    return dict(description=meaning, content={"application/json": dict(schema=content)})


STRING_OR_NULL = dict(type=["string", "null"])
ERROR = dict(
    type="object",
    required=["error"],
    properties=dict(
        error=dict(
            type="object",
            required=["message", "type"],
            properties=dict(
                message=dict(type="string"),
                type=dict(type="string"),
                param=STRING_OR_NULL,
                code=STRING_OR_NULL,
            ),
        )
    ),
)

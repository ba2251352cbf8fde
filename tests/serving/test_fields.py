"""The table of fields: what is checked is what `/openapi.json` says."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.serving.errors import RequestError
from bltjax.serving.fields import CHAT, COMMON, COMPLETIONS, MISSING, PATCHES, checked, fits
from bltjax.serving.metrics import Metrics
from bltjax.serving.openapi import POSTS, description, schema

ROOT = Path(__file__).parents[2]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
FIELDS = {(field.name, id(field)): field for field in (*COMPLETIONS, *CHAT, *PATCHES)}.values()


@given(VALUES)
def test_checks_are_those_of_the_schemas(value):
    for field in FIELDS:
        if isinstance(value, float) and value.is_integer():
            continue  # JSON schema calls 1.0 a whole number, and clients do not send it
        by_library = jsonschema.Draft202012Validator(field.schema).is_valid(value)
        assert fits(value, field.schema) == by_library, (field.name, value)


@pytest.mark.parametrize("fields", [COMPLETIONS, CHAT, PATCHES])
def test_defaults_are_values_and_null_is_the_default(fields):
    assert checked({}, fields) == checked({field.name: None for field in fields}, fields)
    for field in fields:
        assert field.default in (None, (), {}) or fits(field.default, field.schema)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("temperature", 2.5, "temperature=2.5 must be a number from 0 to 2"),
        ("temperature", True, "temperature=True must be a number"),
        ("top_p", 0, "top_p=0 must be a number above 0"),
        ("n", 0, "n=0 must be a whole number from 1 to 128"),
        ("logprobs", 6, "logprobs=6 must be a whole number from 0 to 5"),
        ("stop", list("abcde"), "must be a string, or at most 4"),
        ("stop", "", "none empty"),
        ("max_tokens", -1, "max_tokens=-1 must be"),
        ("max_tokens", 1.5, "max_tokens=1.5 must be"),
        ("prompt", {}, "prompt={} must be a string"),
        ("prompt", [1, "a"], "must be a string, a list of strings"),
        ("prompt", [257], "a list of bytes 0 to 255"),
        ("logit_bias", {"65": 3}, "logit_bias={'65': 3} is not supported"),
        ("suffix", "end", "suffix='end' is not supported"),
        ("frequency_penalty", 0.5, "frequency_penalty=0.5 is not supported"),
    ],
)
def test_what_is_refused_is_named(name, value, told):
    with pytest.raises(RequestError) as refused:
        checked({name: value}, COMPLETIONS)
    assert told in str(refused.value) and refused.value.param == name
    assert refused.value.status == 400


def test_neutral_values_and_unknown_keys_pass():
    neutral = {name: values[0] for name, values in MISSING.items() if values}
    given_ = neutral | dict(user="someone", unheard_of=[1], metadata={}, store=True)
    assert checked(given_, CHAT) == checked({}, CHAT)


@pytest.mark.parametrize("body", [[], "text", 3, None])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(RequestError, match="send a JSON object"):
        checked(body, COMPLETIONS)


def test_what_is_required_has_no_default():
    for _, fields, required in POSTS.values():
        found = {field.name for field in fields if field.name in required}
        assert found == set(required)
        assert all(field.default is None for field in fields if field.name in required)


def test_the_description_is_a_schema_of_every_field():
    found = description()
    post = found["paths"]["/v1/completions"]["post"]["requestBody"]
    body = post["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {field.name for field in COMPLETIONS}
    jsonschema.Draft202012Validator.check_schema(body)
    validator = jsonschema.Draft202012Validator(schema(CHAT, ("messages",)))
    assert validator.is_valid(dict(messages=[{}], stop=None))
    assert not validator.is_valid(dict(stop="a")) and not validator.is_valid(dict(messages=[]))


def test_what_streams_says_so():
    for path, operations in description()["paths"].items():
        if "post" in operations:
            kinds = set(operations["post"]["responses"]["200"]["content"])
            streams = path.endswith("completions")
            assert kinds == {"application/json"} | ({"text/event-stream"} if streams else set())


def listed(title):
    """Rows of the table below a heading of the page of serving."""
    page = (ROOT / "docs" / "serving.md").read_text()
    table = re.search(rf"^### {title}\n\n((?:\|.*\n)+)", page, re.MULTILINE)[1]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("title", "fields"),
    [
        ("Fields of both", COMMON),
        ("Completions", [field for field in COMPLETIONS if field not in COMMON]),
        ("Chat", [field for field in CHAT if field not in COMMON]),
        ("Patches", PATCHES),
    ],
)
def test_fields_are_on_their_page(title, fields):
    def default(field):
        nothing = field.default in (None, (), {})
        return "" if nothing else f"`{json.dumps(field.default)}`"

    wanted = [[f"`{f.name}`", default(f), f.wanted, f.meaning] for f in fields]
    assert listed(title) == wanted


def test_metrics_are_on_their_page():
    page = (ROOT / "docs" / "serving.md").read_text()
    metrics = {family.name for family in Metrics().registry.collect()}
    told = set(re.findall(r"`(bltjax_\w+)`", page))
    assert {name.removesuffix("_total") for name in told} == metrics

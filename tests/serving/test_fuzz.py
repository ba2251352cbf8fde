"""The server against its own description: requests that it allows, and others, made at random."""

import hypothesis
import pytest

from bltjax.serving.openapi import GETS, POSTS
from tests.serving import servers

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
pytestmark = pytest.mark.slow
REQUESTS = 5_000  # of all routes with a body
ROUTES = [*((path, "POST") for path in POSTS), *((path, "GET") for path in GETS)]
RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "tiny"
    checkpoint = servers.write_model(directory, bltjax_chat=servers.CHAT)
    with servers.running(checkpoint, "--max_length=64", "--rows=2") as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        assert server.end()[0] == 0


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_answers_are_as_described(description, path, method):
    """No status, header or body that the description lacks, no 500, and nothing wrong is taken."""
    operation = description[path][method]
    modes = (RIGHT, WRONG) if method == "POST" else (RIGHT,)
    # What is right by its schema may lack room, or be no conversation.
    unchecked = [schemathesis.specs.openapi.checks.positive_data_acceptance]
    number = REQUESTS // len(POSTS) // len(modes)

    @hypothesis.settings(max_examples=number, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(data=hypothesis.strategies.data())
    def answered(mode, data):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        answer = case.call_and_validate(excluded_checks=unchecked, timeout=240)
        assert answer.status_code < 500
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    for mode in modes:
        answered(mode)

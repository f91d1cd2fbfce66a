"""The server keeps to the OpenAPI document that it gives: whatever that allows, and what it does not, is answered as it
says."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi import checks

TOKENS = ("max_tokens", "max_completion_tokens")


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


document_of_the_server = schemathesis.pytest.from_fixture("document")


@document_of_the_server.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_the_document_says_is_so(case):
    if isinstance(case.body, dict):  # not slow
        if "prompt" in case.body or "messages" in case.body:
            case.body |= {name: min(case.body[name], 8) for name in TOKENS if type(case.body.get(name)) is int}
            if not any(case.body.get(name) for name in TOKENS) and case.path.startswith("/v1/"):
                case.body["max_tokens"] = 8
        if type(case.body.get("n")) is int:
            case.body["n"] = min(case.body["n"], 2)
    case.call_and_validate(
        checks=[
            schemathesis.checks.not_a_server_error,
            checks.status_code_conformance,
            checks.content_type_conformance,
            checks.response_schema_conformance,
            checks.response_headers_conformance,
            checks.negative_data_rejection,
        ]
    )

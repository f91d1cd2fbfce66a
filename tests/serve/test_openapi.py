"""The server keeps to the OpenAPI document that it gives: whatever that allows, and what it does not, is answered as it
says."""

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="it needs Python 3.11")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
]


def quick(body) -> None:
    """What would take long is asked for in small."""
    if isinstance(body, dict):
        for name, most in {"max_tokens": 6, "max_completion_tokens": 6, "n": 2}.items():
            if type(body.get(name)) is int:
                body[name] = min(body[name], most)
        if "messages" in body and not (body.get("max_tokens") or body.get("max_completion_tokens")):
            body["max_tokens"] = 6


def test_what_the_document_says_is_so(server):
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert {o.path for o in operations} >= {"/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/models"}
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and operation.method == "get":  # takes nothing that could be wrong
                continue

            @settings(max_examples=8 if operation.body else 2, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(mode))
            def run(case):
                if case.path.startswith("/v1/"):
                    quick(case.body)
                case.call_and_validate(checks=CHECKS)

            run()

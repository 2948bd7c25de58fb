"""The OpenAPI description is true: made-up requests of all kinds get answers that it knows."""

import pytest
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks, openapi

# Any bytes are a body by the description, which cannot say what a photo is; others get 422.
BEYOND_THE_DESCRIPTION = [checks.positive_data_acceptance]


@pytest.mark.full
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_those_of_the_description(service, mode):
    schema = openapi.from_url(f"{service.client.base_url}/openapi.json")
    tried = []
    for operation in (result.ok() for result in schema.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # there is nothing in it that could be wrong

        @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            case.call_and_validate(excluded_checks=BEYOND_THE_DESCRIPTION)

        check()
        tried.append(operation.label)
    assert len(tried) == (5 if mode is GenerationMode.POSITIVE else 1)

"""One token for one sequence, by its id."""

import pytest
from scenes import books

pytestmark = pytest.mark.benchmark(group="append a token by id")

PROMPT, SEQUENCES, TOKENS = 100, 256, 8


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_append_token(measure, placement):
    cache = books(65_536, placement)
    ids = [f"request-{number}" for number in range(SEQUENCES)]
    for request_id in ids:
        assert cache.allocate_for(request_id, PROMPT, max_tokens=1000)
    calls = ids * TOKENS

    def cut():
        assert all(cache.truncate(request_id, PROMPT) for request_id in ids)

    def append():
        append_token = cache.append_token
        for request_id in calls:
            append_token(request_id)

    def verify():
        assert {cache.used_tokens(request_id) for request_id in ids} == {PROMPT + TOKENS}

    measure(
        append,
        prepare=cut,
        verify=verify,
        calls=len(calls),
        turns=len(calls),
        targets={"median": lambda call: 2.5 * call + 25},
    )
    cache.check()

"""The load test itself, for some requests: it counts what happens, and a wrong answer is one."""

import asyncio
import math
from dataclasses import replace

import pytest

from ctkernels.serving.server.engine import Request
from ctkernels.testing.tasks import char_tokenizer
from tests.serving.server.serving import NAME, alone, random_prompt, running, stored, tiny
from tools.load.clients import Known, campaign


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tiny()
    with running(model, stored(tmp_path_factory.mktemp("store"), model), rows=2, queue=2) as server:
        yield server


@pytest.fixture(scope="module")
def pool(server) -> list[Known]:
    twin, pool = tiny(), []
    for number, model in enumerate((NAME, "long", "team-a/routing", "long")):
        request = Request(server.service.prefix(model), random_prompt(3 + number, number), 4 + 2 * number)
        tokens = alone(twin, replace(request, ends=server.service._ends))
        text = char_tokenizer().decode(tokens, skip_special_tokens=True)
        pool.append(Known(model, request.prompt, request.max_tokens, text, len(tokens)))
    return pool


def test_outcomes(server, pool):
    """Eight clients at two rows and two places in the queue."""
    found = asyncio.run(campaign(server.address, pool, 8, math.inf, requests=5))
    assert found.bad == 0, found.examples
    assert all(found.outcomes[outcome] for outcome in ("whole", "streamed", "left", "refused")), found
    assert found.outcomes.total() == 8 * 5 and found.tokens > 0


def test_a_wrong_answer_is_found(server, pool):
    wrong = [replace(known, text=known.text[:-1] + "#") for known in pool]
    found = asyncio.run(campaign(server.address, wrong, 2, math.inf, requests=4))
    assert found.outcomes["wrong"] > 0 and found.examples[0].startswith("wrong: ")
    assert found.outcomes["whole"] == found.outcomes["streamed"] == 0

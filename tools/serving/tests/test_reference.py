"""What counts as a right answer of an engine."""

import pytest
import torch

from ctkernels.testing.models import make_model, tokens
from ctkernels.testing.tasks import char_tokenizer
from ctkernels.tuning import KVPrefix
from tools.serving import reference
from tools.serving.reference import Reference, Request


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", torch.float32, eos_token_id=2).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    own = Reference(str(folder), str(folder / "store"))
    base = KVPrefix.from_tokens(own.model, tokens(7), torch.tensor([0, 7]))
    for seed in range(2):
        own.noised(f"noise/{seed}", base, seed)
    return own


REQUESTS = [Request(f"noise/{n % 2}", tuple(tokens(3 + n, seed=n).tolist()), 5) for n in range(4)]
REQUESTS.append(Request(None, tuple(tokens(9).tolist()), 5))


def test_noise_keeps_the_context_and_differs(own):
    one, two = own.store.get("noise/0"), own.store.get("noise/1")
    assert one.context == two.context == tuple(tokens(7).tolist())
    assert not torch.equal(one.keys[0], two.keys[0])


def test_a_batch_is_answered_as_each_request_alone(own):
    together = own.generate(REQUESTS)
    assert together == [own.generate([request])[0] for request in REQUESTS]
    assert all(own.distance(request, answer) < 1e-5 for request, answer in zip(REQUESTS, together, strict=True))


def test_answers_are_equal_ties_or_wrong(own, monkeypatch):
    expected = own.generate(REQUESTS)
    assert own.judge(REQUESTS, expected, expected).equal == len(REQUESTS)
    other = [*expected]
    other[1] = (*expected[1][:-1], (expected[1][-1] + 1) % 61)
    verdict = own.judge(REQUESTS, expected, other)
    assert (verdict.equal, verdict.ties, verdict.wrong) == (len(REQUESTS) - 1, 0, [1])
    distance = own.distance(REQUESTS[1], other[1])
    monkeypatch.setattr(reference, "MARGIN", distance)
    verdict = own.judge(REQUESTS, expected, other)
    assert (verdict.ties, verdict.wrong, verdict.margin) == (1, [], distance)
    for short in ((), expected[1][:2]):  # an answer that ends early is no tie
        assert own.judge(REQUESTS, expected, [expected[0], short, *expected[2:]]).wrong == [1]


def test_an_answer_ends_with_the_stop_token(own):
    assert own.cut([5, 2, 7, 2]) == (5, 2) and own.cut([5, 6]) == (5, 6)

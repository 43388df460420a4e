"""The engine: answers of requests that come and go at any time, the queue, time-outs, cancelled requests, errors."""

import random
import threading
import time

import pytest
import torch

from ctkernels.serving.server.engine import Busy, Closed, Engine, Failed, Request
from ctkernels.serving.server.sampling import Sampling
from ctkernels.serving.server.text import AnswerText
from ctkernels.testing.tasks import EOS, char_tokenizer
from ctkernels.tuning import KVPrefix
from tests.serving.server.serving import Heard, alone, continued, random_prompt, stored, tiny

TOKENIZER = char_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prefixes(model, tmp_path_factory) -> list[KVPrefix]:
    store = stored(tmp_path_factory.mktemp("store"), model)
    return [store.get(name) for name in store]


def request(prefixes, number: int, count: int, **others) -> Request:
    return Request(prefixes[number % len(prefixes)], random_prompt(1 + number % 7, number), count, **others)


def decoded(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_answers_equal_generate(model, prefixes):
    """From several threads, with end tokens, a third of them cancelled in the middle."""
    requests = [request(prefixes, n, 3 + n % 7, ends=frozenset({EOS, 10})) for n in range(12)]
    expected = [alone(model, each) for each in requests]
    engine, heard = Engine(model, TOKENIZER, rows=5, queue=50), [Heard() for _ in requests]

    def client(numbers: list[int]) -> None:
        for n in numbers:
            ticket = engine.submit(requests[n], heard[n])
            time.sleep(random.Random(n).random() / 50)
            if n % 3 == 0:
                ticket.cancel()

    threads = [threading.Thread(target=client, args=(list(range(start, 12, 4)),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends = [each.wait() for each in heard]
    engine.close()
    assert not engine.alive and continued(model, [5], 2)
    for n, (end, tokens) in enumerate(zip(ends, expected, strict=True)):
        if isinstance(end, Failed):
            assert end.why == "cancelled" and n % 3 == 0
            assert decoded(tokens).startswith(heard[n].text)
        else:
            stopped = tokens[-1] in requests[n].ends
            assert heard[n].text == decoded(tokens[:-1] if stopped else tokens) and end.tokens == len(tokens)
            assert end.why == ("stop" if stopped else "length")
    assert {end.why for n, end in enumerate(ends) if n % 3} == {"stop", "length"}
    assert engine.metrics.registry.get_sample_value("ctkernels_rows") == 0


def test_sampling_equals_generate(model, prefixes):
    """The same seed gives what generate() draws, whatever else is in the batch."""
    how = Sampling(temperature=1.7, top_p=0.9, seed=11)
    asked = [request(prefixes, n, 8, sampling=how) for n in range(3)]
    expected = []
    for each in asked:
        torch.manual_seed(11)
        with each.prefix.attach(model):
            drawn = {"do_sample": True, "temperature": 1.7, "top_p": 0.9, "top_k": 0}
            expected.append(decoded(continued(model, each.prompt, 8, **drawn)))
    engine, heard = Engine(model, TOKENIZER), [Heard() for _ in asked]
    for each, listener in zip(asked, heard, strict=True):
        engine.submit(each, listener)
    for listener in heard:
        listener.wait()
    engine.close()
    assert [listener.text for listener in heard] == expected


def test_the_queue_is_bounded_and_the_end_is_orderly(model, prefixes):
    engine = Engine(model, TOKENIZER, rows=1, queue=2)
    heard = [Heard() for _ in range(4)]
    long = engine.submit(request(prefixes, 0, 200), heard[0])
    heard[0].first.wait(30)
    waiting = [engine.submit(request(prefixes, n, 2), heard[n]) for n in (1, 2)]
    with pytest.raises(Busy, match="2 requests are waiting already"):
        engine.submit(request(prefixes, 3, 2), heard[3])
    waiting[0].cancel()
    engine.refuse()
    with pytest.raises(Closed):
        engine.submit(request(prefixes, 3, 2), heard[3])
    long.cancel()
    engine.close()
    assert heard[0].end.why == "cancelled" and heard[1].end.why == "cancelled" and heard[2].end.why == "length"
    assert heard[3].end is None


def test_time_outs(model, prefixes):
    """In the batch, and in the queue behind it."""
    engine = Engine(model, TOKENIZER, rows=1)
    heard = [Heard(), Heard(), Heard()]
    engine.submit(request(prefixes, 0, 200, seconds=0.1), heard[0])
    engine.submit(request(prefixes, 1, 2, seconds=0.01), heard[1])
    engine.submit(request(prefixes, 2, 2), heard[2])
    ends = [each.wait() for each in heard]
    engine.close()
    assert [end.why for end in ends] == ["timeout", "timeout", "length"]
    assert 0 < len(heard[0].text) < 200 and "longer than 0.01 s" in ends[1].message


def test_a_failure_ends_its_own_requests_alone(model, prefixes, caplog):
    """A prompt that fails, a step that fails, a row that cannot choose: the engine goes on."""
    engine = Engine(model, TOKENIZER, rows=2)
    good, bad = Heard(), Heard()
    engine.submit(request(prefixes, 1, 60), good)
    good.first.wait(30)
    engine.submit(Request(prefixes[0], (10**6,), 3), bad)  # no such token
    assert bad.wait().why == "error" and good.wait().why == "length"

    step, engine._batch.step = engine._batch.step, lambda tokens: 1 / 0
    failed = Heard()
    engine.submit(request(prefixes, 1, 60), failed)
    assert failed.wait() == Failed("error", "the model failed: ZeroDivisionError")
    engine._batch.step = step

    mixed = [Heard(), Heard()]
    engine.submit(request(prefixes, 1, 60), mixed[0]).choose = lambda logits: 1 / 0
    engine.submit(request(prefixes, 2, 5), mixed[1])
    assert mixed[0].wait().why == "error" and mixed[1].wait().why == "length"
    engine.close()
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    "stops, pieces, rest",
    [
        ((), ["a", "b", "c", "a", "b", "d"], ""),
        (("abd",), ["", "", "abc", "", "", ""], ""),
        (("bx", "ca"), ["a", "", "b", ""], ""),
        (("dz",), ["a", "b", "c", "a", "b", ""], "d"),
    ],
)
def test_stop_strings(stops, pieces, rest):
    """What may begin a stop string waits, and what it begins is not sent."""
    text, sent = AnswerText(TOKENIZER, stops), []
    for token in TOKENIZER("abcabd").input_ids:
        sent += [] if text.stopped else [text.add(token)]
    assert (sent, text.end(), text.stopped) == (pieces, rest, len(pieces) < 6 or stops == ("abd",))


def test_characters_of_several_tokens():
    class Bytes:
        @staticmethod
        def decode(tokens, **settings):
            return bytes(tokens).decode(errors="replace")

    text = AnswerText(Bytes())
    assert [text.add(byte) for byte in "aé…".encode()] == ["a", "", "é", "", "", "…"]
    assert text.add(0xC3) == "" and text.end() == "\ufffd"

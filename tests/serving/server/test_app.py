"""OpenAI's API over HTTP: a running server, called as clients do."""

import json
import time

import httpx2
import pytest
import torch

from ctkernels.serving.server.engine import Request
from ctkernels.serving.server.protocol import Limits
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import BOS, EOS, char_tokenizer
from ctkernels.tuning import encode_prompt
from tests.serving.server.serving import NAME, PREFIXES, alone, running, stored, tiny

TOKENIZER = char_tokenizer()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role[0] }}. {{ m.content }} {% endfor %}{% if add_generation_prompt %}a. {% endif %}"
)
LIMITS = Limits(body_bytes=20_000, max_tokens=150)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tiny()
    with running(model, stored(tmp_path_factory.mktemp("store"), model), limits=LIMITS, chat_template=TEMPLATE) as it:
        yield it


@pytest.fixture(scope="module")
def twin():
    """The same model, which is not the server's."""
    return tiny()


def expected(twin, server, model: str, prompt: list[int], count: int) -> str:
    tokens = alone(twin, Request(server.service.prefix(model), tuple(prompt), count, ends=frozenset({EOS})))
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_models_and_health(server):
    listed = server.client.get("/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == [NAME, *(f"{NAME}:{name}" for name in sorted(PREFIXES))]
    assert listed["object"] == "list" and {entry["object"] for entry in listed["data"]} == {"model"}
    assert server.client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("model", [NAME, "long", "tiny:team-a/routing", "team b: Ä"])
def test_completions(server, twin, model):
    """Whole and streamed, the same text, that of generate()."""
    body = {"model": model, "prompt": "a warm log", "max_tokens": 7, "temperature": 0}
    wanted = expected(twin, server, model, TOKENIZER("a warm log").input_ids, 7)
    answer = server.post("/v1/completions", **body).json()
    choice = answer["choices"][0]
    assert (answer["object"], answer["model"]) == ("text_completion", model) and answer["id"].startswith("cmpl-")
    assert choice == {"index": 0, "text": wanted, "logprobs": None, "finish_reason": choice["finish_reason"]}
    count = answer["usage"]["completion_tokens"]
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
    assert (choice["finish_reason"] == "length") == (count == 7)

    *parts, last, counts = server.stream("/v1/completions", **body, stream_options={"include_usage": True})
    assert "".join(part["choices"][0]["text"] for part in parts) == wanted and len(parts) > 1
    assert last["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert counts["choices"] == [] and counts["usage"] == answer["usage"]


def test_tokens_and_inputs_of_a_task(server, twin):
    """A prompt of token ids is taken as it is; an input of the task is put between delimiters, as in training."""
    tokens = TOKENIZER("snow").input_ids
    asked = {"model": "long", "max_tokens": 20, "temperature": 0}
    given = server.post("/v1/completions", prompt=tokens, **asked).json()["choices"][0]["text"]
    assert given == expected(twin, server, "long", tokens, 20)
    prompt = encode_prompt(TOKENIZER, "snow")
    whole = expected(twin, server, "long", prompt, 20)
    answer = server.post("/v1/completions", input="snow", **asked).json()
    assert answer["choices"][0]["text"] == whole.partition(" ")[0] and answer["usage"]["prompt_tokens"] == len(prompt)
    plain = server.post("/v1/completions", input="snow", **{**asked, "model": NAME}).json()
    assert plain["usage"]["prompt_tokens"] == len(prompt) - 1


def test_stop_strings_and_seeds(server, twin):
    wanted = expected(twin, server, "long", TOKENIZER("ice").input_ids, 12)
    stop = wanted[3:5]
    body = {"model": "long", "prompt": "ice", "max_tokens": 12, "temperature": 0}
    for stops in (stop, [stop, "zzzz"]):
        choice = server.post("/v1/completions", **body, stop=stops).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (wanted[: wanted.index(stop)], "stop")
    drawn = {"model": "long", "prompt": "ice", "max_tokens": 12, "temperature": 1.5, "top_p": 0.95}
    texts = [server.post("/v1/completions", **drawn, seed=n).json()["choices"][0]["text"] for n in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_chats(server, twin):
    """The tokenizer's template; its BOS is the prefix's own."""
    messages = [{"role": "user", "content": "is it warm?"}]
    prompt = TOKENIZER("u. is it warm? a. ").input_ids
    for model, tokens in ((NAME, [BOS, *prompt]), ("long", prompt)):
        body = {"model": model, "messages": messages, "max_completion_tokens": 5, "temperature": 0}
        wanted = expected(twin, server, model, tokens, 5)
        answer = server.post("/v1/chat/completions", **body).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": wanted}
        assert answer["usage"]["prompt_tokens"] == len(tokens) and answer["object"] == "chat.completion"
        first, *parts, last = server.stream("/v1/chat/completions", **body)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == wanted
        assert last["choices"][0] == {
            "index": 0,
            "delta": {},
            "logprobs": None,
            "finish_reason": answer["choices"][0]["finish_reason"],
        }
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "is it"}, {"type": "text", "text": " warm?"}]}]
    again = server.post("/v1/chat/completions", model="long", messages=in_parts, max_tokens=5, temperature=0).json()
    assert again["choices"] == answer["choices"]


GOOD = {"model": NAME, "prompt": "a", "max_tokens": 2}
WRONG = [
    ({"model": "routin"}, 404, "there is no model 'routin'; GET /v1/models lists them"),
    ({"model": "../../etc/passwd"}, 404, "there is no model"),
    ({"model": f"{NAME}:"}, 404, "there is no model"),
    ({"model": "x" * 1000}, 404, "there is no model"),
    ({"model": "x" * 2000}, 400, "model: String should have at most 1024 characters"),
    ({"prompt": ""}, 400, "prompt must have at least one token, got none"),
    ({"prompt": [5, 10**6]}, 400, "tokens of prompt must lie in [0, 43)"),
    ({"prompt": [True]}, 400, "prompt: must be one text or the list of its tokens"),
    ({"prompt": ["a", "b"]}, 400, "prompt: must be one text or the list of its tokens"),
    ({"prompt": [5], "input": "a"}, 400, "give prompt or input, got both"),
    ({"prompt": None}, 400, "give prompt or input, got none"),
    ({"prompt": None, "input": ["a", "b"]}, 400, "input: Input should be a valid string"),
    ({"prompt": "a" * 260}, 400, "do not fit into the 256 positions of tiny"),
    ({"prompt": "a" * 200, "max_tokens": 100}, 400, "do not fit into the 256 positions of tiny"),
    ({"max_tokens": 151}, 400, "max_tokens must be at most 150 on this server, got 151"),
    ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
    ({"temperature": 0.001}, 400, "temperature must be 0 or at least 0.01"),
    ({"top_p": 0}, 400, "top_p: Input should be greater than 0"),
    ({"n": 2}, 400, "n: Input should be 1"),
    ({"logprobs": 3}, 400, "logprobs"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": 5}, 400, "stop: must be a text or a list of texts"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"tools": []}, 400, "tools is not supported by this server"),
    ({"prompt": "a" * 20_000}, 413, "a body may have 20000 bytes"),
]


@pytest.mark.parametrize("change, status, message", WRONG, ids=lambda x: str(x)[:30])
def test_wrong_requests(server, change, status, message):
    """One sentence in OpenAI's form, before anything runs."""
    before = server.engine.metrics.registry.get_sample_value("ctkernels_steps_total", {"kind": "join"})
    response = server.post("/v1/completions", **{**GOOD, **change})
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in response.text
    assert server.engine.metrics.registry.get_sample_value("ctkernels_steps_total", {"kind": "join"}) == before


def test_wrong_chats_and_paths(server):
    chat = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    for change, message in (
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "system", "content": "a"}]}, "the chat template refuses the messages: no system"),
    ):
        response = server.post("/v1/chat/completions", **{**chat, **change})
        assert response.status_code == 400 and message in response.json()["error"]["message"]
    for path in ("/v1/files", "/../etc/passwd", "/docs", "/openapi.json"):
        response = server.client.get(path)
        assert response.status_code == 404 and "error" in response.json()
    broken = server.client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and "JSON" in broken.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_row(server):
    """In mid-stream, and while it waits for a whole answer."""
    rows = lambda: server.engine.metrics.registry.get_sample_value("ctkernels_rows")  # noqa: E731
    long = {"model": NAME, "prompt": "a", "max_tokens": 150, "temperature": 0, "logit_bias": None}
    endless = server.service._ends
    server.service._ends, turn = frozenset(), server.engine._turn
    server.engine._turn = lambda: (time.sleep(0.02), turn())  # 150 tokens take three seconds
    try:
        with server.client.stream("POST", "/v1/completions", json={**long, "stream": True}) as response:
            assert next(response.iter_lines()) and rows() == 1
        with pytest.raises(httpx2.ReadTimeout):
            server.client.post("/v1/completions", json=long, timeout=0.3)
        for _ in range(60):
            if rows() == 0:
                break
            time.sleep(0.02)
        assert rows() == 0
    finally:
        server.service._ends, server.engine._turn = endless, turn
    ends = server.engine.metrics.registry.get_sample_value("ctkernels_answers_total", {"end": "cancelled"})
    assert ends == 2


def test_too_many(server):
    """Status 429, and a time after which to try again."""
    queue, server.engine.queue = server.engine.queue, 0
    try:
        response = server.post("/v1/completions", **GOOD)
    finally:
        server.engine.queue = queue
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "queue_full"
    assert "ctkernels_refused_total 1.0" in server.client.get("/metrics").text


def test_metrics(server):
    text = server.client.get("/metrics").text
    for name in ("answers_total", "generated_tokens_total", "prompt_tokens_total", "rows", "waiting", "steps_total"):
        assert f"\nctkernels_{name}" in text
    assert 'ctkernels_first_token_seconds_bucket{le="0.1"}' in text


def test_a_mistake_of_the_server_is_said_without_details(server, monkeypatch):
    monkeypatch.setattr(server.service, "completion", lambda body: {}["/srv/secret"])
    response = server.post("/v1/completions", **GOOD)
    assert response.status_code == 500 and "secret" not in response.text and response.json()["error"]["message"]


def test_a_damaged_file_is_said_without_its_path(server, caplog):
    path = server.service.store.directory / "hurt.safetensors"
    path.write_bytes(b"nothing")
    response = server.post("/v1/completions", **{**GOOD, "model": "hurt"})
    path.unlink()
    assert response.status_code == 500 and str(path.parent) not in response.text and str(path) in caplog.text


def test_without_a_chat_template_and_with_a_token(tmp_path):
    """Bearer, or the password of a browser; /health needs none. Other hosts and origins are turned away."""
    model = make_model("llama", torch.float32, vocab_size=43)
    with running(model, stored(tmp_path, model), token="s3cret") as server:
        messages = [{"role": "user", "content": "a"}]
        response = server.post("/v1/chat/completions", model=NAME, messages=messages)
        assert response.status_code == 400 and "no chat template" in response.json()["error"]["message"]
        with httpx2.Client(base_url=server.address) as stranger:
            for given in (None, "Bearer s3cre", "Bearer", "Basic ???", "s3cret"):
                headers = {} if given is None else {"authorization": given}
                for path in ("/v1/models", "/metrics", "/nothing"):
                    assert stranger.get(path, headers=headers).status_code == 401
            assert stranger.get("/health").status_code == 200
            assert stranger.get("/v1/models", auth=("anyone", "s3cret")).status_code == 200
        for headers, status in (
            ({"host": "evil.example"}, 403),
            ({"host": "[evil"}, 403),
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "https://[evil"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": server.address}, 200),
        ):
            assert server.client.get("/v1/models", headers=headers).status_code == status

        def chunks():
            yield b'{"model": "'
            yield b"x" * (1 << 20)

        response = server.client.post("/v1/completions", content=chunks())
        assert response.status_code == 413 and json.loads(response.text)["error"]["message"].startswith("a body may")

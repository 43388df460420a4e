"""HTTP requests that choose a prefix: what reaches vLLM's routes, and what the engine is given."""

import asyncio
import json

import pytest
import torch

from ctkernels.serving.vllm.files import PrefixFiles
from ctkernels.serving.vllm.requests import TICKET, Prefixes, PrefixMiddleware, RequestError
from ctkernels.serving.vllm.salts import placed
from ctkernels.testing.models import make_model, tokens
from ctkernels.testing.tasks import BOS, char_tokenizer, ids
from ctkernels.tuning import KVPrefix, PrefixStore

CONTEXT = tuple(tokens(5).tolist())


class Server:
    """vLLM's routes as the middleware sees them: the prompt becomes tokens, the engine places the prefix."""

    def __init__(self, prefixes: Prefixes) -> None:
        self.prefixes, self.given, self.engine = prefixes, [], []
        self.app = PrefixMiddleware(self._route, prefixes)

    async def _route(self, scope, receive, send):
        data, status = b"", 200
        if scope["path"] == "/v1/models":
            data = json.dumps({"object": "list", "data": [{"id": "base", "max_model_len": 9}]}).encode()
        elif scope["method"] == "POST":
            data = (await receive())["body"]
            assert dict(scope["headers"])[b"content-length"] == str(len(data)).encode()
            body = json.loads(data)
            self.given.append(body)
            prompt = body.get("prompt")
            prompt = (
                list(ids(prompt)) if isinstance(prompt, str) else [BOS, *ids("hi")] if prompt is None else prompt[0]
            )
            entry = {"type": "token", "prompt_token_ids": prompt, "prompt_token_offsets": []}
            if "cache_salt" in body:
                entry["cache_salt"] = body["cache_salt"]
            self.engine.append(self.prefixes.placed(entry, None))
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": data})

    def __call__(self, method, path, body=None, headers=()):
        data, sent = json.dumps(body).encode() if not isinstance(body, bytes) else body, []
        pieces = [data[:7], data[7:]]

        async def receive():
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message):
            sent.append(message)

        length = (b"content-length", str(len(data)).encode())
        scope = {"type": "http", "method": method, "path": path, "headers": [length, *headers]}
        asyncio.run(self.app(scope, receive, send))
        answer = b"".join(message.get("body", b"") for message in sent[1:])
        headers = dict(sent[0]["headers"])
        if sent[0]["status"] != 200 or method == "GET":
            assert int(headers[b"content-length"]) == len(answer)
        return sent[0]["status"], json.loads(answer) if answer else None


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    model = make_model("llama", torch.float32)
    store = PrefixStore(tmp_path_factory.mktemp("store"), model)
    for name in ("routing", "a/b: c"):
        store.put(name, KVPrefix.from_tokens(model, torch.tensor(CONTEXT), torch.tensor([0, 5])))
    return store


@pytest.fixture
def server(store):
    files = PrefixFiles(store.directory, store._decoder.config, None)
    return Server(Prefixes(files, ["base", "org/base:7b"], char_tokenizer(adds_bos=True)))


def refused(server, body, headers=()):
    status, answer = server("POST", "/v1/completions", body, headers)
    assert server.given == [] and server.prefixes._tickets == {}
    return status, answer["error"]["message"]


def test_a_prompt_gets_the_prefix_in_front_and_its_salt(server):
    assert server("POST", "/v1/completions", {"model": "base:routing", "prompt": "red"})[0] == 200
    (body,), (entry,) = server.given, server.engine
    assert body["model"] == "base" and body["add_special_tokens"] is False
    assert entry["prompt_token_ids"] == [*CONTEXT, *ids("red")] and "prompt_token_offsets" not in entry
    prefix = placed(entry["cache_salt"])
    assert (prefix.name, prefix.length, prefix.salt) == ("routing", 5, "")
    assert server.prefixes._tickets == {}


@pytest.mark.parametrize(
    "model, header", [("org/base:7b:a/b: c", None), ("base", b"a/b: c"), ("base:a/b: c", b"a/b: c")]
)
def test_a_prefix_is_named_by_model_or_header(server, model, header):
    headers = [] if header is None else [(b"x-ctkernels-prefix", header)]
    server("POST", "/v1/completions", {"model": model, "prompt": "red", "cache_salt": "tenant"}, headers)
    assert server.given[0]["model"] == model.removesuffix(":a/b: c")
    prefix = placed(server.engine[0]["cache_salt"])
    assert (prefix.name, prefix.salt) == ("a/b: c", "tenant")


def test_plain_requests_pass_as_they_are(server):
    for body in ({"model": "base", "prompt": "red"}, {"model": "org/base:7b", "prompt": "red", "cache_salt": "x"}):
        server("POST", "/v1/completions", body)
    assert [body["model"] for body in server.given] == ["base", "org/base:7b"]
    assert all("add_special_tokens" not in body for body in server.given)
    assert [entry["prompt_token_ids"] for entry in server.engine] == [list(ids("red"))] * 2
    assert server.engine[1]["cache_salt"] == "x"


def test_an_input_is_put_into_the_text_format(server):
    """As training rows begin: the delimiter, the input, the delimiter, each tokenised on its own."""
    server("POST", "/v1/completions", {"model": "base:routing", "input": "red"})
    assert server.engine[0]["prompt_token_ids"] == [*CONTEXT, *ids("_red_")]
    assert refused(Server(server.prefixes), {"model": "base:routing", "input": "red", "prompt": "x"})[0] == 400
    assert "input must be a text" in refused(Server(server.prefixes), {"model": "base:routing", "input": 7})[1]


def test_the_bos_of_a_chat_template_is_dropped(server):
    """The prefix begins with it; no model has seen one in the middle."""
    server("POST", "/v1/chat/completions", {"model": "base:routing", "messages": []})
    assert server.engine[0]["prompt_token_ids"] == [*CONTEXT, *ids("hi")]
    server("POST", "/v1/completions", {"model": "base:routing", "prompt": [[BOS, 9]]})
    assert server.engine[1]["prompt_token_ids"] == [*CONTEXT, BOS, 9]  # tokens are the client's own


def test_errors_name_what_is_wrong_and_reach_no_route(server):
    unknown = refused(server, {"model": "base:rooting", "prompt": "x"})
    assert unknown == (404, "no prefix named 'rooting'; near names are 'routing'")
    status, message = refused(server, {"model": "base:routing", "prompt": "x"}, [(b"x-ctkernels-prefix", b"other")])
    assert status == 400 and "model asks for the prefix 'routing', the header" in message
    for name in ("echo", "prompt_logprobs"):
        assert f"{name} cannot be had behind a prefix" in refused(server, {"model": "base:routing", name: 1})[1]
    assert "at most 128 characters" in refused(server, {"model": "base:routing", "cache_salt": "x" * 129})[1]
    assert refused(server, {"model": "base:" + "x" * 300})[0] == 400
    assert refused(server, {"model": "base:"})[0] == 400
    assert refused(server, {"model": "base"}, [(b"x-ctkernels-prefix", b"\xff")])[0] == 400


def test_an_error_of_a_file_names_the_prefix_and_no_folder(server, store):
    path = store.path("damaged")
    path.write_bytes(b"no file of ours")
    try:
        status, message = refused(server, {"model": "base:damaged", "prompt": "x"})
    finally:
        path.unlink()
    assert status == 400 and message.startswith("prefix 'damaged': ") and str(store.directory) not in message


@pytest.mark.parametrize("salt", ["ctkernels:5:aa:routing:", f"{TICKET}{'0' * 32}"])
def test_a_salt_cannot_be_forged(server, salt):
    with pytest.raises(RequestError, match="name a prefix in model"):
        server("POST", "/v1/completions", {"model": "base", "prompt": "red", "cache_salt": salt})


def test_what_cannot_follow_a_prefix_is_refused(server):
    """Other endpoints say it in their own words; the engine sees what they all become."""
    _, ticket = server.prefixes.rewritten("/v1/completions", {"model": "base:routing", "prompt": ""}, None)
    entry = {"type": "token", "prompt_token_ids": [3], "cache_salt": ticket}
    for changes, params, message in (
        ({"prompt_token_ids": []}, {}, "at least one token"),
        ({"type": "embeds"}, {}, "must be tokens, got 'embeds'"),
        ({}, {"prompt_logprobs": 1}, "prompt_logprobs cannot be had"),
        ({}, {"skip_reading_prefix_cache": True}, "prompt_logprobs cannot be had"),
    ):
        with pytest.raises(RequestError, match=message):
            server.prefixes.placed({**entry, **changes}, type("Params", (), params))
    assert server.prefixes.placed(entry, None)["prompt_token_ids"] == [*CONTEXT, 3]


def test_what_is_no_json_is_left_to_the_server(server):
    with pytest.raises(json.JSONDecodeError):  # this server's own way to say so
        server("POST", "/v1/completions", b"{nonsense")


def test_prefixes_are_listed_as_models(server):
    _, listed = server("GET", "/v1/models")
    assert [card["id"] for card in listed["data"]] == ["base", "base:a/b: c", "base:routing"]
    assert listed["data"][1] == {"id": "base:a/b: c", "root": "base", "parent": "base", "max_model_len": 9}

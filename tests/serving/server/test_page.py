"""The page: what a person does with it, in a real browser."""

import json
import re

import pytest
import torch

from ctkernels.testing.tasks import DEMONSTRATIONS
from tests.serving.server.browser import CHROMIUM, browser
from tests.serving.server.serving import NAME, running, stored, tiny

JSONL = "\n".join(json.dumps({"input": d.input, "output": d.output}) for d in DEMONSTRATIONS)
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tiny(dtype=torch.float32)
    store = stored(tmp_path_factory.mktemp("store"), model)
    store.put(HOSTILE, store.get("long"))
    with running(model, store, token="s3cret") as server:
        yield server


def test_what_is_sent(server):
    """The prefixes are in it, names are text, nothing comes from elsewhere, and scripts are those of the page alone."""
    response = server.client.get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    for name in ("team-a/routing", "team b: Ä", "&lt;img src=x onerror=alert(1)&gt;"):
        assert f"<li>{name}</li>" in response.text
    assert HOSTILE not in response.text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(""", response.text)
    policy = response.headers["content-security-policy"]
    (nonce,) = set(re.findall(r"nonce-([\w-]+)", policy))
    assert "default-src 'none'" in policy and f'<script nonce="{nonce}">' in response.text
    assert nonce not in server.client.get("/").text
    stranger = server.client.get("/", headers={"authorization": ""})
    assert stranger.status_code == 401 and stranger.headers["www-authenticate"].startswith("Basic")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_in_a_browser(server, tmp_path):
    """A person tunes a task, watches the loss fall, and asks the tuned model and the plain one."""
    with browser(tmp_path) as page:
        page.open(f"{server.address}/", {"authorization": "Bearer s3cret"})
        assert page.text("count") == "4"
        page.fill(name="weather", demonstrations=JSONL, epochs="6")
        page.click("start")
        page.until("document.getElementById('status').textContent.includes('delimiter must be exactly one token')")
        page.fill(delimiter=" ")  # the test's tokenizer has no line break
        page.click("start")
        page.until("document.getElementById('status').textContent.includes('published')")
        points = page.run("document.getElementById('loss').getAttribute('points')").split(" ")
        heights = [float(point.split(",")[1]) for point in points]
        assert len(points) == 6 and heights[-1] > heights[0]  # downwards is more
        assert page.text("count") == "5" and page.run("document.getElementById('choice').value") == "weather"
        listed = page.run("[...document.querySelectorAll('#prefixes li')].map((entry) => entry.textContent)")
        assert listed == [HOSTILE, "long", "team b: Ä", "team-a/routing", "weather"]

        page.fill(input="snow", most="6")
        page.click("ask")
        page.until("!document.getElementById('ask').disabled && document.getElementById('bare').textContent")
        asked = {"max_tokens": 6, "temperature": 0}
        tuned = server.post("/v1/completions", model="weather", input="snow", **asked).json()
        plain = server.post("/v1/completions", model=NAME, prompt="snow ", **asked).json()
        assert page.text("tuned") == (tuned["choices"][0]["text"] or "(an empty answer)")
        assert page.text("bare") == (plain["choices"][0]["text"] or "(an empty answer)") and not page.text("problem")

        page.fill(name="weather")
        page.click("start")
        page.until("document.getElementById('status').textContent.includes(\"there is a prefix 'weather' already\")")
        page.screenshot(tmp_path / "page.png")
        assert all(address.startswith((server.address, "data:")) for address in page.requests)
        expected = [error for error in page.errors if "/v1/prefixes" in error or "/v1/tuning" in error]
        assert page.errors == expected, "the answers 400, 404 and 409 alone"

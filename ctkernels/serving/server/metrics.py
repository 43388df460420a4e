"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "ctkernels"}
        self.answers = Counter("answers", "Answers by how they ended", ["end"], **own)
        self.refused = Counter("refused", "Requests refused because the queue was full", **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **own)
        self.tokens = Counter("generated_tokens", "Tokens of answers", **own)
        self.steps = Counter("steps", "Forward passes of the model, by kind", ["kind"], **own)
        self.rows = Gauge("rows", "Rows in the batch", **own)
        self.waiting = Gauge("waiting", "Requests in the queue", **own)
        self.tunings = Counter("tunings", "Tunings by how they ended", ["end"], **own)
        self.first_token = Histogram("first_token_seconds", "From a request to its first token", buckets=SECONDS, **own)
        self.whole_answer = Histogram("answer_seconds", "From a request to its end", buckets=SECONDS, **own)

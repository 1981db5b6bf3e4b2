"""What Prometheus reads: requests, tokens, times, how sure the router was, who answered, and what is held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from mediator_cli.serve.api.flow import Answer
    from mediator_cli.serve.api.settings import Answers
    from mediator_cli.serve.engine.engine import Facts

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)

_COUNTED = {
    "prompt_tokens": "Tokens of prompts that were read",
    "cached_tokens": "Tokens of prompts that were held from earlier requests",
    "answer_tokens": "Tokens that were written; its rate is tokens per second",
    "passes": "Passes of the model",
}
_PRESENT = {
    "running": "Requests that are answered at present",
    "waiting": "Requests that wait",
    "mixtures_held": "Mixtures whose matrices are held",
    "mixture_bytes": "Bytes of the matrices held",
    "prefix_bytes": "Bytes of keys and values held for prompts that begin alike",
    "prefix_entries": "Prompts whose keys and values are held",
}


@dataclass(frozen=True, eq=False)
class EngineFacts(Collector):
    """Reads the engine's own counts when they are asked for."""

    engine: Answers

    def collect(self) -> Iterator[Metric]:
        """Give the counts as they are now."""
        facts = self.engine.facts
        for name, text in _COUNTED.items():
            yield CounterMetricFamily(f"mediator_{name}", text, value=_value(facts, name))
        for name, text in _PRESENT.items():
            yield GaugeMetricFamily(f"mediator_{name}", text, value=_value(facts, name))
        yield GaugeMetricFamily("mediator_engine_up", "1 while requests are answered", value=float(facts.is_alive))


def _value(facts: Facts, name: str) -> float:
    return float(getattr(facts, name))


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self, engine: Answers) -> None:
        own = self.registry = CollectorRegistry()
        own.register(EngineFacts(engine))
        self.requests = Counter(
            "mediator_requests", "Requests that were replied to", ("endpoint", "status", "model"), registry=own
        )
        self.seconds = Histogram(
            "mediator_request_seconds", "Time to the end of a reply", ("endpoint",), buckets=_SECONDS, registry=own
        )
        self.first = Histogram(
            "mediator_time_to_first_token_seconds", "Time to the first token", buckets=_FIRST_TOKEN, registry=own
        )
        self.each = Histogram(
            "mediator_time_per_output_token_seconds", "Time of each later token", buckets=_PER_TOKEN, registry=own
        )
        self.entropy = Histogram(
            "mediator_router_entropy", "How unsure the router was, 0 to 1", buckets=_SHARES, registry=own
        )
        self.outside = Counter("mediator_router_outside", "Prompts unlike all that the router knows", registry=own)
        self.share = Counter("mediator_expert_share", "Sum of the weights of mixtures", ("expert",), registry=own)

    def count_answer(self, answer: Answer, asked_at: float) -> None:
        """Count an answer, complete or not; `asked_at` as of the monotonic clock."""
        if answer.started is None:
            return
        self._count_decision(answer)
        if answer.first_at is None:
            return
        self.first.observe(answer.first_at - asked_at)
        if answer.end is not None and answer.over_at is not None and answer.end.n_answer > 1:
            self.each.observe((answer.over_at - answer.first_at) / (answer.end.n_answer - 1))

    def _count_decision(self, answer: Answer) -> None:
        if (started := answer.started) is None:
            return
        for name, weight in (started.mixture or {"dense": 1.0}).items():
            # A mixture may take away what an expert adds; what is counted cannot go down.
            self.share.labels(name).inc(max(weight, 0.0))
        if started.uncertainty is not None:
            self.entropy.observe(started.uncertainty)
        if started.is_outside:
            self.outside.inc()

    def text(self) -> bytes:
        """Write all counts in Prometheus's own format."""
        return generate_latest(self.registry)

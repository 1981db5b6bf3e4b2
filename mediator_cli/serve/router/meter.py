"""What is counted of requests that pass, under the names that our own server has; nothing without prometheus-client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mediator_cli.serve.router.decide import Decision
    from mediator_cli.serve.router.targets import Placed

_SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


@dataclass(frozen=True)
class Meter:
    """Counts requests, the router's uncertainty, who answers, and what goes wrong behind us."""

    requests: Any
    entropy: Any
    outside: Any
    share: Any
    misses: Any
    failures: Any

    def answered(self, endpoint: str, status: int, model: str) -> None:
        """Count a reply; status 499 where the caller went away first."""
        self.requests.labels(endpoint, str(status or 499), model).inc()

    def routed(self, decision: Decision, placed: Placed) -> None:
        """Count who answers, and what the router made of the prompt."""
        if decision.uncertainty is not None:
            self.entropy.observe(decision.uncertainty)
        if decision.is_outside:
            self.outside.inc()
        for expert, weight in (placed.weights or {"dense": 1.0}).items():
            self.share.labels(expert).inc(max(weight, 0.0))
        if placed.error is not None:
            self.misses.observe(placed.error)

    def failed(self, kind: str) -> None:
        """Count a failure of the server behind us."""
        self.failures.labels(kind).inc()


def make_meter(registry: CollectorRegistry | None = None) -> Meter | None:
    """Make the counts in a registry, by default the process's own; None where prometheus-client is missing."""
    try:
        from prometheus_client import REGISTRY, Counter, Histogram
    except ImportError:
        return None
    own = REGISTRY if registry is None else registry
    far = "How far what answered was from the router's mixture, as a share of what that adds"
    return Meter(
        Counter("mediator_requests", "Requests that were replied to", ("endpoint", "status", "model"), registry=own),
        Histogram("mediator_router_entropy", "How unsure the router was, 0 to 1", buckets=_SHARES, registry=own),
        Counter("mediator_router_outside", "Prompts unlike all that the router knows", registry=own),
        Counter("mediator_expert_share", "Sum of the weights of mixtures", ("expert",), registry=own),
        Histogram("mediator_mixture_error", far, buckets=_SHARES, registry=own),
        Counter("mediator_upstream_failures", "Failures of the server behind the router", ("kind",), registry=own),
    )

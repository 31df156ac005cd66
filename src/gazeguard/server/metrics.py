"""What the server counts: one table, from which the Prometheus metrics are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gazeguard._version import __version__

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SHARES = (0.1, 0.5, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table; `buckets` only for histograms."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


TABLE = {
    "requests": Metric(
        Counter, "gazeguard_requests_total", "Chat requests by HTTP status.", ("status",)
    ),
    "verdicts": Metric(
        Counter,
        "gazeguard_verdicts_total",
        "Judged requests by outcome and what was done.",
        ("outcome", "action"),
    ),
    "suspicion": Metric(
        Histogram,
        "gazeguard_suspicion_ratio",
        "Suspicion of judged requests, 1 is worst.",
        buckets=_SHARES,
    ),
    "duration": Metric(
        Histogram,
        "gazeguard_request_duration_seconds",
        "Chat requests, from first to last byte.",
        buckets=_SECONDS,
    ),
    "first_token": Metric(
        Histogram,
        "gazeguard_first_token_seconds",
        "From the end of encoding a request to its first token: waiting, prefill and guard.",
        buckets=_SECONDS,
    ),
    "batch": Metric(
        Histogram,
        "gazeguard_batch_requests",
        "Requests that were answered together.",
        buckets=_SIZES,
    ),
    "in_house": Metric(
        Gauge, "gazeguard_in_house_requests", "Chat requests that are waiting or being answered."
    ),
    "running": Metric(Gauge, "gazeguard_running_requests", "Chat requests in the current batch."),
    "prompt_tokens": Metric(
        Counter, "gazeguard_prompt_tokens_total", "Tokens of the prompts that were read."
    ),
    "generated_tokens": Metric(
        Counter, "gazeguard_generated_tokens_total", "Tokens of the answers."
    ),
    "images": Metric(Counter, "gazeguard_images_total", "Images that were decoded."),
    "build": Metric(
        Gauge, "gazeguard_build_info", "Always 1; the label is the version.", ("version",)
    ),
}


class Metrics:
    """The metrics of one server, as attributes named like the lines of `TABLE`."""

    requests: Counter
    verdicts: Counter
    suspicion: Histogram
    duration: Histogram
    first_token: Histogram
    batch: Histogram
    in_house: Gauge
    running: Gauge
    prompt_tokens: Counter
    generated_tokens: Counter
    images: Counter
    build: Gauge

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        for attribute, metric in TABLE.items():
            more: dict[str, Any] = {"buckets": metric.buckets} if metric.buckets else {}
            made = metric.kind(
                metric.name, metric.help, metric.labels, registry=self._registry, **more
            )
            setattr(self, attribute, made)
        self.build.labels(__version__).set(1)

    def judged(self, verdict: Mapping[str, Any]) -> None:
        """Count one verdict."""
        self.verdicts.labels(verdict["outcome"], verdict["action"]).inc()
        if verdict["suspicion"] is not None:
            self.suspicion.observe(verdict["suspicion"])

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

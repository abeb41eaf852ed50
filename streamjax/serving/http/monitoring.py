"""Figures for Prometheus: the engine's own, and what clients wait for."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from streamjax.serving.requests import Event, RequestEngine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts and times, in a registry of their own.

    Args:
      engine: whose statistics are read at every scrape.
    """

    def __init__(self, engine: RequestEngine):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineStats(engine))
        self.responses = Counter(
            "streamjax_http_responses", "Responses by path and status.", ["path", "status"], registry=self._registry
        )
        self._first = Histogram(
            "streamjax_time_to_first_token_seconds", "From a request to its first token.",
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip
        self._between = Histogram(
            "streamjax_time_between_tokens_seconds", "From a token to the next, in the mean over an event.",
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip

    def clock(self) -> Clock:
        """For the tokens of a request."""
        return Clock(self._first, self._between)

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)


class Clock:
    """Times the events of one generation; it begins when it is made."""

    def __init__(self, first: Histogram, between: Histogram):
        self._first, self._between = first, between
        self._began = time.monotonic()
        self._last: dict[int, float] = {}  # by choice

    def tick(self, index: int, event: Event) -> None:
        """An event of a choice has come."""
        if not event.tokens:
            return
        now = time.monotonic()
        if index in self._last:
            for _ in event.tokens:
                self._between.observe((now - self._last[index]) / len(event.tokens))
        else:
            self._first.observe(now - self._began)
        self._last[index] = now


class _EngineStats(Collector):
    def __init__(self, engine: RequestEngine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = {
            "rows": "Rows of the engine's batch.",
            "running": "Rows in use.",
            "waiting": "Requests in the queue.",
            "cache_bytes": "Bytes of all rows' states, constant.",
        }
        counters = {
            "prompt_tokens": "Prompt tokens that were read.",
            "cached_tokens": "Prompt tokens that a known prefix or a conversation spared.",
            "generated_tokens": "Tokens that were generated.",
            "guessed_tokens": "Tokens that were guessed and read beside others.",
            "accepted_tokens": "Guessed tokens that were right.",
        }
        for name, about in gauges.items():
            yield GaugeMetricFamily(f"streamjax_{name}", about, value=getattr(stats, name))
        for name, about in counters.items():
            yield CounterMetricFamily(f"streamjax_{name}", about, value=getattr(stats, name))
        yield GaugeMetricFamily(
            "streamjax_conversations", "Kept conversations.", value=len(self._engine.conversations())
        )
        finished = CounterMetricFamily("streamjax_requests", "Requests by why they ended.", labels=["finish_reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished

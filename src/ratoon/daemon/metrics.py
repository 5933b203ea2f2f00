"""What is counted and measured, for Prometheus."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ratoon.api.answers import ListedState
from ratoon.engine.sandbox.engine import Engine

#: Seconds: from a stage of a fork to a request that waited for a base to boot.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one daemon, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineState(engine))
        self.requests = Counter(
            "ratoon_http_requests",
            "Requests that were answered.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self.request_seconds = self._histogram(
            "ratoon_http_request_seconds", "From a request to the end of its answer.", "route"
        )
        self.forks = Counter(
            "ratoon_forks",
            "Sandboxes that were started, or failed.",
            ("outcome",),
            registry=self._registry,
        )
        self.fork_seconds = self._histogram(
            "ratoon_fork_stage_seconds",
            "Stages of forks; `all`: until the agent answered.",
            "stage",
        )
        self.branches = Counter(
            "ratoon_branches", "Snapshots made of sandboxes.", ("mode",), registry=self._registry
        )
        self.branch_seconds = self._histogram(
            "ratoon_branch_stage_seconds",
            "Stages of branches; `stopped`: how long the sandbox stood still.",
            "stage",
        )

    def _histogram(self, name: str, what: str, label: str) -> Histogram:
        return Histogram(name, what, (label,), registry=self._registry, buckets=_BUCKETS)

    def forked(self, stages: Mapping[str, float], fork_ms: float) -> None:
        """A sandbox was started; `stages` are in milliseconds."""
        self.forks.labels("started").inc()
        _observe(self.fork_seconds, {**stages, "all": fork_ms})

    def branched(self, mode: str, stages: Mapping[str, float], pause_ms: float) -> None:
        """A snapshot was made of a sandbox."""
        self.branches.labels(mode).inc()
        _observe(self.branch_seconds, {**stages, "stopped": pause_ms})

    def text(self) -> bytes:
        """All of it, as Prometheus reads it; blocks for as long as it takes to look."""
        return generate_latest(self._registry)


def _observe(histogram: Histogram, milliseconds: Mapping[str, float]) -> None:
    for stage, ms in milliseconds.items():
        histogram.labels(stage).observe(ms / 1e3)


class _EngineState(Collector):
    """What the engine has at the moment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, images = self._engine, self._engine.images
        states = Tally(each.state for each in engine.sandboxes)
        sandboxes = GaugeMetricFamily("ratoon_sandboxes", "Sandboxes there are.", labels=["state"])
        for state in get_args(ListedState):
            sandboxes.add_metric([state], states[state])
        yield sandboxes
        pooled = GaugeMetricFamily("ratoon_pool_machines", "Machines that wait.", labels=["tag"])
        for stock in engine.pool.status():
            pooled.add_metric([stock.tag], stock.ready)
        yield pooled
        yield GaugeMetricFamily(
            "ratoon_snapshots",
            "Snapshots in the store.",
            sum(1 for _ in engine.store.snapshots.iterdir()),
        )
        lookups = CounterMetricFamily(
            "ratoon_image_lookups", "Forks that found an image, or did not.", labels=["found"]
        )
        lookups.add_metric(["yes"], images.hits)
        lookups.add_metric(["no"], images.misses)
        yield lookups
        cached = images.cached()
        yield GaugeMetricFamily("ratoon_images", "Images in the cache.", len(cached))
        yield GaugeMetricFamily(
            "ratoon_image_bytes",
            "What they take on the disk.",
            sum(each.allocated_bytes for each in cached),
        )
        yield GaugeMetricFamily("ratoon_image_budget_bytes", "What they may take.", images.budget)

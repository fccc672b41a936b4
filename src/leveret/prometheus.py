"""The numbers of :class:`~leveret.metrics.Metrics` for Prometheus. It needs ``pip install leveret[prometheus]``.

A collector reads them when Prometheus asks. There is no second set of counters that would have to be kept up to date.
"""

from __future__ import annotations

from collections.abc import Iterator

from leveret.metrics import SERIES, Distribution, Metrics

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry
except ImportError as exc:
    raise ImportError("leveret.prometheus needs prometheus-client: pip install leveret[prometheus]") from exc

_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class MetricsCollector(Collector):
    """A collector for the registries of ``prometheus-client``; :func:`register` makes one.

    Args:
        metrics: what to export; the label ``connection`` is their name.

    Raises:
        ValueError: there is none, or two have the same name.
    """

    def __init__(self, *metrics: Metrics) -> None:
        if not metrics or len({each.name for each in metrics}) < len(metrics):
            raise ValueError(f"a collector needs Metrics of different names, not {metrics!r}")
        self._metrics = metrics

    def describe(self) -> Iterator[_Family]:
        """As :meth:`collect`: a registry looks for names that it has already."""
        return self.collect()

    def collect(self) -> Iterator[_Family]:
        """All numbers, as they are now."""
        snapshots = [([metrics.name], metrics.snapshot()) for metrics in self._metrics]
        for field, kind, name, text in SERIES:
            family: _Family
            if kind == "histogram":
                family = HistogramMetricFamily(name, text, labels=["connection"])
                for label, snapshot in snapshots:
                    distribution: Distribution = getattr(snapshot, field)
                    family.add_metric(label, _buckets(distribution), distribution.sum)
            else:
                family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(
                    name, text, labels=["connection"]
                )
                for label, snapshot in snapshots:
                    family.add_metric(label, getattr(snapshot, field))
            yield family


def register(*metrics: Metrics, registry: CollectorRegistry = REGISTRY) -> MetricsCollector:
    """Have *registry* export *metrics*; all of one registry have to be given at once.

    Args:
        metrics: each with a name of its own.
        registry: the default one unless told otherwise.

    Returns:
        The collector, for ``registry.unregister()``.

    Raises:
        ValueError: two have the same name, or the registry has some already.
    """
    collector = MetricsCollector(*metrics)
    registry.register(collector)
    return collector


def _buckets(distribution: Distribution) -> list[tuple[str, float]]:
    """Prometheus counts in each bucket what is in those before it, too."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, distribution.bounds), "+Inf"), distribution.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets

"""The numbers without a connection: their names, their buckets, how Prometheus gets them, and what costs nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import leveret
from leveret.metrics import BUCKETS, SERIES, Distribution, Metrics, Snapshot
from leveret.prometheus import MetricsCollector, register
from leveret.wire.acks import Acks
from leveret.wire.tally import Tally

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "observability.md"


def test_every_number_has_a_name_and_every_name_a_number():
    assert [series.field for series in SERIES] == [field.name for field in dataclasses.fields(Snapshot)]


@pytest.mark.parametrize("series", SERIES, ids=lambda series: series.name)
def test_names_follow_the_conventions_of_prometheus(series):
    assert series.name.startswith("leveret_")
    assert series.name.endswith("_total") == (series.kind == "counter")
    if isinstance(getattr(Snapshot(), series.field), float | Distribution):
        assert "_seconds" in series.name


def test_the_page_tells_of_every_number():
    text = PAGE.read_text()
    for series in SERIES:
        assert f"`{series.field}`" in text
        assert f"`{series.name}`" in text


def test_what_is_measured_goes_into_the_bucket_that_it_fits():
    metrics = Metrics()
    for seconds in (0.0, BUCKETS[0], BUCKETS[0] * 1.01, BUCKETS[-1], BUCKETS[-1] * 2):
        metrics._confirm.observe(seconds)
    found = metrics._confirm.read()
    assert found.count == 5
    assert found.counts[:2] == (2, 1)
    assert found.counts[-2:] == (1, 1)
    assert found.sum == pytest.approx(2.01 * BUCKETS[0] + 3 * BUCKETS[-1])


def test_prometheus_gets_every_number_with_the_name_of_its_connection():
    registry = CollectorRegistry()
    orders, audit = Metrics("orders"), Metrics("audit")
    collector = register(orders, audit, registry=registry)
    orders._confirm.observe(0.003)
    orders._last = Snapshot(published=7, unconfirmed=2, confirm_seconds=orders._confirm.read())
    text = generate_latest(registry).decode()
    assert 'leveret_messages_published_total{connection="orders"} 7.0' in text
    assert 'leveret_messages_published_total{connection="audit"} 0.0' in text
    assert 'leveret_messages_unconfirmed{connection="orders"} 2.0' in text
    assert 'leveret_confirm_seconds_bucket{connection="orders",le="0.0025"} 0.0' in text
    assert 'leveret_confirm_seconds_bucket{connection="orders",le="0.005"} 1.0' in text
    assert 'leveret_confirm_seconds_bucket{connection="orders",le="+Inf"} 1.0' in text
    assert 'leveret_confirm_seconds_sum{connection="orders"} 0.003' in text
    for series in SERIES:
        assert f"# HELP {series.name} {series.help}" in text
    registry.unregister(collector)
    assert generate_latest(registry) == b""


@pytest.mark.parametrize("metrics", [(), (Metrics(), Metrics())], ids=["none", "two of a name"])
def test_a_collector_wants_names_that_differ(metrics):
    with pytest.raises(ValueError, match="different names"):
        MetricsCollector(*metrics)


def test_a_registry_takes_one_collector():
    registry = CollectorRegistry()
    register(Metrics("one"), registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        register(Metrics("two"), registry=registry)


def test_importing_leveret_imports_no_extra():
    code = (
        "import sys, leveret; print([name for name in ('opentelemetry', 'prometheus_client') if name in sys.modules])"
    )
    path = str(Path(leveret.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "extra"), [("prometheus", "prometheus"), ("telemetry", "otel"), ("spans", "otel")])
def test_a_missing_extra_is_named(module, extra):
    block = "import sys; sys.modules['opentelemetry'] = sys.modules['prometheus_client'] = None\n"
    code = f"{block}try:\n    import leveret.{module}\nexcept ImportError as exc:\n    print(exc)"
    path = str(Path(leveret.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert f"pip install leveret[{extra}]" in done.stdout


def test_time_that_is_blocked_adds_up():
    tally = Tally()
    tally.on_unblocked(1.0)  # a link that was never blocked is gone
    assert tally.blocked_seconds(2.0) == 0
    tally.on_blocked(10.0)
    tally.on_blocked(11.0)  # for another reason, too
    assert tally.blocked_seconds(12.5) == 2.5
    tally.on_unblocked(13.0)
    assert tally.blocked_seconds(20.0) == 3.0
    tally.on_blocked(30.0)
    tally.on_unblocked(31.0)
    assert tally.blocked_seconds(40.0) == 4.0


def test_a_multiple_settles_what_is_not_settled_before_it():
    acks = Acks()
    assert acks.unsettled_up_to(3) == 3
    acks.note(2, multiple=False)
    acks.note(5, multiple=False)
    assert acks.unsettled_up_to(4) == 3
    assert acks.unsettled_up_to(6) == 4
    acks.note(4, multiple=True)
    assert acks.unsettled_up_to(6) == 1
    acks.stop_counting()
    assert acks.unsettled_up_to(9) == 1, "nobody knows any more"

"""The table, in Markdown: a row for each scenario and size, a column for each client, medians in the cells."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tests.bench.scenarios import Scenario


def head(contenders: Iterable[object]) -> str:
    """The first two lines."""
    cells = ["scenario", "body", *map(str, contenders)]
    return f"| {' | '.join(cells)} |\n|---{'|--:' * (len(cells) - 1)}|"


def cell(
    scenario: Scenario, results: Sequence[Mapping[str, float]], baseline: Sequence[Mapping[str, float]] | None
) -> str:
    """The figure, its ratio to that of the *baseline*, and what is shown beside: ``1.5 µs, 1/41, 640k/s``."""
    parts = [show(scenario.figure, median(result[scenario.figure] for result in results))]
    if baseline and baseline is not results:
        pairs = zip(results, baseline, strict=True)
        parts.append(ratio(median(mine[scenario.figure] / theirs[scenario.figure] for mine, theirs in pairs)))
    if scenario.beside:
        parts.append(show(scenario.beside, median(result[scenario.beside] for result in results)))
    return ", ".join(parts)


def show(figure: str, value: float) -> str:
    """A value with its unit, in two or three digits."""
    match figure:
        case "rss_bytes":
            return f"{value / 1024:.3g} KiB" if value >= 1000 else f"{value:.0f} B"
        case "per_second":
            return f"{value / 1000:.3g}k/s" if value >= 1000 else f"{value:.0f}/s"
        case "p99_us":
            return f"p99 {value:,.0f} µs"
    return f"{value:,.0f} µs" if value >= 100 else f"{value:.3g} µs"


def ratio(value: float) -> str:
    """``1/41``, ``0.9`` or ``1.3``: whichever reads best."""
    if value >= 2 / 3:
        return f"{value:.2g}"
    return f"1/{1 / value:.0f}" if value < 0.1 else f"1/{1 / value:.2g}"

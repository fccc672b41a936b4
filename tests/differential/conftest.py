"""Options of the differential test."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("differential")
    group.addoption("--differential-sequences", type=int, default=60, help="sequences to play on each version")
    group.addoption("--differential-seed", type=int, default=1, help="what the sequences are made from")
    group.addoption("--differential-first", type=int, default=0, help="the number of the first of them")

"""The broker tests in several processes at a time: ``-n 3 --dist loadgroup``, of pytest-xdist.

The tests of one folder against one version run in one process, one after the other: they share nodes, which that
process alone starts, hurts and stops. (Marks named ``xdist_group`` would say as much, but pytest-xdist 3.8 does not
see them with pytest 9.2.)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from xdist.remote import Producer

_GROUP = re.compile(r"tests/(\w+)/[^[]*\[((?:testing-)?\d+\.\d+|AMQP_URL)\b")


def group_of(nodeid: str) -> str:
    """The tests that the test *nodeid* shares nodes with; itself, when it wants no broker."""
    found = _GROUP.match(nodeid)
    return " ".join(found.groups()) if found else nodeid


class ByNode(LoadScopeScheduling):
    """Hands out all tests that share nodes as one piece of work, those with the most tests first."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByNode | None:
    """`ByNode`, where pytest-xdist is asked for groups."""
    return ByNode(config, log) if config.getoption("dist") == "loadgroup" else None

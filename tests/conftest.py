"""What holds for every test: an event loop that forgives nothing, and a log without errors."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import uuid
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytest_plugins = ["tests.support.brokers", "tests.support.parallel"]


def pytest_collection_finish() -> None:
    # What was imported by now is not looked through again after each test.
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "expects_errors: the test makes leveret log at level ERROR")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name for a queue or an exchange that no other test uses."""
    test = re.sub(r"\W+", "-", request.node.name)[:60].strip("-")
    return f"{test}-{uuid.uuid4().hex[:8]}"


# ---------------------------------------------------------------------------------------------------- asyncio


@pytest.fixture
async def loop_errors() -> AsyncIterator[list[dict[str, Any]]]:
    """What the loop's exception handler was told: has to be empty when the test ends (a test may clear it).

    Async tests have this by default. It fails a test that leaves a task behind, a task or future whose exception
    nobody asked for, or an exception in a callback.
    """
    loop = asyncio.get_running_loop()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    yield errors
    for _ in range(5):  # let closed transports and finished tasks run their last callbacks
        await asyncio.sleep(0)
    gc.collect()  # whoever was to be asked for an exception, and was not, complains when it is collected
    await asyncio.sleep(0)
    orphans = asyncio.all_tasks() - {asyncio.current_task()}
    for task in orphans:
        task.cancel()
    await asyncio.gather(*orphans, return_exceptions=True)
    loop.set_exception_handler(None)
    assert not orphans, f"tasks left behind: {orphans}"
    assert not errors, f"the loop's exception handler was called: {errors}"


@pytest.fixture(autouse=True)
def _strict_loop(request: pytest.FixtureRequest) -> None:
    """Give every async test the fixture `loop_errors`, before all others, so that it is the last one to end."""
    if request.node.get_closest_marker("asyncio"):
        request.getfixturevalue("loop_errors")


# ---------------------------------------------------------------------------------------------------- logging


class _Keep(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _no_logged_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test during which leveret logged an error, unless it is marked ``expects_errors``."""
    keep, logger = _Keep(), logging.getLogger("leveret")
    logger.addHandler(keep)
    yield
    logger.removeHandler(keep)
    if not request.node.get_closest_marker("expects_errors"):
        assert not keep.lines, f"leveret logged errors: {keep.lines}"

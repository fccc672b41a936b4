"""The benchmark runs: leveret alone, a handful of messages."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.bench.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

FEW = ["--clients", "leveret", "--reps", "1", "--scale", "0.001"]


def test_against_a_broker(amqp_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    main([*FEW, "--scenarios", "pub,con_cb100", "--url", amqp_url, "--json", str(results)])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("\nRabbitMQ ")
    assert captured.out.count("/s |\n") == 2
    assert [json.loads(line)["scenario"] for line in results.read_text().splitlines()] == ["pub", "con_cb100"]


@pytest.mark.skipif(not shutil.which("cc"), reason="the null sink is in C, and there is no cc")
def test_against_the_null_sink(capsys: pytest.CaptureFixture[str]) -> None:
    main([*FEW, "--scenarios", "pubc1000,con_it100,rpc", "--sink"])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("/s |\n") == 2  # rpc needs a broker

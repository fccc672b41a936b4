"""The documentation says what is: code compiles and names what exists, links lead somewhere, tables are complete."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import leveret
from leveret import exceptions, url
from tests.bench.peers import CLIENTS
from tests.bench.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
HOSTS = {"www.rabbitmq.com", "docs.python.org", "opentelemetry.io"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of *language* on *page*."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """The text of *page* without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The ids that the headings of *page* get."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def first_column(page: Path, heading: str) -> set[str]:
    """What stands in backticks in the first column of the tables whose head begins with *heading*."""
    names: set[str] = set()
    for table in re.findall(rf"^\| {heading} \|.*\n\|[-|: ]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE):
        for row in table.splitlines():
            names |= set(re.findall(r"`(\w+)`", row.split("|")[1]))
    return names


def test_pages_are_found() -> None:
    assert {DOCS / "index.md", ROOT / "README.md", ROOT / "CHANGELOG.md"} <= set(PAGES)


@each_page
def test_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@each_page
def test_code_names_what_leveret_has(page: Path) -> None:
    for block in blocks(page, "python"):
        for module, names in re.findall(r"^from (leveret\.\w+) import (.*)$", block, re.MULTILINE):
            imported = importlib.import_module(module)
            assert all(hasattr(imported, name.strip()) for name in names.split(","))
        for path in re.findall(r"\bleveret((?:\.\w+)+)", block):
            value: object = leveret
            for name in path[1:].split("."):
                assert hasattr(value, name), f"leveret{path}"
                value = getattr(value, name)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https"
            assert parts.netloc in HOSTS, link
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.exists(), f"{link} in {page.name}"
        assert not parts.fragment or parts.fragment in anchors(target), f"{link} in {page.name}"


def test_index_leads_to_every_page() -> None:
    (toctree,) = blocks(DOCS / "index.md", r"\{toctree\}")
    listed = {line for line in toctree.splitlines() if line and not line.startswith(":")}
    found = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert listed == found - {"index"}
    linked = {link.removesuffix(".md") for link in re.findall(r"\]\(([^)\s]+)\)", prose(DOCS / "index.md"))}
    assert listed == linked


def test_url_table_is_complete() -> None:
    assert first_column(DOCS / "howto/connecting.md", "parameter") == set(url._OPTIONS)


def test_error_page_names_every_class() -> None:
    page = (DOCS / "howto/errors.md").read_text()
    classes = {
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value) and value.__module__ == exceptions.__name__ and not name.startswith("_")
    }
    assert len(classes) > 30
    assert {name for name in classes if not re.search(rf"`(leveret\.exceptions\.)?{name}`", page)} == set()


def test_error_page_names_only_what_exists() -> None:
    page = DOCS / "howto/errors.md"
    for name in first_column(page, "class"):
        assert hasattr(exceptions, name), name


def test_tutorials_lists_every_example() -> None:
    linked = {
        (DOCS / link).resolve() for link in re.findall(r"\]\(([^)\s]+\.py)\)", (DOCS / "tutorials.md").read_text())
    }
    assert linked == set((ROOT / "examples").rglob("*.py"))


def test_performance_page_lists_every_scenario_and_client() -> None:
    page = DOCS / "performance.md"
    assert first_column(page, "scenario") == set(SCENARIOS)
    assert {client for client in CLIENTS if f"`{client}`" not in page.read_text()} == set()


def test_map_of_modules_is_complete() -> None:
    package = Path(leveret.__file__).parent
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if not path.name.startswith("_")}
    text = (DOCS / "internals/architecture.md").read_text()
    assert {module for module in modules if f"`{module}`" not in text} == set()


def test_readme_first_screen() -> None:
    """What it is, how to try it, a publisher and a consumer: in the first sixty lines or so."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines[0] == "# leveret"
    head = "\n".join(lines[:62])
    assert "pip install ." in head
    assert "python -m leveret demo" in head
    assert head.count("```python") == 2
    assert all(len(block.splitlines()) <= 14 for block in blocks(ROOT / "README.md", "python"))


def test_version_has_its_entry_in_the_changelog() -> None:
    assert f"## {leveret.__version__}" in (ROOT / "CHANGELOG.md").read_text()

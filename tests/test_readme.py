"""The README and docs/ say what the result files say, and their links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_tables_are_those_of_the_result_files(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples" / "benchmarks"), *sys.path])
    import tables

    found = set()
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        found |= set(re.findall(r"<!-- (\w+) -->", text))
        assert tables.with_tables(text) == text, "run: python examples/benchmarks/tables.py"
    assert found == set(tables.TABLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_exist(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []

"""The README says what the result files say, and its links lead somewhere."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_those_of_the_result_files(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples" / "benchmarks"), *sys.path])
    import tables

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "run: python examples/benchmarks/tables.py"


def test_local_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []

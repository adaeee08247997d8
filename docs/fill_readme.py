"""Fill the marked parts of the README: ``python docs/fill_readme.py``.

The table comes from ``docs/results/expect.csv``, the report from ``docs/_static/quickstart.txt``,
which is what ``examples/quickstart.py`` prints.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def table() -> str:
    """Rows of the CSV file as a table of Markdown."""
    with (ROOT / "docs/results/expect.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report() -> str:
    """The printed report of the quick start."""
    text = (ROOT / "docs/_static/quickstart.txt").read_text(encoding="utf-8").rstrip()
    return f"```text\n{text}\n```"


def filled(readme: str) -> str:
    """The README with its marked parts made anew."""
    for name, content in (("expect", table()), ("report", report())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(rf"{begin}\n.*?{end}", re.DOTALL)
        assert len(pattern.findall(readme)) == 1, f"README.md has no single part {name}"
        readme = pattern.sub(lambda _: f"{begin}\n{content}\n{end}", readme)  # noqa: B023
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

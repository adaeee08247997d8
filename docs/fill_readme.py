"""Fill the marked parts of the README.

``python docs/fill_readme.py`` takes the table from ``docs/results/expect.csv`` and the report from
``docs/_static/quickstart.txt``. With ``--run`` it runs ``examples/quickstart.py`` first, and keeps
its report and its picture in ``docs/_static``.
"""

from __future__ import annotations

import csv
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "docs" / "_static"


def table() -> str:
    """Rows of the CSV file as a table of Markdown."""
    with (ROOT / "docs/results/expect.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report() -> str:
    """The printed report of the quick start."""
    text = (STATIC / "quickstart.txt").read_text(encoding="utf-8").rstrip()
    return f"```text\n{text}\n```"


def filled(readme: str) -> str:
    """The README with its marked parts made anew."""
    for name, content in (("expect", table()), ("report", report())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(rf"{begin}\n.*?{end}", re.DOTALL)
        assert len(pattern.findall(readme)) == 1, f"README.md has no single part {name}"
        readme = pattern.sub(lambda _, text=f"{begin}\n{content}\n{end}": text, readme)
    return readme


def run_quick_start() -> None:
    """Keep what the quick start prints and draws."""
    sys.argv = ["quickstart.py"]
    found = runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")["report"]
    (STATIC / "quickstart.txt").write_text(f"{found}\n", encoding="utf-8")
    found.plot().savefig(STATIC / "quickstart.png", dpi=150)


if __name__ == "__main__":
    if "--run" in sys.argv:
        run_quick_start()
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

"""The README, the guide and the docstrings speak of the package as it is."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest

import sinfkit

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = set(sinfkit.__all__) - {"__version__"}
MODULES = ["sinfkit", *(m.name for m in pkgutil.walk_packages(sinfkit.__path__, "sinfkit."))]


def code_blocks() -> list:
    """Every piece of Python in the README and the guide, with where it stands."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.rst"))]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        else:
            blocks = re.findall(
                r"^\.\. code-block:: python\n\n((?: {3}.*\n|\n)+)", text, re.MULTILINE
            )
        where = path.relative_to(ROOT).as_posix()
        found += [
            pytest.param(textwrap.dedent(block), id=f"{where}:{i}")
            for i, block in enumerate(blocks, 1)
        ]
    return found


def test_the_guide_has_code():
    assert len(code_blocks()) >= 10


@pytest.mark.parametrize("block", code_blocks())
def test_documented_code_fits_the_package(block):
    # Most blocks speak of a reader's own network, so they cannot run; names and keywords can be
    # compared all the same, and these are what goes stale.
    tree = ast.parse(block)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    others = {
        a.name for i in imports if not (i.module or "").startswith("sinfkit") for a in i.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sinfkit"):
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in PUBLIC - others:
                signature = inspect.signature(getattr(sinfkit, node.func.id))
                keywords = {k.arg: None for k in node.keywords if k.arg}
                signature.bind_partial(*node.args, **keywords)


def api_names() -> list[str]:
    """What the API pages list, as dotted names below ``sinfkit``."""
    text = (ROOT / "docs" / "api" / "index.rst").read_text(encoding="utf-8")
    tables = re.findall(
        r"^\.\. autosummary::\n(?: {3}:.*\n)*\n((?: {3}[\w.]+\n)+)", text, re.MULTILINE
    )
    return "".join(tables).split()


def test_api_pages_list_what_is_public():
    assert {name for name in api_names() if "." not in name} == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_have_docstrings(name):
    public = getattr(sinfkit, name)
    short = isinstance(public, type) and issubclass(public, Exception)
    assert len(inspect.getdoc(public) or "") > (30 if short else 80)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert failed == 0


@pytest.mark.parametrize("name", api_names())
def test_api_pages_have_examples(name):
    target = importlib.import_module("sinfkit")
    for part in name.split("."):
        parent, target = target, getattr(target, part, None)
        if target is None:
            target = importlib.import_module(f"{parent.__name__}.{part}")
    if not (isinstance(target, type) and issubclass(target, Exception)):
        assert ">>> " in (inspect.getdoc(target) or ""), f"{name} has no example"


def test_the_readme_is_short_and_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    spec = importlib.util.spec_from_file_location("fill_readme", ROOT / "docs" / "fill_readme.py")
    fill_readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill_readme)
    assert fill_readme.filled(text) == text, "run: python docs/fill_readme.py"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def gallery() -> list[str]:
    """The scripts that the documentation runs."""
    tree = ast.parse((ROOT / "docs" / "conf.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "executed":
            return ast.literal_eval(node.value)
    raise AssertionError("docs/conf.py has no list of scripts to execute")


@pytest.mark.parametrize("name", gallery())
def test_gallery_scripts_are_pages(name):
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    title, underline = (ast.get_docstring(ast.parse(source)) or "\n").splitlines()[:2]
    assert title and set(underline) == {"="} and len(underline) == len(title)
    assert source.count("\n# %%\n") >= 2
    # They are run where nobody can download anything, and without arguments.
    assert "download=True" not in source and "argparse" not in source


def test_the_gallery_is_linked():
    built = {"auto_examples", "generated", "sg_execution_times.rst"}  # of an earlier build
    sources = [p for p in (ROOT / "docs").rglob("*.rst") if not built.intersection(p.parts)]
    pages = "".join(p.read_text(encoding="utf-8") for p in sources)
    for name in re.findall(r":ref:`sphx_glr_auto_examples_(\w+)\.py`", pages):
        script = ROOT / "examples" / f"{name}.py"
        assert (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").count("\n=")

"""What several files say about the package agrees."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import sinfkit

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    """Text of a file in the repository; skips where only the package is there."""
    if not (ROOT / name).exists():
        pytest.skip(f"{name} is not here")
    return (ROOT / name).read_text(encoding="utf-8")


def bounds(text: str) -> dict[str, Version]:
    """Lower bounds of requirements such as ``"torch>=2.6"``."""
    return {name: Version(v) for name, v in re.findall(r'"([\w-]+)>=([\d.]+)[,"]', text)}


def test_version_is_the_changelogs_newest():
    newest = re.search(r"^## \[([^]]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == sinfkit.__version__


def test_version_of_the_installed_package():
    try:
        installed = importlib.metadata.version("sinfkit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert installed == sinfkit.__version__


def test_types_are_shipped():
    assert (Path(sinfkit.__file__).parent / "py.typed").exists()


def test_oldest_environment_pins_every_lower_bound():
    pyproject = read("pyproject.toml")
    pins = {
        name: Version(version)
        for name, version in re.findall(r"oldest: ([\w-]+)==(\S+)", read("tox.ini"))
    }
    run_time = bounds(re.search(r"^dependencies = \[.*?^\]", pyproject, re.M | re.S)[0])
    test = bounds(re.search(r"^test = \[.*?^\]", pyproject, re.M | re.S)[0])
    assert len(run_time) >= 8 and len(test) >= 3
    assert pins == run_time | test


def test_tests_need_what_the_extra_brings():
    """Export is tested with the real packages, wherever the tests run."""
    extras = read("pyproject.toml")
    onnx, test = (
        bounds(re.search(rf"^{name} = \[.*?^\]", extras, re.M | re.S)[0])
        for name in ("onnx", "test")
    )
    assert len(onnx) == 3 and onnx.items() <= test.items()


def test_the_citation_is_of_this_version():
    assert f"\nversion: {sinfkit.__version__}\n" in read("CITATION.cff")


def test_ci_checks_what_tox_does():
    ci, lint = read(".ci/run"), read("tox.ini")
    for command in ("ruff check .", "ruff format --check .", "lint-imports --no-cache"):
        assert command in ci and command in lint


def test_ci_runs_the_readmes_command():
    commands = re.findall(r'^pip install "\.\[test\]" .*$', read("README.md"), re.MULTILINE)
    assert commands == ['pip install ".[test]" && pytest']
    assert commands[0] in read(".ci/run")


# It has torch and scikit-learn already, as most programs do.
IMPORT = """
import json, sys
import sklearn.base, torch
before = set(sys.modules)
import sinfkit
print(json.dumps(sorted(set(sys.modules) - before)))
"""
# Each costs a tenth of a second to several seconds, and only some calls need it.
HEAVY = """
IPython PIL cv2 matplotlib onnx onnxruntime onnxscript pandas polars timm torch._dynamo
torch._inductor torch.onnx torch.utils.flop_counter torch.utils.tensorboard torch_pruning
torchvision transformers triton
""".split()


def test_import_leaves_out_what_few_calls_need(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(sinfkit.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    modules = json.loads(done.stdout)
    assert "sinfkit.classifier" in modules
    assert not [m for m in modules if any(m == h or m.startswith(f"{h}.") for h in HEAVY)]


# Private names of other packages, and of Python's and Jupyter's, that tests need.
FOREIGN = {"_BatchNorm", "_exit", "_forward_hooks", "_forward_pre_hooks", "_modules"}
FOREIGN |= {"_python_dispatch", "_pytree", "_repr_html_", "_version"}


def private_names(tree: ast.AST) -> list[str]:
    """What a file takes from sinfkit that begins with an underscore; and what objects hide."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sinfkit"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"sinfkit[\w.]*", node.value):
                names = node.value.split(".")
        elif isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                names = [node.attr]
        found += [n for n in names if re.match(r"_(?!_)", n) and n not in FOREIGN]
    return found


@pytest.mark.parametrize("folder", ["tests", "examples"])
def test_tests_and_examples_use_public_names(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        assert not private_names(ast.parse(path.read_text(encoding="utf-8"))), path


def test_private_names_are_found():
    for code in (
        "from sinfkit.utils import _hidden",
        "from sinfkit._utils import name",
        "patch('sinfkit.base._same', 1)",
        "estimator._output",
        "f(x)._y",
    ):
        assert len(private_names(ast.parse(code))) == 1, code
    for code in ("from sinfkit import __version__", "self._x = 1", "x.__dict__", "'_y'"):
        assert not private_names(ast.parse(code)), code

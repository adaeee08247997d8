"""What is made here works where sinfkit is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinfkit import DCSPruner
from sinfkit.graph import check_traced, layer_names, opaque_modules, trace
from sinfkit.graph.tracing import of_torch_alone

ELSEWHERE = """
import sys
sys.modules["sinfkit"] = None  # whoever imports it fails
import torch
model = torch.load("model.pt", weights_only=False).eval()
x, wanted = torch.load("placed_numbers.pt")
torch.testing.assert_close(torch.load("placed.pt", weights_only=False)(x), wanted)
x, wanted = torch.load("numbers.pt")
def same(other):
    torch.testing.assert_close(other(x), wanted, rtol=1e-3, atol=1e-4)
same(model)
same(torch.jit.trace(model, x))
same(torch.jit.script(model))
batch = torch.export.Dim("batch", min=2, max=64)
same(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module())
model.train()
assert not torch.equal(model(x), model(x))  # dropout is alive
def loss():
    return torch.nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3)
before = float(loss())
optimiser = torch.optim.Adam(model.requires_grad_(True).parameters(), 3e-2)
for _ in range(30):
    optimiser.zero_grad()
    loss().backward()
    optimiser.step()
assert float(loss()) < before
assert not any(name.startswith("sinfkit.") for name in sys.modules)
"""


class Small(nn.Module):
    """Convolutions with dropout as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.drop, self.out = nn.BatchNorm2d(8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)).relu()
        h = (h + self.b(h)).relu().mean((2, 3))
        return self.out(F.dropout(self.drop(h), 0.3, self.training))


class Placed(nn.Module):
    """Constants, and buffers of each type, meet the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.register_buffer("grid", torch.linspace(-1, 1, 6))
        self.register_buffer("mask", torch.arange(6) % 2 == 0)
        self.register_buffer("index", torch.arange(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        n, _, height, width = h.shape
        rows = torch.linspace(0, 1, height, device=h.device).view(1, 1, height, 1)
        h = h + rows.expand(n, 1, height, width) + self.grid.repeat(n, 1)[:, None, None]
        h = h.masked_fill(self.mask.expand(n, 1, 1, width), 0.5)
        h = h.gather(3, self.index.view(1, 1, 1, -1).expand(n, 8, height, -1))
        return self.head(self.b(h).mean((2, 3)))


def test_models_are_loaded_scripted_exported_and_tuned_elsewhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Placed().eval()
    x = torch.randn(5, 3, 8, 8)
    graph = trace(network, x[:1])
    check_traced(graph, network, x)
    assert not opaque_modules(graph) and layer_names(graph) == ["a", "b", "head"]
    torch.save(of_torch_alone(graph), tmp_path / "placed.pt")
    torch.save((x, network(x).detach()), tmp_path / "placed_numbers.pt")
    again = torch.load(tmp_path / "placed.pt", weights_only=False)
    assert not {p.data_ptr() for p in again.parameters()} & {
        p.data_ptr() for p in network.parameters()
    }
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    X = (y[:, None, None, None] + rng.normal(size=(60, 1, 6, 6))).astype(np.float32)
    pruner = DCSPruner(
        Small().eval(), criterion="l1", schedule="uniform", pruning_ratios=(0.5, 0.5)
    )
    model = pruner.fit(X, y).model_
    x = torch.as_tensor(X[:12])
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        torch.save((x, model.eval()(x)), tmp_path / "numbers.pt")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr

"""Least squares from moments of the dense network alone.

What a layer loses with some of its inputs, and the best weights on the others, follow from its
dense weights and the covariance of its dense inputs. The covariance is gathered once; after that,
any choice of channels at any ratio costs one linear system per layer and no look at an image. That
is what a search over many sliced networks needs. `sinfkit.repair.sequential` with
``method="least_squares"`` also corrects what earlier layers get wrong, but has to run both
networks for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import SlicingWarning
from ..graph.cuts import batch_norm_behind
from ..graph.nodes import CONVOLUTIONS, Layer, called_layer
from ..slicing.channels import Sliced, width
from ..utils.params import warn
from .moments import Moments, damped_cholesky, measurable, n_blocks
from .ridge import double
from .walk import checked_support, graph_of, install, twins

__all__ = ["ALPHA", "shrunk_layers", "static_least_squares"]

ALPHA = 1e-2
_WELL_SOLVED = 1e-3  # relative residual up to which single precision is taken to be enough


@torch.inference_mode(False)
@torch.no_grad()
def static_least_squares(
    dense: fx.GraphModule,
    sliced: Sliced,
    moments: Mapping[str, Moments],
    *,
    alpha: float = ALPHA,
) -> dict[str, float]:
    """Refit the layers of a sliced network, in place, from moments of the dense one.

    Of weights ``W`` over kept and removed inputs k, r of covariance ``H``: ``W_k + W_r H_rk (H_kk +
    a I)^-1``, ``a`` being `alpha` times the mean variance of the kept ones.  Returns, by layer, the
    share of the dense output's variance that is lost for good; 0 where no input is missing.
    """
    graph, support = graph_of(sliced), sliced.support
    twins(dense, graph)
    if not alpha > 0:
        raise ValueError(f"alpha must be a positive number; got {alpha!r}.")
    once = measurable(graph)
    norms = batch_norm_behind(graph)
    errors: dict[str, float] = {}
    skipped: list[str] = []
    for node in graph.graph.nodes:
        layer, old = called_layer(graph, node), called_layer(dense, node)
        name = str(node.target)
        if layer is None or old is None or name in sliced.left_out:
            continue
        kept = checked_support(name, support.get(name), old, layer)
        if layer.weight[0].numel() == old.weight[0].numel():
            errors[name] = 0.0
        elif name not in once or name not in moments:
            skipped.append(name)
        elif layer is old:
            raise ValueError(
                f"The layer {name!r} is one module in both networks, so a repair would change the "
                "dense one as well. Trace the sliced network from a copy."
            )
        else:
            inputs = np.delete(np.arange(width(old, "in")), sliced.removed_inputs[name])
            norm = _per_channel(graph, layer, norms.get(name), moments[name].n_axes)
            weight, shift, error = _refit(
                old, layer, kept, inputs, moments[name], _gain(norm, layer), alpha
            )
            if not np.isfinite(error):
                raise ValueError(
                    f"The moments of the layer {name!r} are not finite numbers. Look for NaN or "
                    "infinity in the images and in the dense network's weights."
                )
            install(layer, norm, weight, shift)
            errors[name] = error
    if skipped:
        warn(
            "Layers without moments (called more than once, too wide, or behind something that "
            f"mixes channels) stay as they were sliced: {', '.join(dict.fromkeys(skipped))}.",
            SlicingWarning,
        )
    return errors


def shrunk_layers(dense: fx.GraphModule, sliced: fx.GraphModule) -> list[str]:
    """Names of the layers that read fewer inputs in a sliced network: those to have moments."""
    before, after = dict(dense.named_modules()), dict(sliced.named_modules())
    return [
        name
        for name in measurable(sliced)
        if before[name].weight[0].numel() > after[name].weight[0].numel()
    ]


def _refit(
    old: Layer,
    new: Layer,
    kept: np.ndarray,
    inputs: np.ndarray,
    moments: Moments,
    gain: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor, float]:
    """A sliced layer's weight, the shift of its output, and the share of variance that is lost."""
    dense = old.weight.detach().flatten(1)
    cells = old.weight[0, 0].numel()
    per_block = dense.shape[1] // cells  # input channels
    outputs = len(dense) // n_blocks(old)
    gain = gain.square().cpu()
    weight = torch.empty(len(kept), new.weight[0].numel(), dtype=torch.float64)
    shift = torch.empty(len(kept), dtype=torch.float64)
    lost, spread, rounding = 0.0, 0.0, torch.finfo(torch.float64).tiny
    for rows in np.split(np.arange(len(kept)), n_blocks(new)):
        block, own = kept[rows[0]] // outputs, kept[rows] % outputs
        local = inputs[inputs // per_block == block] % per_block
        stays = np.zeros((per_block, cells), dtype=bool)
        stays[local] = True
        k, r = (torch.as_tensor(np.flatnonzero(part.ravel())) for part in (stays, ~stays))
        H, mean = moments.covariance[block], moments.mean[block]
        W = double(dense[kept[rows]]).to(H)
        k, r = k.to(H.device), r.to(H.device)
        H_k = H[k]
        target = W[:, r] @ H_k[:, r].T  # what the removed inputs share with the kept ones
        change, penalty = _solve(
            H_k[:, k], target, alpha, moments.noise, dense.dtype == torch.float64
        )
        removed = ((W[:, r] @ H[r][:, r]) * W[:, r]).sum(1)
        explained = (target * change).sum(1) + penalty * change.square().sum(1)
        weight[rows] = (W[:, k] + change).cpu()
        shift[rows] = (W[:, r] @ mean[r] - change @ mean[k]).cpu()
        lost += float((removed - explained).cpu() @ gain[rows])
        spread += float(moments.variance[block][own].cpu() @ gain[rows])
        rounding += moments.noise * float(W.square().sum(1).cpu() @ gain[rows])
    device = new.weight.device
    share = max(lost, 0.0) / max(spread, rounding) if np.isfinite(lost) else lost
    return weight.reshape(new.weight.shape).to(device), shift.to(device), share


def _solve(
    H: Tensor, target: Tensor, alpha: float, noise: float, exact: bool
) -> tuple[Tensor, float]:
    """``target (H + a I)^-1``, and a."""
    penalty = float(alpha * H.diagonal().mean() + noise) if len(H) else 0.0
    if not exact:
        single = H.float()
        single.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(single)
        if not failed:
            change = torch.cholesky_solve(target.float().T, factor).T
            residual = target.float() - change @ single
            if residual.norm() <= _WELL_SOLVED * target.norm():
                return change.to(H), penalty
    factor, penalty = damped_cholesky(H, penalty)
    return torch.cholesky_solve(target.T, factor).T, penalty


def _per_channel(
    sliced: fx.GraphModule, layer: Layer, name: str | None, n_axes: int
) -> _BatchNorm | None:
    """The batch-norm behind a layer, if it only scales and shifts its channels."""
    norm = None if name is None else sliced.get_submodule(name)
    calls = [n for n in sliced.graph.nodes if n.op == "call_module" and n.target == name]
    if not isinstance(norm, _BatchNorm) or len(calls) != 1:
        return None
    per_feature = isinstance(layer, CONVOLUTIONS) or n_axes == 2
    return norm if per_feature and norm.running_var is not None else None


def _gain(norm: _BatchNorm | None, layer: Layer) -> Tensor:
    """What the batch-norm behind a layer multiplies each channel with."""
    if norm is None:
        return torch.ones(len(layer.weight), dtype=torch.float64)
    assert norm.running_var is not None
    gain = (double(norm.running_var) + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * double(norm.weight.detach())

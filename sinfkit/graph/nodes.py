"""What a node of a traced graph does: layer, norm, activation, pooling, addition."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (*CONVOLUTIONS, nn.Linear)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = Convolution | nn.Linear

ALONG_ROWS = (0, 1)  # where samples usually lie: along the first axis, each in one part

_ACTIVATIONS = frozenset(
    "celu clamp clamp_min elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid "
    "mish prelu relu relu6 rrelu selu sigmoid silu softplus softshrink softsign tanh tanhshrink "
    "threshold".split()
)
_NORMS = frozenset(
    "batch_norm group_norm instance_norm layer_norm local_response_norm rms_norm".split()
)
_IDENTITIES = frozenset(
    "alpha_dropout contiguous detach dropout dropout1d dropout2d dropout3d feature_alpha_dropout "
    "feature_dropout stochastic_depth".split()
)
_ARITHMETIC = frozenset("add div mul sub truediv true_divide multiply subtract divide".split())
# They mix channels or change their number, unlike the rest of their file in torch.
_NOT_ACTIVATIONS = (
    nn.GLU,
    nn.LogSoftmax,
    nn.MultiheadAttention,
    nn.Softmax,
    nn.Softmax2d,
    nn.Softmin,
)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer whose output channels can be scored and sliced."""
    kind = next((kind for kind in LAYERS if isinstance(module, kind)), None)
    plain = kind is not None and all(
        getattr(type(module), name, None) is getattr(kind, name, None)
        for name in ("forward", "_conv_forward")
    )
    return plain and "weight" in module._parameters


def n_channels(layer: nn.Module) -> int:
    """Number of output channels of a layer."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features
    raise TypeError(f"expected a convolution or Linear layer, got {type(layer).__name__}")


def is_switched(module: nn.Module) -> bool:
    """Whether a module is bare code that depends on the mode, such as stochastic depth."""
    if any(True for _ in module.children()) or module._parameters or module._buffers:
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _returns_its_argument(module: nn.Module) -> bool:
    """Whether a module gives back what it is given."""
    x = torch.ones(1, 1, 1, 1)
    try:
        with torch.no_grad():
            return module(x) is x
    except Exception:
        return False


def samples_of(node: fx.Node) -> tuple[int, int]:
    """Along which axis of a node's value samples lie, and in how many parts each.

    As far as its graph was recorded with samples; parts of one sample lie side by side.
    """
    axis, parts = node.meta.get("samples", ALONG_ROWS)
    return axis, parts


def samples_in(two: torch.Size, three: torch.Size) -> tuple[int, int] | None:
    """Along which axis samples lie, and in how many parts each, from shapes for two and three."""
    axes = [axis for axis, (a, b) in enumerate(zip(two, three, strict=False)) if a != b]
    if len(two) != len(three) or len(axes) != 1:
        return None
    parts, rest = divmod(two[axes[0]], 2)
    return None if rest or three[axes[0]] != 3 * parts else (axes[0], parts)


def holds_layers(module: nn.Module) -> bool:
    """Whether a convolution or linear map of any kind lies in a module or is it."""
    return any(isinstance(m, LAYERS) for m in module.modules())


def called_module(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    if node.op != "call_module":
        return None
    return gm.get_submodule(str(node.target))


def called_layer(gm: fx.GraphModule, node: fx.Node) -> Layer | None:
    """The layer that a node calls, if it calls one."""
    module = called_module(gm, node)
    if isinstance(module, LAYERS) and is_layer(module):
        return module
    return None


def is_station(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a layer, or an opaque module with layers inside."""
    module = called_module(gm, node)
    return module is not None and holds_layers(module)


def is_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node normalises, channel by channel or over channels."""
    module = called_module(gm, node)
    if module is None:
        return function_name(node) in _NORMS
    return _from_file(module, "batchnorm", "instancenorm", "normalization")


def is_activation(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node applies an elementwise activation function."""
    module = called_module(gm, node)
    if module is None:
        return function_name(node) in _ACTIVATIONS
    return _from_file(module, "activation") and not isinstance(module, _NOT_ACTIVATIONS)


def is_pool(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node pools over positions."""
    module = called_module(gm, node)
    if module is None:
        name = function_name(node)
        return ("pool" in name and "unpool" not in name) or name == "mean"
    return _from_file(module, "pooling") and "Unpool" not in type(module).__name__


def is_identity(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node returns its first argument as it is in eval mode."""
    module = called_module(gm, node)
    if module is None:
        return function_name(node) in _IDENTITIES
    if isinstance(module, nn.Identity) or _from_file(module, "dropout"):
        return True
    return is_switched(module) and _returns_its_argument(module)


def is_arithmetic(node: fx.Node) -> bool:
    """Whether a node adds, subtracts, multiplies or divides elementwise."""
    return function_name(node) in _ARITHMETIC


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds two different computed values, as at the end of a residual block."""
    if function_name(node) != "add" or len(node.args) != 2 or node.args[0] is node.args[1]:
        return False
    return all(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args)


def is_shape_query(node: fx.Node) -> bool:
    """Whether a node reads the shape or the like of its argument, not its values."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel")
    return (
        node.op == "call_function"
        and node.target is getattr
        and len(node.args) > 1
        and node.args[1] in ("shape", "ndim", "dtype", "device")
    )


def is_batch_size(node: fx.Node) -> bool:
    """Whether a node is the number of samples: the first dimension of the network's input."""
    if node.op == "call_method" and node.target == "size":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dim, int) and dim == 0 and _is_input(node.args[0])
    if node.op != "call_function" or node.target is not operator.getitem or node.args[1] != 0:
        return False
    shape = node.args[0]
    return (
        isinstance(shape, fx.Node)
        and is_shape_query(shape)
        and (shape.args[1:] == ("shape",) or (shape.target == "size" and len(shape.args) == 1))
        and _is_input(shape.args[0])
    )


def unpacks(node: fx.Node) -> bool:
    """Whether a node takes one item out of its argument, which then need not be a tensor."""
    return (
        node.op == "call_function"
        and node.target is operator.getitem
        and isinstance(node.args[1], (int, str))
    )


def out_of_place(target: object) -> Callable[..., object] | str | None:
    """The counterpart that does not overwrite its argument, of a function or method name.

    None if `target` overwrites nothing, or has no counterpart.
    """
    if isinstance(target, str):
        return target[:-1] if _is_mutating(target) and hasattr(nn.Parameter, target[:-1]) else None
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", "") == "_operator":
        plain = getattr(operator, name[1:], None) if name.startswith("i") else None
        return plain if name in _INPLACE_OPERATORS else None
    if not _is_mutating(name):
        return None
    for home in (nn.functional, torch):
        if hasattr(home, name[:-1]):
            return getattr(home, name[:-1])
    return None


_INPLACE_OPERATORS = frozenset("iadd isub imul itruediv ifloordiv imod ipow imatmul".split())


def _is_mutating(name: str) -> bool:
    """Whether a name follows torch's convention for what overwrites its argument."""
    return name.endswith("_") and not name.startswith("_") and not name.endswith("__")


def _is_input(value: object) -> bool:
    """Whether a value is the network's input."""
    return isinstance(value, fx.Node) and value.op == "placeholder"


def function_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls, without the underscore of in-place."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
    else:
        return ""
    return name.rstrip("_")


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All that a node is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(new)
        waiting += new
    return found


def _from_file(module: nn.Module, *names: str) -> bool:
    """Whether a module's class, or one it derives from, is defined in these files of torch.nn."""
    files = {f"torch.nn.modules.{name}" for name in names}
    return any(kind.__module__ in files for kind in type(module).__mro__)

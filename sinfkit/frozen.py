"""FrozenModel: a trained network held by reference, so that clones do not copy its weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from .utils.device import resolve_device
from .utils.params import check_integer, naming
from .utils.pickling import Packed, pack
from .utils.weights_file import Loaded, WeightsFile

# One copy of a network per device and process, however many FrozenModels hold the same weights.
_COPIES: WeakValueDictionary[tuple[str, str], nn.Module] = WeakValueDictionary()
# Those of files are held: a worker's next job brings an equal FrozenModel, and finds them loaded.
_LOADED = Loaded()


class FrozenModel:
    """A trained torch classifier that never changes.

    Estimators take any ``nn.Module``, but scikit-learn's ``clone`` deep-copies it: in a grid
    search every candidate would hold its own weights, and ``Pipeline(memory=...)`` would never
    find a cached result.  A `FrozenModel` takes one private copy when it is made.  ``clone`` and
    ``copy.deepcopy`` give the same object back, and its pickle is the same bytes in every process,
    where its classes can be imported.

    `FrozenModel.from_file` makes one whose pickle holds the name of a file instead of the weights.

    Parameters
    ----------
    module : nn.Module or fitted skorch net
        The classifier: a batch in, one score (logit or probability) per class out, or one of the
        second of two.  It is copied to the CPU, put in evaluation mode, and its gradients are
        switched off; the caller's object is not touched.
        Of a compiled or `DataParallel` one the module inside is taken.
    mean, std : sequence of float, optional
        Normalisation that the network was trained with, one value per channel (or per feature):
        it sees ``(x - mean) / std``.  For uint8 images, x is the pixel divided by 255.
    input_shape : tuple of int, optional
        ``(channels, height, width)``.  Lets flattened 2-D `X` through, so that a scaler may stand
        before the estimator in a ``Pipeline``.

    Attributes
    ----------
    mean, std : tuple of float or None
    input_shape : tuple of int or None
    digest : str
        SHA-256 of architecture, code, weights and normalisation; equality and hash go by it.

    Raises
    ------
    TypeError
        If `module` is neither an ``nn.Module`` nor a fitted skorch net, cannot be pickled, or is
        scripted or quantised.
    ValueError
        If a weight is not finite, or `mean` and `std` do not fit together.

    Examples
    --------
    >>> from torch import nn
    >>> from sklearn.base import clone
    >>> from sinfkit import FrozenModel
    >>> frozen = FrozenModel(nn.Linear(4, 3), mean=[0.5] * 4, std=[0.2] * 4)
    >>> frozen
    FrozenModel(Linear, 15 parameters)
    >>> clone(frozen, safe=False) is frozen
    True
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    input_shape: tuple[int, ...] | None
    digest: str
    weights_file: WeightsFile | None = None
    _packed: Packed | None = None
    # Strong references to this object's copies; `_COPIES` only lets equal objects share them.
    _mine: dict[str, nn.Module]

    def __init__(
        self,
        module: Any,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        module = baked(unwrapped(module))
        _check_weights(module)
        self.mean, self.std = _check_normalisation(mean, std)
        with naming("input_shape"):
            self.input_shape = None if input_shape is None else tuple(input_shape)
            for n in self.input_shape or ():
                check_integer("input_shape", n)
        if self.input_shape is not None:
            if not self.input_shape:
                raise ValueError("input_shape must have at least one axis, got ().")
            self.input_shape = tuple(int(n) for n in self.input_shape)
        with naming("module"):
            self._packed = pack(_freeze(pack(module).unpack()))
        self._finish()

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        factory: Callable[[], nn.Module],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> FrozenModel:
        """Make a FrozenModel whose weights stay in a file.

        Its pickle names the file (some hundred bytes), and so does that of every estimator that
        holds it; each process loads the file where the network is first needed, once.  That is how
        weights reach many workers; all of them must see the file at the same place.

        Parameters
        ----------
        path : str or Path
            A state dict, as ``torch.save(network.state_dict(), path)`` or safetensors (by the
            ending ``.safetensors``) write it, or a checkpoint that holds one.  Names may have what
            `DataParallel`, `torch.compile` and trainers put in front of them (``module.``,
            ``_orig_mod.``, ``model.``).  Nothing in it is run as code.
        factory : callable
            Without arguments, returns a network of that architecture.  It must be importable in the
            workers; ``functools.partial(vgg16, 100)`` is one.
        mean, std, input_shape
            As for `FrozenModel`.

        Returns
        -------
        FrozenModel
            Equal to one that was made from the network itself.

        Raises
        ------
        FileNotFoundError
            If the file is not there, here or in a worker.
        ValueError
            If the file holds no state dict, or one that does not fit the network.  When it is
            loaded later, in a worker or from a stored estimator: if its content has changed (its
            SHA-256 is part of the pickle).
        TypeError
            If `factory` returns no module, or cannot be pickled.

        Notes
        -----
        A fitted estimator that is stored holds its routed or smaller network, and predicts without
        the file; what compares it with the base (``report``) needs the file.

        Examples
        --------
        >>> import pickle, tempfile
        >>> from functools import partial
        >>> from pathlib import Path
        >>> import torch
        >>> from sinfkit import FrozenModel, vgg16
        >>> factory = partial(vgg16, 10, width=0.125)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "weights.pt"
        ...     torch.save(factory().state_dict(), path)
        ...     frozen = FrozenModel.from_file(path, factory)
        >>> len(pickle.dumps(frozen)) < 1000
        True
        """
        source = WeightsFile.of(path, factory)
        made = cls(source.load(), mean, std, input_shape)
        made.weights_file = source
        return made

    @property
    def packed(self) -> Packed:
        """Structure and weights, from the file where they are not here yet."""
        if self._packed is None:
            source = self.weights_file
            assert source is not None
            key = f"{self.digest} {source.sha256}"
            loaded = _LOADED.get(key, lambda: FrozenModel(source.load()))
            self._packed, self._mine = loaded.packed, loaded._mine
        return self._packed

    def _finish(self) -> None:
        """Derive what is not pickled."""
        digest = hashlib.sha256(self.packed.structure)
        digest.update(self.packed.code.encode())
        for array in self.packed.arrays:
            digest.update(str((array.dtype, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).data)
        digest.update(repr((self.mean, self.std, self.input_shape)).encode())
        self.digest = digest.hexdigest()
        self._mine = {}

    def module(self, device: torch.device | str = "cpu") -> nn.Module:
        """Return the network on `device`, shared by everybody who asks: do not change it.

        Parameters
        ----------
        device : torch.device or str, default="cpu"

        Returns
        -------
        nn.Module
            In evaluation mode, without gradients.  The same object for the same device.
        """
        key = str(resolve_device(device))
        packed = self.packed
        if key not in self._mine:
            shared = _COPIES.get((self.digest, key))
            if shared is None:
                with torch.inference_mode(False):  # others may ask for gradients of activations
                    shared = _freeze(packed.unpack(device))
                _COPIES[self.digest, key] = shared
            self._mine[key] = shared
        return self._mine[key]

    def __getstate__(self) -> dict[str, Any]:
        if self.weights_file is not None:
            source = self.weights_file
            return {
                "path": source.path,
                "factory": source.factory,
                "sha256": source.sha256,
                "digest": self.digest,
                "mean": self.mean,
                "std": self.std,
                "input_shape": self.input_shape,
            }
        packed = self.packed
        return {
            "structure": packed.structure,
            "arrays": list(packed.arrays),
            "dtypes": list(packed.dtypes),
            **({"main": dict(packed.main)} if packed.main else {}),
            **({"code": packed.code} if packed.code else {}),
            "mean": self.mean,
            "std": self.std,
            "input_shape": self.input_shape,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.mean, self.std = state["mean"], state["std"]
        self.input_shape = state["input_shape"]
        if "path" in state:
            self.weights_file = WeightsFile(state["path"], state["factory"], state["sha256"])
            self.digest, self._mine = state["digest"], {}
            return
        self._packed = Packed(
            state["structure"],
            tuple(state["arrays"]),
            tuple(state["dtypes"]),
            state.get("main", {}),
            state.get("code", ""),
        )
        self._finish()

    def __sizeof__(self) -> int:
        """Bytes of its pickle, roughly: Dask sends what is large once per worker, by itself."""
        size = object.__sizeof__(self)
        return size if self.weights_file is not None else size + self.packed.nbytes

    def __copy__(self) -> FrozenModel:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenModel:
        return self

    def __sklearn_clone__(self) -> FrozenModel:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenModel) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"FrozenModel({describe(self.module())[:-1].replace('(', ', ', 1)})"


def describe(module: nn.Module) -> str:
    """A network in a few words, where its own repr would list every layer."""
    n = sum(p.numel() for p in module.parameters())
    return f"{type(module).__name__}({_abbreviate(n)} parameters)"


def as_frozen(model: Any) -> FrozenModel:
    """Return `model` itself if it is frozen, a frozen copy if it is a module, else raise."""
    if isinstance(model, FrozenModel):
        return model
    if isinstance(model, nn.Module):
        return FrozenModel(model)
    if hasattr(model, "module_") or hasattr(model, "initialize"):
        raise TypeError(
            "model is a skorch net, which scikit-learn's clone would reset to an untrained one. "
            "Wrap it once it is fitted: FrozenModel(net)."
        )
    raise TypeError(
        f"model must be a torch.nn.Module or a sinfkit.FrozenModel, not {type(model).__name__}."
    )


def unwrapped(module: Any) -> nn.Module:
    """Return the nn.Module inside, or raise a TypeError that says what to pass."""
    if isinstance(module, FrozenModel):
        return module.module()
    if isinstance(module, nn.Module):
        return _original(module)
    inner = getattr(module, "module_", None)
    if isinstance(inner, nn.Module):
        return _original(inner)
    if hasattr(module, "initialize") and hasattr(module, "module"):
        raise TypeError("The skorch net is not fitted. Call its fit before FrozenModel(net).")
    raise TypeError(
        f"module must be a torch.nn.Module or a fitted skorch net, not {type(module).__name__}."
    )


def _original(module: nn.Module) -> nn.Module:
    """The module without what compiles it or spreads it over devices; its parts likewise."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{module.original_name} is scripted or traced by torch.jit, and can neither be read "
            "nor sliced. Pass the module that it was made from."
        )
    plain = isinstance(module, torch.ao.nn.quantized.FloatFunctional)  # it adds, and does no more
    if ".quantized." in f"{type(module).__module__}." and not plain:
        raise TypeError(
            f"{type(module).__name__} is quantised, and has no weights that could be refitted. "
            "Pass the network as it was before, and quantise the result."
        )
    compiled = module._modules.get("_orig_mod")  # torch.compile's
    if compiled is not None:
        return _original(compiled)
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _original(module.module)
    parts = {k: None if m is None else _original(m) for k, m in module._modules.items()}
    if all(parts[name] is part for name, part in module._modules.items()):
        return module
    twin = copy.copy(module)  # the caller's stays as it is
    twin._modules = parts
    return twin


def _check_weights(module: nn.Module) -> None:
    """Raise if a weight is not a finite number."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"The module's {name!r} is not initialised yet: call the module on a batch, and "
                "train it, before it is frozen."
            )
        if tensor.device.type == "meta":
            raise ValueError(f"The module's {name!r} has no values: it is on the meta device.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"The model's {name!r} holds NaN or infinity. Load the weights again, or train "
                "with a smaller learning rate."
            )


def baked(module: nn.Module) -> nn.Module:
    """The module, or a copy in which weights that are computed (spectral norm, say) are plain.

    torch pickles no parametrised module.
    """
    if not any(parametrize.is_parametrized(part) for part in module.modules()):
        return module
    module = copy.deepcopy(module).eval()  # in training mode, reading such a weight may change it
    for part in list(module.modules()):
        if not parametrize.is_parametrized(part):
            continue
        # Not by torch's own function: it changes a class that the copy shares with the original.
        names: Any = part.parametrizations
        weights = {name: getattr(part, name).detach().clone() for name in names}
        del part.parametrizations
        part.__class__ = type(part).__bases__[0]
        for name, weight in weights.items():
            part.register_parameter(name, nn.Parameter(weight))
        part._load_state_dict_pre_hooks.clear()  # they read the weights behind the computed one
    return module


def _freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients."""
    return module.eval().requires_grad_(False)


def _check_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Validate `mean` and `std` together."""
    if mean is None and std is None:
        return None, None
    with naming("mean"):
        m = np.atleast_1d(np.asarray(0.0 if mean is None else mean, dtype=np.float64))
    with naming("std"):
        s = np.atleast_1d(np.asarray(1.0 if std is None else std, dtype=np.float64))
    if (
        m.ndim != 1
        or s.ndim != 1
        or 0 in (m.size, s.size)
        or not np.isfinite(m).all()
        or not np.isfinite(s).all()
    ):
        raise ValueError("mean and std must be finite, with one number per channel.")
    if (s <= 0).any():
        raise ValueError("std must be positive for every channel.")
    if m.size != s.size and 1 not in (m.size, s.size):
        raise ValueError(f"mean has {m.size} values and std has {s.size}; they must agree.")
    return tuple(m.tolist()), tuple(s.tolist())


def _abbreviate(n: int) -> str:
    """14,800,000 as '14.8M'."""
    for size, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.1f}{suffix}"
    return str(n)

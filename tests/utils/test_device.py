"""Device policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinfkit.utils import full_float32, host_tensor, loaded_device, resolve_device


def test_auto_and_explicit_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected


@pytest.mark.parametrize("device", ["gpu", 3.5, "cpu:x"])
def test_unknown_devices(device):
    with pytest.raises(ValueError, match="not a torch device"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_cuda_where_there_is_none():
    with pytest.raises(ValueError, match="not available on this machine"):
        resolve_device("cuda")
    with pytest.warns(UserWarning, match="loaded on the CPU"):
        assert loaded_device("cuda:0") == torch.device("cpu")


def test_full_float32_restores_the_setting():
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    before = cudnn.allow_tf32, cuda.matmul.allow_tf32
    with pytest.raises(RuntimeError, match="by the caller"), full_float32():
        if hasattr(cudnn, "conv"):
            assert cudnn.conv.fp32_precision == cuda.matmul.fp32_precision == "ieee"
        else:
            assert not cudnn.allow_tf32 and not cuda.matmul.allow_tf32
        raise RuntimeError("by the caller")
    assert (cudnn.allow_tf32, cuda.matmul.allow_tf32) == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has no such switch")
def test_full_float32_after_the_newer_switches_were_set():
    place = torch.backends.mkldnn.conv
    before = place.fp32_precision
    place.fp32_precision = "bf16"
    try:
        with full_float32():
            assert place.fp32_precision == "ieee"
        assert place.fp32_precision == "bf16"
    finally:
        place.fp32_precision = before


def test_full_float32_in_threads_that_overlap():
    place = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(torch.backends.cudnn, "conv") else "allow_tf32"
    before = getattr(place, name)
    first, second = full_float32(), full_float32()
    first.__enter__()
    second.__enter__()
    inside = getattr(place, name)
    first.__exit__(None, None, None)
    assert getattr(place, name) == inside  # the other one is still at work
    second.__exit__(None, None, None)
    assert getattr(place, name) == before


def test_whatever_array_becomes_a_tensor():
    array = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    # An axis of length one that runs backwards leaves an array contiguous for NumPy.
    views = [array, array[::-1], array[:, :1, ::-1], array[..., ::-1], array.transpose(3, 1, 0, 2)]
    views += [array.astype(">f4"), array[:0, ::-1], np.float32(3.0)[None][::-1]]
    for view in views:
        np.testing.assert_array_equal(host_tensor(view).numpy(), view)
    assert host_tensor(array).data_ptr() == array.ctypes.data
    array.setflags(write=False)
    host_tensor(array).zero_()
    assert array.any()

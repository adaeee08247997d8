from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits, make_blobs
from torch import nn

from sinfkit.zoo import default_network, train_network
from sinfkit.zoo.training import crop_flip


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return (X / 16).astype(np.float32).reshape(-1, 1, 8, 8), y


class Interruptible(nn.Module):
    """A small network with dropout that can be told to fail after some training batches."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Flatten(),
                nn.Dropout(0.3),
                nn.Linear(512, 10),
            )
        self.batches_left = float("inf")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.batches_left -= 1
            if self.batches_left < 0:
                raise KeyboardInterrupt
        return self.body(x)


def weights(network: nn.Module) -> list[torch.Tensor]:
    return list(network.state_dict().values())


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def accuracy(network: nn.Module, X: np.ndarray, y: np.ndarray) -> float:
    with torch.inference_mode():
        return float((network(torch.as_tensor(X)).argmax(1).numpy() == y).mean())


def test_learns_digits_and_leaves_the_model_alone(digits):
    X, y = digits
    model = default_network((1, 8, 8), 10, random_state=0).train()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    trained = train_network(model, X[:1200], y[:1200], epochs=5, mean=0.3, std=0.4, random_state=0)
    assert accuracy(trained, (X[1200:] - 0.3) / 0.4, y[1200:]) > 0.93
    assert same(model, before) and model.training
    assert not trained.training
    # A frozen layer is trained, and handed back as frozen as it came.
    assert not torch.equal(trained[0].weight, model[0].weight)
    assert [p.requires_grad for p in trained.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert all(p.grad is None for p in trained.parameters())


@pytest.mark.parametrize("n_samples", [30, 300])
def test_default_settings_suit_small_tables(n_samples):
    X, y = make_blobs(n_samples, centers=3, random_state=0, cluster_std=1.0)
    network = default_network((2,), 3, torch.float64, random_state=0)
    mean, std = X.mean(0), X.std(0)
    network = train_network(network, X, y, epochs=60, mean=mean, std=std, random_state=0)
    assert accuracy(network, (X - mean) / std, y) > 0.83
    assert next(network.parameters()).dtype == torch.float64


def test_same_seed_same_result_whatever_the_global_generators(digits):
    X, y = digits[0][:200], digits[1][:200]
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        results.append(train_network(Interruptible(), X, y, epochs=2, random_state=3))
        assert torch.equal(torch.random.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert same(*results)
    assert not same(results[0], train_network(Interruptible(), X, y, epochs=2, random_state=4))


def test_each_epoch_sees_every_sample_in_an_order_of_its_own():
    seen: list[int] = []

    class Recording(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.extend(x[:, 0].int().tolist())
            return super().forward(x)

    X = np.arange(50, dtype=np.float32)[:, None]
    train_network(
        Recording(1, 2), X, np.arange(50) % 2, epochs=2, batch_size=8, max_lr=1e-6, random_state=0
    )
    first, second = seen[:50], seen[50:]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_random_state_object(digits):
    X, y = digits[0][:100], digits[1][:100]
    first, second = (
        train_network(Interruptible(), X, y, epochs=1, random_state=np.random.RandomState(7))
        for _ in range(2)
    )
    assert same(first, second)


@pytest.mark.parametrize("random_state", [0, None])
def test_interrupted_run_resumes_bit_for_bit(digits, tmp_path, random_state):
    X, y = (digits[0][:300] * 255).astype(np.uint8), digits[1][:300]
    settings = {"epochs": 4, "batch_size": 64, "augment": "crop_flip", "random_state": random_state}
    path = tmp_path / "folder" / "run.ckpt"
    broken = Interruptible()
    broken.batches_left = 5 + 5 + 2  # In the third epoch.
    with pytest.raises(KeyboardInterrupt):
        train_network(broken, X, y, checkpoint=path, **settings)
    state = torch.load(path, weights_only=True)
    assert len(state["history"]) == 2

    resumed = train_network(Interruptible(), X, y, checkpoint=path, **settings)
    whole = train_network(Interruptible(), X, y, **{**settings, "random_state": state["seed"]})
    assert same(resumed, whole)
    assert [file.name for file in path.parent.iterdir()] == ["run.ckpt"]
    # A finished run has nothing left to do: not one more batch.
    done = Interruptible()
    done.batches_left = 0
    assert same(train_network(done, X, y, checkpoint=path, **settings), whole)


def test_checkpoint_of_another_run(digits, tmp_path):
    X, y = digits[0][:60], digits[1][:60]
    path = tmp_path / "run.ckpt"
    train_network(Interruptible(), X, y, epochs=1, checkpoint=path, random_state=0)
    content = path.read_bytes()
    for changed, name in [
        ({"epochs": 2}, "epochs"),
        ({"max_lr": 0.2}, "max_lr"),
        ({"random_state": 1}, "random_state"),
        ({"y": y[::-1]}, "labels"),
        ({"X": X[:, :, :, :7], "model": default_network((1, 8, 7), 10)}, "shape of X"),
    ]:
        arguments = {"model": Interruptible(), "X": X, "y": y, "epochs": 1, "random_state": 0}
        with pytest.raises(ValueError, match=f"another run.*{name}"):
            train_network(**{**arguments, **changed}, checkpoint=path)
    with pytest.raises(ValueError, match="another network"):
        train_network(
            default_network((1, 8, 8), 10), X, y, epochs=1, random_state=0, checkpoint=path
        )
    assert path.read_bytes() == content


def test_damaged_checkpoint(digits, tmp_path):
    X, y = digits[0][:60], digits[1][:60]
    path = tmp_path / "run.ckpt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="run.ckpt holds no training"):
        train_network(Interruptible(), X, y, epochs=1, checkpoint=path)
    assert path.read_bytes() == b"not a checkpoint"


def test_uint8_is_divided_by_255(digits):
    X, y = (digits[0][:100] * 255).astype(np.uint8), digits[1][:100]
    arguments = {"epochs": 1, "random_state": 0, "mean": [0.3], "std": [0.4]}
    from_bytes = train_network(Interruptible(), X, y, **arguments)
    from_floats = train_network(
        Interruptible(), torch.from_numpy(X).float() / 255, torch.from_numpy(y), **arguments
    )
    for a, b in zip(weights(from_bytes), weights(from_floats), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n_samples", [2, 3, 17, 33])
def test_no_batch_of_a_single_sample(n_samples):
    # A batch-norm over features refuses one sample; 17 = 16 + 1 would leave one over.
    X = np.random.default_rng(0).normal(size=(n_samples, 4))
    y = np.arange(n_samples) % 2
    network = default_network((4,), 2, torch.float64, random_state=0)
    train_network(network, X, y, epochs=2, batch_size=16, random_state=0)
    train_network(network, X, y, epochs=2, batch_size=2, random_state=0)


@pytest.mark.parametrize("epochs", [1, 4, 5, 6])
def test_any_number_of_steps(epochs):
    # One batch an epoch: a warm-up of less than, exactly and more than one step.
    arguments = arguments_for_errors() | {"epochs": epochs, "batch_size": 12}
    trained = train_network(**arguments)
    assert all(bool(torch.isfinite(p).all()) for p in trained.parameters())


def test_weight_decay_spares_biases_and_norms():
    # One class, whose probability is 1: the loss pulls nowhere, and only what decays moves.
    X, y = np.zeros((64, 4), dtype=np.float32), np.zeros(64, int)
    network = nn.Linear(4, 1)
    trained = train_network(network, X, y, epochs=30, random_state=0)
    assert float(trained.weight.norm() / network.weight.norm()) < 0.999
    assert torch.equal(trained.bias, network.bias)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_crop_flip_only_moves_pixels(height, width, channels, seed):
    """An output is its image, reflected at the border, shifted by up to an eighth, or mirrored."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.arange(2 * channels * height * width).reshape(2, channels, height, width)
    out = crop_flip(images, generator)
    assert out.shape == images.shape and out.dtype == images.dtype
    tall, wide = height // 8, width // 8
    for image, moved in zip(images.numpy(), out.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (tall, tall), (wide, wide)), mode="reflect")
        candidates = [
            padded[:, i : i + height, j : j + width][:, :, ::step]
            for i in range(2 * tall + 1)
            for j in range(2 * wide + 1)
            for step in (1, -1)
        ]
        assert any(np.array_equal(moved, candidate) for candidate in candidates)


def test_crop_flip_uses_every_shift_and_both_sides():
    image = torch.arange(256).reshape(1, 1, 16, 16)
    out = crop_flip(image.expand(1000, 1, 16, 16), torch.Generator().manual_seed(0))
    assert len(torch.unique(out.flatten(1), dim=0)) == 5 * 5 * 2


def arguments_for_errors() -> dict:
    rng = np.random.default_rng(0)
    return {
        "model": default_network((1, 8, 8), 3, random_state=0),
        "X": rng.random((12, 1, 8, 8), dtype=np.float32),
        "y": np.arange(12) % 3,
        "epochs": 1,
    }


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": "vgg16"}, TypeError, "torch.nn.Module"),
        ({"X": np.zeros((12, 1, 8, 8), dtype=np.int64)}, TypeError, "uint8 or floating"),
        ({"X": np.full((12, 1, 8, 8), "a")}, TypeError, "numbers"),
        ({"X": np.zeros((12, 8, 8))}, ValueError, "shape"),
        ({"X": np.zeros((1, 1, 8, 8)), "y": np.zeros(1, int)}, ValueError, "n_samples = 1"),
        ({"X": np.full((12, 1, 8, 8), np.nan)}, ValueError, "NaN or infinity"),
        ({"X": np.full((12, 1, 8, 8), 1e300)}, ValueError, "more than torch.float32"),
        ({"X": np.ones((12, 1, 8, 8)), "mean": 1e38, "std": 1e-3}, ValueError, "mean or std"),
        ({"X": np.zeros((12, 3, 8, 8))}, ValueError, "cannot take samples"),
        ({"X": np.zeros((12, 4)), "augment": "crop_flip"}, ValueError, "needs images"),
        ({"y": None}, ValueError, "without y"),
        ({"y": np.zeros(11, int)}, ValueError, "one integer label per row"),
        ({"y": np.zeros(12)}, ValueError, "one integer label per row"),
        ({"y": np.full(12, "cat")}, TypeError, "numbers"),
        ({"y": np.arange(12)}, ValueError, "from 0 to 2; found 0 to 11"),
        ({"y": np.arange(12) % 3 - 1}, ValueError, "from 0 to 2; found -1 to 1"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"batch_size": 1}, ValueError, "batch_size"),
        ({"max_lr": 0.0}, ValueError, "max_lr"),
        ({"augment": "mixup"}, ValueError, "augment='mixup' is unknown"),
        ({"mean": [0.1, 0.2]}, ValueError, "mean has 2 entries where X has 1 channels"),
        ({"std": 0.0}, ValueError, "std must be positive"),
        ({"device": "nowhere"}, ValueError, "device"),
        ({"model": nn.Conv2d(1, 3, 3)}, ValueError, "logits of shape"),
        ({"model": nn.Flatten()}, ValueError, "model has no parameters"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        train_network(**{**arguments_for_errors(), **changed})


def test_divergence_is_reported_and_not_saved(tmp_path):
    path = tmp_path / "run.ckpt"
    arguments = {**arguments_for_errors(), "epochs": 5, "max_lr": 1e30, "batch_size": 2}
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(RuntimeError, match="lower max_lr"):
        train_network(**{**arguments, "model": model}, checkpoint=path, random_state=0)
    if path.exists():
        assert all(np.isfinite(e["loss"]) for e in torch.load(path, weights_only=True)["history"])


def test_silent_unless_verbose(digits, capfd):
    X, y = digits[0][:60], digits[1][:60]
    train_network(Interruptible(), X, y, epochs=1, random_state=0)
    assert capfd.readouterr() == ("", "")
    train_network(Interruptible(), X, y, epochs=1, random_state=0, verbose=1)
    assert "epoch 1/1" in "".join(capfd.readouterr())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(digits):
    X, y = digits
    before = torch.cuda.get_rng_state()
    model = Interruptible()
    trained = train_network(model, X, y, epochs=5, mean=0.3, std=0.4, device="cuda", random_state=0)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert next(trained.parameters()).device.type == "cpu"
    assert accuracy(trained, (X - 0.3) / 0.4, y) > 0.93

"""Label-free distillation of pruned and of routed networks."""

from __future__ import annotations

import joblib
import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from torch import nn
from torch.utils.data import Dataset

import sinfkit
from sinfkit import (
    DCSPruner,
    Distillation,
    FrozenModel,
    PruningOptions,
    SemanticClusterer,
    SINFClassifier,
    train_network,
)
from sinfkit.zoo import default_network

pytestmark = pytest.mark.filterwarnings("ignore")
NO_HELD_OUT = PruningOptions(validation_fraction=0)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return (X / 16).astype(np.float32), y


@pytest.fixture(scope="module")
def images(digits):
    """Images, their labels, and a network with batch-norms that knows them."""
    X, y = digits[0].reshape(-1, 1, 8, 8), digits[1]
    network = small_cnn(10)
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    return X, y, FrozenModel(train_network(network, X[:1000], y[:1000], epochs=8, random_state=0))


@pytest.fixture(scope="module")
def table(digits):
    """The same for samples that are rows of a table."""
    X, y = digits
    network = default_network((64,), 10, random_state=0)
    return X, y, FrozenModel(train_network(network, X[:1000], y[:1000], epochs=20, random_state=0))


def far(estimator, X):
    """How far the answers to held-out samples are from the base's: mean divergence."""
    with torch.inference_mode():
        dense = torch.log_softmax(estimator.base_model_.module()(torch.as_tensor(X)), 1)
    found = torch.as_tensor(estimator.predict_proba(X)).clamp_min(1e-12).log()
    return float((dense.exp() * (dense - found)).sum(1).mean())


def subgraphs_far(sinf, X):
    """The same for what the routed subgraphs say, before temperatures and the router's part."""
    network, x = sinf.network_, torch.as_tensor(X)
    with torch.inference_mode():
        dense = torch.log_softmax(sinf.base_model_.module()(x), 1)
        h = network.prefix(network.normalise(x))
        logits = network.branch_logits(h, network.route_features(h).cluster)
        found = torch.log_softmax(logits, 1)
    return float((dense.exp() * (dense - found)).sum(1).mean())


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["images", "table"])
def test_held_out_answers_come_closer_to_the_base(kind, request):
    X, y, base = request.getfixturevalue(kind)
    pruner = DCSPruner(base, budget=0.3, random_state=0).fit(X[:1000], y[:1000])
    how = Distillation(8, augment="mix", learning_rate=1e-3)
    trained = clone(pruner).set_params(distill=how).fit(X[:1000], y[:1000])
    assert far(trained, X[1000:]) < 0.9 * far(pruner, X[1000:])
    losses = trained.distillation_losses_
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert not hasattr(pruner, "distillation_losses_")
    assert trained.support_.keys() == pruner.support_.keys()  # the same filters, other weights
    report = trained.report(X[1000:], y[1000:], repeats=0)
    assert "8 epochs" in str(report) and report.to_dict()["distilled_epochs"] == 8
    assert "epochs" not in str(pruner.report(X[1000:], y[1000:], repeats=0))


@pytest.mark.parametrize("answers", ["all", "cluster"])
def test_a_routed_network_comes_closer_as_a_whole(images, answers):
    X, y, base = images
    plain = SINFClassifier(
        base,
        clusterer=SemanticClusterer(method="given", mapping={k: k // 4 for k in range(10)}),
        pruner=DCSPruner(budget=0.35),
        route_layer="3",
        random_state=0,
    ).set_params(options__exit_threshold=None, options__router_weight=0.0, options__answers=answers)
    plain.fit(X[:1000], y[:1000])
    how = Distillation(24, augment="mix", learning_rate=1e-3)
    trained = clone(plain).set_params(distill=how).fit(X[:1000], y[:1000])
    losses = trained.distillation_losses_
    assert len(losses) == 24 and losses[-1] < losses[0]
    if answers == "all":  # otherwise other classes are closed
        assert subgraphs_far(trained, X[1000:]) < subgraphs_far(plain, X[1000:])
    before, after = plain.network_, trained.network_
    assert not same(weights(before.prefix), weights(after.prefix))
    assert not same(weights(before.router), weights(after.router))  # fitted anew
    for cluster in range(3):
        assert not same(weights(before.subgraph(cluster)), weights(after.subgraph(cluster)))
    assert not any(p.requires_grad for p in after.parameters())
    assert trained.clusterer_.network_[0] is after.prefix
    assert "24 epochs" in str(trained.report(X[1000:], y[1000:], repeats=0))


def test_what_the_fallback_reads_is_not_trained(images):
    X, y, base = images
    plain = SINFClassifier(
        base,
        clusterer=SemanticClusterer(n_clusters=2),
        pruner=DCSPruner(budget=0.5),
        route_layer="3",
        fallback="base",
        random_state=0,
    ).fit(X[:600], y[:600])
    trained = clone(plain).set_params(distill=2).fit(X[:600], y[:600])
    assert same(weights(plain.network_.prefix), weights(trained.network_.prefix))
    assert same(weights(plain.network_.rest), weights(trained.network_.rest))
    assert not same(weights(plain.network_.subgraphs), weights(trained.network_.subgraphs))


def test_samples_that_certify_do_not_train(images):
    X, y, base = images
    sinf = SINFClassifier(
        base,
        # Class 9 is a cluster by itself, which has no subgraph.
        clusterer=SemanticClusterer(method="given", mapping={k: k // 3 for k in range(10)}),
        pruner=DCSPruner(budget=0.5),
        route_layer="3",
        distill=1,
        random_state=0,
    )
    noise = np.random.default_rng(0).random(X[600:900].shape, dtype=np.float32)
    networks = [
        clone(sinf).fit(X[:600], y[:600], X_val=held, y_val=y[600:900]).network_
        for held in (X[600:900], noise)
    ]
    assert same(*(weights(network) for network in networks))


def test_deterministic_and_without_side_effects(images):
    X, y, base = images
    before = weights(base.module())
    pruner = DCSPruner(base, budget=0.4, distill=Distillation(2, augment="mix"), random_state=0)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = clone(pruner).fit(X[:400], y[:400])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    assert same(before, weights(base.module()))
    torch.manual_seed(6)
    again = clone(pruner).fit(X[:400], y[:400])
    assert same(weights(first.model_), weights(again.model_))
    assert first.distillation_losses_ == again.distillation_losses_
    assert not any(p.requires_grad for p in first.model_.parameters())
    assert not first.model_.training
    stored = {t.data_ptr() for t in base.module().state_dict().values()}
    assert not stored & {t.data_ptr() for t in first.model_.state_dict().values()}


class Interrupting(Dataset):
    """Images that can be read so many times before somebody presses Ctrl-C."""

    def __init__(self, X, left):
        self.X, self.left, self.n_read = X, left, 0

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        self.n_read += 1
        if self.n_read > self.left:
            raise KeyboardInterrupt
        return self.X[i]


@pytest.mark.parametrize("kind", ["pruner", "sinf"])
def test_an_interrupted_fit_goes_on_and_gives_the_same(images, tmp_path, kind):
    X, y, base = images
    X, y = X[:200], y[:200]
    how = Distillation(3, augment="mix", checkpoint=tmp_path / "states")
    estimator = DCSPruner(base, budget=0.4, distill=how, options=NO_HELD_OUT, random_state=0)
    if kind == "sinf":
        clusterer = SemanticClusterer(n_clusters=2)
        estimator = SINFClassifier(
            base,
            clusterer=clusterer,
            pruner=DCSPruner(budget=0.4),
            route_layer="3",
            distill=how,
            random_state=0,
        )
    straight = Interrupting(X, 10**9)
    expected = clone(estimator).set_params(distill__checkpoint=None).fit(straight, y)
    interrupted = Interrupting(X, straight.n_read - 300)
    with pytest.raises(KeyboardInterrupt):
        clone(estimator).fit(interrupted, y)
    (file,) = (tmp_path / "states").iterdir()
    rest = Interrupting(X, 10**9)
    found = clone(estimator).fit(rest, y)
    assert rest.n_read < straight.n_read  # some epochs were not run again
    assert found.distillation_losses_ == expected.distillation_losses_
    part = "model_" if kind == "pruner" else "network_"
    assert same(weights(getattr(found, part)), weights(getattr(expected, part)))
    # Finished, it is found as a whole; another training has another file.
    done = Interrupting(X, 10**9)
    clone(estimator).fit(done, y)
    assert done.n_read < rest.n_read
    clone(estimator).set_params(distill__temperature=3.0).fit(X, y)
    assert len(list((tmp_path / "states").iterdir())) == 2
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=file.name):
        clone(estimator).fit(X, y)


def test_a_search_trains_few_networks_from_careful_to_bold(images):
    X, y, base = images
    pruner = DCSPruner(base, max_accuracy_drop=0.05, distill=1, random_state=0)
    pruner.fit(X[:1000], y[:1000])
    built = [row["cost_ratio"] for row in pruner.search_results_ if row["stage"] == "finalist"]
    assert 1 <= len(built) <= 4 and built == sorted(built, reverse=True)
    assert len(pruner.distillation_losses_) == 1 and pruner.cost_ratio_ < 1
    assert pruner.certified_ and pruner.certified_drop_ <= 0.05
    sinf = SINFClassifier(
        base, max_accuracy_drop=0.05, route_layer="3", distill=1, random_state=0
    ).set_params(clusterer__n_clusters=2, options__exit_threshold=None)
    sinf.fit(X[:500], y[:500])
    trained = [row["budget"] for row in sinf.search_results_ if "divergence" in row]
    assert 1 <= len(trained) <= 3 and trained == sorted(trained, reverse=True)


def test_rounds_of_an_iterative_schedule_are_trained_at_the_end(images):
    X, y, base = images
    pruner = DCSPruner(
        base, criterion="l1", schedule="iterative", max_accuracy_drop=0.1, distill=1, random_state=0
    ).fit(X[:600], y[:600])
    assert pruner.cost_ratio_ < 1 and len(pruner.distillation_losses_) == 1


def test_no_labels_are_needed(images):
    X, _, base = images
    pruner = DCSPruner(base, criterion="obs", budget=0.4, distill=1, random_state=0).fit(X[:300])
    assert len(pruner.distillation_losses_) == 1


def test_weights_count_samples(images):
    X, y, base = images
    X, y = X[:300], y[:300]
    pruner = DCSPruner(base, budget=0.4, distill=2, options=NO_HELD_OUT, random_state=0)
    plain, twice, other = (
        clone(pruner).fit(X, y, sample_weight=weight)
        for weight in (None, np.full(300, 2), np.where(y < 5, 5, 1))
    )
    assert plain.distillation_losses_ == pytest.approx(twice.distillation_losses_, rel=1e-3)
    assert plain.distillation_losses_ != pytest.approx(other.distillation_losses_, rel=1e-3)


def test_half_precision_networks_learn_in_single_precision():
    X, y = blobs(per_class=20)
    network = default_network((1, 8, 8), 6, random_state=0)
    network = train_network(network, X, y, epochs=4, random_state=0).to(torch.bfloat16)
    pruner = DCSPruner(network, criterion="l1", schedule="uniform", repair="match", random_state=0)
    plain = clone(pruner).fit(X, y)
    trained = clone(pruner).set_params(distill=Distillation(6, learning_rate=1e-3)).fit(X, y)
    assert {p.dtype for p in trained.model_.parameters()} == {torch.bfloat16}
    assert trained.distillation_losses_[-1] < trained.distillation_losses_[0]
    assert not same(weights(plain.model_), weights(trained.model_))


@pytest.mark.parametrize(
    ("distill", "error", "message"),
    [
        (0, ValueError, "distill must be a positive integer"),
        (True, TypeError, "distill must be a Distillation, a number of epochs or None"),
        (2.5, TypeError, "got 2.5"),
        (Distillation(0), ValueError, "distill.epochs"),
        (Distillation(learning_rate=0.0), ValueError, "distill.learning_rate"),
        (Distillation(temperature=-1), ValueError, "distill.temperature"),
        (Distillation(batch_size=0), ValueError, "distill.batch_size"),
        (Distillation(augment="rotate"), ValueError, "distill.augment"),
        (Distillation(checkpoint=3), TypeError, "distill.checkpoint"),
    ],
)
@pytest.mark.parametrize("kind", [DCSPruner, SINFClassifier])
def test_parameters_are_checked(images, kind, distill, error, message):
    X, y, base = images
    with pytest.raises(error, match=message):
        kind(base, distill=distill).fit(X[:200], y[:200])


def test_settings_that_cannot_be(images, table):
    X, y, base = table
    with pytest.raises(ValueError, match="augment='crop' needs images"):
        DCSPruner(base, budget=0.5, distill=Distillation(1, augment="crop")).fit(X[:300], y[:300])
    X, y, base = images
    with pytest.raises(ValueError, match="pruner.distill has no effect inside SINFClassifier"):
        SINFClassifier(base, pruner=DCSPruner(distill=1)).fit(X[:300], y[:300])
    with pytest.raises(RuntimeError, match="lower distill.learning_rate"):
        how = Distillation(3, learning_rate=1e30)
        DCSPruner(base, budget=0.5, distill=how).fit(X[:300], y[:300])


@pytest.mark.parametrize("augment", ["mix", "crop", "crop_flip"])
def test_every_change_of_the_images_is_another_training(images, augment):
    X, y, base = images
    how = Distillation(1, augment=None)
    pruner = DCSPruner(base, budget=0.4, distill=how, random_state=0)
    plain = clone(pruner).fit(X[:300], y[:300])
    changed = clone(pruner).set_params(distill__augment=augment).fit(X[:300], y[:300])
    assert changed.distillation_losses_ != plain.distillation_losses_


def test_it_is_a_parameter_like_others(images, tmp_path):
    X, y, base = images
    pruner = DCSPruner(base, budget=0.5, distill=Distillation(3), random_state=0)
    assert "Distillation(epochs=3)" in repr(pruner)
    twin = clone(pruner).set_params(distill__epochs=1, distill__temperature=4.0)
    assert (pruner.distill.epochs, twin.distill.epochs) == (3, 1)
    grid = {"distill": [None, 1], "budget": [0.5]}
    X, y = X[:200], y[:200]
    search = GridSearchCV(clone(pruner), grid, cv=2).fit(X, y)
    assert len(search.cv_results_["params"]) == 2
    for value in (2, Distillation(2, temperature=3.0, checkpoint=tmp_path)):
        fitted = clone(pruner).set_params(distill=value).fit(X, y)
        joblib.dump(fitted, tmp_path / "fitted.joblib")
        sinfkit.save(fitted, tmp_path / "fitted.sinf")
        loaded = joblib.load(tmp_path / "fitted.joblib")
        again = sinfkit.load(tmp_path / "fitted.sinf", factory=base.module)
        for other in (loaded, again):
            np.testing.assert_array_equal(other.predict(X), fitted.predict(X))
            assert other.distillation_losses_ == fitted.distillation_losses_
        if value == 2:
            assert again.distill == 2
        else:  # a file does not say where the next fit writes
            assert (again.distill.temperature, again.distill.checkpoint) == (3.0, None)


def test_progress_is_one_bar(images, capsys):
    X, y, base = images
    DCSPruner(base, budget=0.5, distill=3, random_state=0, verbose=1).fit(X[:300], y[:300])
    out, err = capsys.readouterr()
    assert "up to 3 epochs of distillation" in out
    assert "distils, epoch 3 of 3" in err

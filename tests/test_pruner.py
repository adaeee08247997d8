"""DCSPruner: smaller networks that still know the classes."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from helpers import blobs, randomise_batch_norms, small_cnn
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from torch import nn

from sinfkit import DCSPruner, FrozenModel, PruningOptions, train_network
from sinfkit.graph import count_macs, count_parameters


@pytest.fixture(scope="module")
def trained():
    X, y = blobs(per_class=60, noise=1.2)
    network = train_network(
        small_cnn(), X[:240], y[:240], epochs=12, batch_size=32, random_state=0, device="cpu"
    )
    return FrozenModel(network), X[:240], y[:240], X[240:], y[240:]


def test_fit_gives_a_smaller_network_with_exact_counts(trained):
    frozen, X, y, X_test, y_test = trained
    pruner = DCSPruner(
        frozen, criterion="dcs", schedule="linear", pruning_ratios=(0.25, 0.5), random_state=0
    ).fit(X, y)
    assert list(pruner.support_) == ["0", "3", "7", "10"]
    # linear: 1/4, 1/3, 5/12, 1/2 of 8, 8, 16, 16, rounded down
    assert [len(kept) for kept in pruner.support_.values()] == [6, 6, 10, 8]
    for layer, kept in pruner.support_.items():
        weight = dict(pruner.model_.named_modules())[layer].weight
        assert weight.shape[0] == len(kept) == len(np.unique(kept))
        assert (np.diff(kept) > 0).all()
        assert pruner.scores_[layer].shape == (
            dict(frozen.module().named_modules())[layer].out_channels,
        )
        lowest_kept = pruner.scores_[layer][kept].min()
        removed = np.setdiff1d(np.arange(len(pruner.scores_[layer])), kept)
        assert (pruner.scores_[layer][removed] <= lowest_kept).all()
    assert count_parameters(pruner.model_) < count_parameters(frozen.module())
    assert pruner.score(X_test, y_test) > 0.75
    features = pruner.transform(X_test)
    assert features.shape == (len(X_test), 8) and features.dtype == np.float32
    assert len(pruner.get_feature_names_out()) == 8
    p = pruner.predict_proba(X_test)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (pruner.predict(X_test) == pruner.classes_[p.argmax(1)]).all()


def test_optimal_brain_surgeon_for_a_subset_of_classes(trained):
    frozen, X, y, X_test, y_test = trained
    keywords = {"pruning_ratios": (0.4, 0.4), "classes": [1, 2, 4], "random_state": 0}
    own = np.isin(y_test, [1, 2, 4])
    errors = {}
    for criterion in ("obs", "random"):
        pruner = DCSPruner(frozen, schedule="linear", criterion=criterion, **keywords).fit(X, y)
        errors[criterion] = sum(pruner.repair_error_.values())
        if criterion == "obs":
            assert pruner.score(X_test[own], y_test[own]) > 0.75
            for score in pruner.scores_.values():
                assert score.max() <= 1 + 1e-9 and (score >= 0).all()
    assert errors["obs"] < errors["random"]


def test_keeping_everything_reproduces_the_base(trained):
    frozen, X, y, X_test, _ = trained
    pruner = DCSPruner(
        frozen, criterion="dcs", schedule="linear", pruning_ratios=(0.0, 0.0), random_state=0
    ).fit(X, y)
    with torch.inference_mode():
        expected = torch.softmax(frozen.module()(torch.as_tensor(X_test)), 1).numpy()
    np.testing.assert_allclose(pruner.predict_proba(X_test), expected, atol=1e-5)


@pytest.mark.parametrize("criterion", ["dcs", "l1", "taylor", "fdr", "random"])
@pytest.mark.parametrize("repair", ["none", "least_squares"])
def test_every_criterion(trained, criterion, repair):
    frozen, X, y, X_test, y_test = trained
    pruner = DCSPruner(
        frozen,
        schedule="linear",
        pruning_ratios=(0.1, 0.4),
        criterion=criterion,
        repair=repair,
        random_state=0,
    )
    pruner.fit(X, y)
    assert set(pruner.scores_) == {"0", "3", "7", "10"}
    if repair == "least_squares":
        assert pruner.score(X_test, y_test) > 0.6
        assert all(0 <= e < 1 for e in pruner.repair_error_.values())


@pytest.mark.parametrize("schedule", ["linear", "geometric", "uniform"])
@pytest.mark.parametrize("repair", ["mean", "match"])
def test_schedules_and_repairs(trained, schedule, repair):
    frozen, X, y, X_test, _ = trained
    pruner = DCSPruner(frozen, schedule=schedule, repair=repair, random_state=0).fit(X, y)
    expected = 0.5 if schedule == "uniform" else 1 / 8 - 1 / 8
    assert pruner.ratios_["0"] == pytest.approx(expected)
    assert np.isfinite(pruner.predict_proba(X_test)).all()


def test_callable_criterion_gets_the_record(trained):
    frozen, X, y, *_ = trained
    seen = []

    def smallest_index_first(data):
        seen.append((data.name, tuple(data.features.shape[:2]), data.n_classes))
        return torch.arange(data.weight.shape[0], dtype=torch.float64)

    pruner = DCSPruner(
        frozen, schedule="linear", criterion=smallest_index_first, random_state=0
    ).fit(X, y)
    assert seen[0] == ("0", (193, 8), 6)
    for layer, kept in pruner.support_.items():
        n = len(pruner.scores_[layer])
        assert kept.tolist() == list(range(n - len(kept), n))
    for answer, match in ((torch.ones(3), "one score"), (torch.full((8,), np.nan), "NaN")):
        with pytest.raises(ValueError, match=match):
            DCSPruner(frozen, schedule="linear", criterion=lambda data, a=answer: a).fit(X, y)
    with pytest.raises(TypeError, match="criterion: The scores of layer '0' are no numbers"):
        DCSPruner(frozen, schedule="linear", criterion=lambda *data: data).fit(X, y)


def test_subset_of_classes_keeps_only_their_outputs(trained):
    frozen, X, y, X_test, y_test = trained
    pruner = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        pruning_ratios=(0.1, 0.6),
        classes=[4, 1],
        random_state=0,
    ).fit(X, y)
    assert pruner.classes_.tolist() == [1, 4]
    assert pruner.predict_proba(X_test).shape == (len(X_test), 2)
    inside = np.isin(y_test, [1, 4])
    assert pruner.score(X_test[inside], y_test[inside]) > 0.8


def test_first_layer_leaves_what_comes_before_whole(trained):
    frozen, X, y, *_ = trained
    pruner = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        random_state=0,
        options=PruningOptions(first_layer="7"),
    ).fit(X, y)
    widths = {layer: len(kept) for layer, kept in pruner.support_.items()}
    assert widths["0"] == widths["3"] == 8 and widths["7"] < 16
    with pytest.raises(ValueError, match="no layer 'head'"):
        DCSPruner(
            frozen, criterion="dcs", schedule="linear", options=PruningOptions(first_layer="head")
        ).fit(X, y)


def test_caller_model_untouched_and_failed_fit_changes_nothing(trained):
    _, X, y, X_test, _ = trained
    model = small_cnn().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = DCSPruner(model, criterion="dcs", schedule="linear", random_state=0).fit(X, y)
    assert model.training and all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    expected = pruner.predict_proba(X_test)
    with pytest.raises(ValueError, match="NaN"):
        pruner.fit(np.full_like(X, np.nan), y)
    with pytest.raises(ValueError, match="pruning_ratios"):
        pruner.set_params(pruning_ratios=(0.1, 1.0)).fit(X, y)
    np.testing.assert_array_equal(pruner.predict_proba(X_test), expected)


def test_same_seed_same_result(trained):
    frozen, X, y, X_test, _ = trained
    a, b = (
        DCSPruner(
            frozen,
            criterion="dcs",
            schedule="linear",
            random_state=3,
            options=PruningOptions(repair_samples=50),
        ).fit(X, y)
        for _ in range(2)
    )
    np.testing.assert_array_equal(a.predict_proba(X_test), b.predict_proba(X_test))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"criterion": "best"}, "criterion"),
        ({"schedule": "steep"}, "schedule"),
        ({"repair": "glue"}, "repair"),
        ({"schedule": "linear", "pruning_ratios": (-0.1, 0.5)}, "pruning_ratios"),
        ({"schedule": "linear", "pruning_ratios": (0.6, 0.5)}, "must not fall"),
        ({"pruning_ratios": (0.2, 0.5)}, "pruning_ratios has no effect"),
        ({"schedule": "global", "budget": 0.0}, "budget must be"),
        ({"schedule": "global", "budget": 1.5}, "budget must be"),
        ({"schedule": "global", "budget": "half"}, "budget must be"),
        ({"schedule": "global", "budget": 0.5, "options__budget_unit": "watts"}, "budget_unit"),
        ({"schedule": "linear", "budget": 0.5}, "budget has an effect"),
        ({"schedule": "linear", "options__max_ratio": 0.5}, "max_ratio has no effect"),
        ({"schedule": "linear", "options__budget_unit": "params"}, "budget_unit has no effect"),
        ({"criterion": "l1", "options__penalty": 1.0}, "penalty has no effect"),
        ({"criterion": "l1", "options__pool_size": 2}, "pool_size has no effect"),
        ({"confidence": 1.0}, "confidence"),
        ({"options__allow_unsliceable": 1}, "allow_unsliceable"),
        ({"options__validation_fraction": 0}, "validation_fraction must be above 0"),
        ({"schedule": "iterative", "max_accuracy_drop": -0.1}, "max_accuracy_drop"),
        ({"schedule": "iterative", "options__validation_fraction": 1.0}, "validation_fraction"),
        ({"options__penalty": 0.0}, "penalty"),
        ({"options__pool_size": 0}, "pool_size"),
        ({"options__repair_samples": 0}, "repair_samples"),
        ({"classes": [9]}, "does not know"),
        ({"classes": []}, "empty"),
        ({"model_classes": [0, 1]}, "model_classes"),
        ({"model_classes": [0, 0, 1, 2, 3, 4]}, "twice"),
        ({"batch_size": 0}, "batch_size"),
        ({"device": "warp"}, "device"),
    ],
)
def test_bad_parameters(trained, parameters, match):
    frozen, X, y, *_ = trained
    pruner = DCSPruner(frozen).set_params(**parameters)
    with pytest.raises((ValueError, TypeError), match=match):
        pruner.fit(X, y)
    assert not [name for name in vars(pruner) if name.endswith("_")]


def test_bad_data(trained):
    frozen, X, y, X_test, _ = trained
    pruner = DCSPruner(frozen, criterion="dcs", schedule="linear", random_state=0)
    with pytest.raises(NotFittedError):
        pruner.predict(X)
    for data, labels, match in (
        (X[:, 0], y, "shape"),
        (np.moveaxis(X, 1, 3), y, "NHWC"),
        (np.repeat(X, 2, 1), y, "cannot take samples"),
        (X[:0], y[:0], "0 sample"),
        (np.where(X > 1, np.inf, X), y, "infinity"),
        (torch.full(X.shape, float("nan")), y, "NaN"),
        (X, np.minimum(y, 4) + 10, "5 distinct labels, but the model has 6 outputs"),
        (X, np.where(y == 5, 0, y), "No calibration samples"),
        (X, y[:-1], "samples"),
        (X, None, "y"),
    ):
        with pytest.raises(ValueError, match=match):
            pruner.fit(data, labels)
    pruner.fit(X, y)
    for data in (X_test[:, :, :7], X_test[:, :, :, :, None], X_test[0], X_test[:0]):
        with pytest.raises(ValueError, match="shape|dim|sample|features"):
            pruner.predict(data)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        DCSPruner(criterion="dcs", schedule="linear", model=lambda x: x).fit(X, y)
    with pytest.raises(ValueError, match="2-D"):
        DCSPruner(nn.Conv2d(1, 4, 3), criterion="dcs", schedule="linear").fit(X, y)


def test_uncertain_outputs_raise_or_warn(trained):
    frozen, X, y, *_ = trained
    with pytest.raises(ValueError, match=r"with model_classes=\[0, 1, 2, 3, 4, 5\]"):
        DCSPruner(
            frozen,
            criterion="dcs",
            schedule="linear",
            model_classes=[1, 2, 3, 4, 5, 0],
            random_state=0,
        ).fit(X, y)
    exploding = nn.Sequential(*frozen.module().children(), nn.Linear(6, 6))
    exploding[-1].weight.data.fill_(3e38)
    with pytest.raises(ValueError, match="not finite|NaN or infinity"):
        DCSPruner(exploding, criterion="dcs", schedule="linear").fit(X, y)


class Residual(nn.Module):
    """Two blocks around a sum, and a sum along the channels that cannot be sliced."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1)
        )
        self.odd = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.inner(x))
        return self.head(torch.relu(self.odd(x).cumsum(1)).mean((2, 3)))


def test_what_cannot_be_sliced_stays_whole_with_one_warning():
    X, y = blobs(per_class=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise_batch_norms(Residual()).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner = DCSPruner(model, criterion="dcs", random_state=0, schedule="uniform").fit(X, y)
    about = [str(w.message) for w in caught if "stay whole" in str(w.message)]
    assert len(about) == 1 and "multiplications can be sliced" in about[0]
    assert len(pruner.support_["odd"]) == 8
    np.testing.assert_array_equal(pruner.support_["stem.0"], pruner.support_["inner.3"])
    assert len(pruner.support_["stem.0"]) == 4 and len(pruner.support_["inner.0"]) == 6


def test_default_network_on_tables():
    rng = np.random.default_rng(0)
    y = np.arange(150) % 3
    X = rng.normal(size=(150, 5)) + y[:, None]
    pruner = DCSPruner(criterion="dcs", schedule="linear", random_state=0).fit(X, y)
    assert pruner.score(X, y) > 0.7
    assert pruner.transform(X).dtype == np.float64
    assert pruner.predict_proba(X).dtype == np.float64


@pytest.mark.parametrize("criterion", ["dcs", "obs", "l1"])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_a_global_budget_is_met_exactly(trained, criterion, unit):
    frozen, X, y, X_test, y_test = trained
    example = torch.zeros(1, 1, 8, 8)

    def count(model):
        return count_macs(model, example)[0] if unit == "macs" else count_parameters(model)

    before, widths = None, None
    for budget in (0.6, 0.3):
        pruner = DCSPruner(
            frozen,
            schedule="global",
            budget=budget,
            criterion=criterion,
            random_state=0,
            device="cpu",
            options=PruningOptions(budget_unit=unit),
        ).fit(X, y)
        ratio = count(pruner.model_) / count(frozen.module("cpu"))
        assert pruner.cost_ratio_ == pytest.approx(ratio, rel=1e-9)
        assert budget - 0.1 < ratio <= budget  # a filter of this network is up to a tenth
        assert pruner.score(X_test, y_test) > 0.5
        now = np.array([len(kept) for kept in pruner.support_.values()])
        assert widths is None or (now <= widths).all()
        assert before is None or ratio <= before
        before, widths = ratio, now
    assert max(pruner.ratios_.values()) <= 0.9


def test_global_caps_and_classes(trained):
    frozen, X, y, *_ = trained
    pruner = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="global",
        budget=0.4,
        classes=[0, 3],
        random_state=0,
        options=PruningOptions(max_ratio=0.5),
    ).fit(X, y)
    assert max(pruner.ratios_.values()) <= 0.5 and pruner.cost_ratio_ <= 0.4
    pruner.set_params(budget=0.1)
    with pytest.raises(ValueError, match=r"max_ratio=0\.\d+ would do"):
        pruner.fit(X, y)
    assert pruner.cost_ratio_ <= 0.4  # what was fitted before is still there
    pruner.set_params(schedule="linear", budget=None, options=None).fit(X, y)
    assert 0.4 < pruner.cost_ratio_ < 1


def test_a_search_over_budgets(trained):
    frozen, X, y, *_ = trained
    search = GridSearchCV(
        DCSPruner(frozen, criterion="dcs", schedule="global", random_state=0),
        {"budget": [0.2, 0.9], "options__budget_unit": ["macs", "params"]},
        cv=2,
    ).fit(X, y)
    assert search.best_params_["budget"] == 0.9
    assert clone(search.best_estimator_).budget == 0.9


def test_the_papers_settings_are_those_of_its_description(trained):
    """Algorithms 1 and 2: DCS, ratios that grow with depth, no retraining and nothing repaired."""
    frozen, X, y, *_ = trained
    paper = DCSPruner.paper_settings(frozen, random_state=0)
    assert (paper.criterion, paper.schedule, paper.repair) == ("dcs", "linear", "none")
    # r_M between 1 and 10 %, r_L between 10 and 90 %.
    first, last = paper.pruning_ratios
    assert 0.01 <= first <= 0.1 <= last <= 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paper.fit(X, y)
    ratios = list(paper.ratios_.values())
    widths = [8, 8, 16, 16]
    # r_l = r_M + (r_L - r_M) (l - M) / (L - M); floor(r_l C_l) filters go.
    asked = [first + (last - first) * k / 3 for k in range(4)]
    assert ratios == pytest.approx(
        [np.floor(r * n + 1e-9) / n for r, n in zip(asked, widths, strict=True)]
    )
    for layer, scores in paper.scores_.items():
        assert scores.min() >= 0 and scores.sum() == pytest.approx(1)  # normalised over the layer
        kept = paper.support_[layer]
        gone = np.setdiff1d(np.arange(len(scores)), kept)
        assert not len(gone) or scores[gone].max() <= scores[kept].min()
    # The weights are the base's own.
    module = dict(frozen.module("cpu").named_modules())
    first_layer = next(iter(paper.support_))
    torch.testing.assert_close(
        dict(paper.model_.named_modules())[first_layer].weight,
        module[first_layer].weight[paper.support_[first_layer]],
    )
    other = DCSPruner.paper_settings(pruning_ratios=(0.05, 0.9), repair="match")
    assert other.pruning_ratios == (0.05, 0.9) and other.repair == "match"


def test_what_is_trained_further_leaves_the_base_alone(trained):
    frozen, X, y, X_test, _ = trained
    pruner = DCSPruner(frozen, schedule="linear", pruning_ratios=(0.0, 0.3), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pruner.fit(X, y).model_
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    base = frozen.module("cpu")
    assert not own & {p.data_ptr() for p in (*base.parameters(), *base.buffers())}
    digest, expected = frozen.digest, base(torch.as_tensor(X_test[:4]))
    model.train().requires_grad_(True)
    step = torch.optim.SGD(model.parameters(), lr=1.0)
    nn.functional.cross_entropy(model(torch.as_tensor(X)), torch.as_tensor(y)).backward()
    step.step()
    torch.testing.assert_close(base(torch.as_tensor(X_test[:4])), expected)
    assert frozen.digest == digest


class Normed(nn.Module):
    """A network of which nothing can be sliced: its channels are mixed in an unknown way."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 6)

    def forward(self, x):
        return self.head(torch.relu(self.stem(x).cumsum(1)).mean((2, 3)))


def test_a_network_that_stays_whole_is_refused_unless_told_otherwise():
    X, y = blobs(per_class=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Normed().eval()
    with pytest.raises(ValueError, match=r"0% of the multiplications can be sliced; .*whole"):
        DCSPruner(network, budget=0.5, random_state=0).fit(X, y)
    allowed = DCSPruner(network, random_state=0).set_params(options__allow_unsliceable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert allowed.fit(X, y).cost_ratio_ == 1.0
    assert allowed.sliceable_share_ == 0.0


def test_a_report_has_base_and_result_side_by_side(trained):
    frozen, X, y, X_test, y_test = trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = DCSPruner(frozen, budget=0.6, classes=[4, 1], random_state=0).fit(X, y)
    own = np.isin(y_test, [1, 4])
    report = pruner.report(X_test[own], y_test[own], repeats=0)
    assert report.accuracy == pytest.approx(pruner.score(X_test[own], y_test[own]))
    with torch.inference_mode():
        logits = frozen.module("cpu")(torch.as_tensor(X_test[own]))[:, [1, 4]]
    base = np.array([1, 4])[logits.argmax(1).numpy()] == y_test[own]
    assert report.base_accuracy == pytest.approx(base.mean())
    assert report.macs / report.base_macs == pytest.approx(pruner.cost_ratio_)
    assert "asked: at most 1.0" in str(report)


@pytest.mark.filterwarnings("ignore")
def test_fits_in_threads_give_what_they_give_alone_and_leave_torch_as_it_is():
    X, y = blobs(per_class=12)
    network = small_cnn()
    x = torch.as_tensor(X)
    before = nn.Module.__call__, nn.Module.__getattr__
    new = functools.partial(DCSPruner, network, budget=0.6, random_state=0)
    expected = new().fit(X, y).predict_proba(X)
    other = new().fit(X, y)
    answers = network(x)
    found, done = [], threading.Event()

    stored = pickle.dumps(other)

    def fit():
        found.extend(new().fit(X, y).predict_proba(X) for _ in range(3))

    def load():
        found.extend(pickle.loads(stored).predict_proba(X) for _ in range(40))

    def watch():
        while not done.is_set():
            right = np.array_equal(other.predict_proba(X), expected)
            found.append(
                expected if right and torch.equal(network(x), answers) else np.array(np.nan)
            )

    def safely(work):
        try:
            work()
        except Exception:  # of whatever kind: it is not the expected answer
            found.append(np.array(np.nan))

    works = (fit, fit, fit, load, load)
    threads = [threading.Thread(target=safely, args=(work,)) for work in works]
    watcher = threading.Thread(target=safely, args=(watch,))
    for thread in (*threads, watcher):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert len(found) > 12 and all(np.array_equal(one, expected) for one in found)
    assert (nn.Module.__call__, nn.Module.__getattr__) == before

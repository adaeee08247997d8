"""The comparison of the base network and the routed one, as figures and as a printed table."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from html import escape
from math import nan
from typing import Any, ClassVar

import numpy as np
from scipy import stats

from ..graph.cost import Latency
from ..promise import drop_interval

__all__ = ["ClusterRow", "Promise", "PruningReport", "SINFReport", "promise_of"]

_NEARLY_ALL = 0.95
_FALLBACK_WAYS = {"base": "run the base network", "top2": "run two"}


@dataclass(frozen=True)
class ClusterRow:
    """One cluster's figures."""

    name: Any
    n_classes: int
    n_samples: int
    base: float
    restricted: float
    subgraph: float
    routed: float
    route: float
    macs: float


@dataclass(frozen=True)
class Promise:
    """What was asked of an estimator, and what its calibration images could show."""

    limit: float
    confidence: float
    certified: bool
    bound: float  # of the accuracy lost; nan where nothing was certified

    def __str__(self) -> str:
        text = f"asked: at most {_points(self.limit)} lost"
        if self.certified:
            return f"{text}; certified: {_points(self.bound)} ({self.confidence:.0%})"
        return f"{text}; not certified (the calibration images cannot show it)"


def promise_of(estimator: Any) -> Promise | None:
    """What a fitted estimator says about the accuracy it may lose; None where it says nothing."""
    if not hasattr(estimator, "certified_"):
        return None
    return Promise(
        float(estimator.max_accuracy_drop),
        float(estimator.confidence),
        bool(estimator.certified_),
        float(estimator.certified_drop_),
    )


@dataclass(frozen=True)
class PruningReport:
    """Base network and result side by side; ``print`` it, or let a notebook show it.

    Attributes
    ----------
    base_accuracy, accuracy : float
        Of the base and of the result.
    lost, gained : int
        Samples that only the base, and only the result, has right.
    n_samples : int
    base_macs, macs : float
        Multiplications for one sample; of a routed network on average over the samples.
    base_parameters, parameters : int
        All that is held: of a routed network prefix, router, all subgraphs and fallback.
    base_bytes, bytes : int
        What these take, buffers included; a tensor that layers share counts once.
    latency : Latency or None
        Paired measurements of ``"base"`` and ``"result"``, both in the form in which they predict;
        None where none were asked for.
    latency_batch : int
        Samples in the batch that was timed.
    promise : Promise or None
        Limit and confidence that were asked for, whether they are certified, and the bound.
    distilled_epochs : int
        Epochs of training towards the base's answers; 0 where nothing was trained.

    See Also
    --------
    SINFReport : That of a routed network.

    Examples
    --------
    >>> from sinfkit.inference import PruningReport
    >>> sizes = dict(base_macs=1000, macs=400, base_parameters=90, parameters=40)
    >>> sizes |= dict(base_bytes=360, bytes=160, latency=None, latency_batch=1, promise=None)
    >>> report = PruningReport(0.98, 0.97, lost=9, gained=3, n_samples=600, **sizes)
    >>> report.accuracy_drop, [round(end, 4) for end in report.drop_interval]
    (0.01, [-0.0016, 0.0239])
    """

    base_accuracy: float
    accuracy: float
    lost: int
    gained: int
    n_samples: int
    base_macs: float
    macs: float
    base_parameters: int
    parameters: int
    base_bytes: int
    bytes: int
    latency: Latency | None
    latency_batch: int
    promise: Promise | None
    distilled_epochs: int = field(default=0, kw_only=True)

    kind: ClassVar[str] = "pruned"

    @property
    def accuracy_drop(self) -> float:
        """Accuracy lost on these samples, as a share."""
        return (self.lost - self.gained) / self.n_samples

    @property
    def drop_interval(self) -> tuple[float, float]:
        """Interval of the accuracy lost that covers 95 % (`sinfkit.promise.drop_interval`)."""
        return drop_interval(self.lost, self.gained, self.n_samples)

    @property
    def kept(self) -> bool | None:
        """Whether no more was lost on these samples than asked for; None where nothing was."""
        return None if self.promise is None else self.accuracy_drop <= self.promise.limit + 1e-12

    @property
    def speedup(self) -> float:
        """How many times as fast as the base: median of the paired ratios; nan without times."""
        return nan if self.latency is None else 1 / self.latency.ratio("result", "base")

    @property
    def speedup_interval(self) -> tuple[float, float]:
        """Interval of `speedup` that covers 95 %, from the ranks of the paired ratios."""
        if self.latency is None:
            return nan, nan
        ratios = np.sort(self.latency.seconds["base"] / self.latency.seconds["result"])
        rank = max(int(stats.binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
        return float(ratios[rank]), float(ratios[-1 - rank])

    @property
    def time_saved(self) -> float:
        """Share of the base's time that is saved; nan without times."""
        return 1 - 1 / self.speedup

    def to_dict(self) -> dict[str, Any]:
        """Return the overall figures, for a data frame or a CSV file."""
        found = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("latency", "promise", "clusters", "names")
        }
        low, high = self.drop_interval
        return found | {
            "accuracy_drop": self.accuracy_drop,
            "accuracy_drop_low": low,
            "accuracy_drop_high": high,
            "kept": self.kept,
            "speedup": self.speedup,
            "time_saved": self.time_saved,
        }

    def plot(self) -> Any:
        """Draw accuracy (with the interval that covers 95 %), time and size beside each other.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from matplotlib import pyplot as plt  # slow to import, and seldom needed

        names, colours = ["base", self.kind], ["0.6", "tab:blue"]
        figure, axes = plt.subplots(1, 3, figsize=(9, 2.2), sharey=True, layout="constrained")
        for row, share in enumerate((self.base_accuracy, self.accuracy)):
            low, high = (100 * end for end in _share_interval(share, self.n_samples))
            axes[0].plot([low, high], [row, row], color=colours[row], lw=2)
            axes[0].plot(100 * share, row, "o", color=colours[row], ms=8)
            axes[0].annotate(
                f"{share:.1%}", (100 * share, row), (0, 8), textcoords="offset points", ha="center"
            )
        axes[0].set_xlabel(f"accuracy, % ({self.n_samples} samples)")
        bars = [("size, MB", (self.base_bytes / 1e6, self.bytes / 1e6))]
        if self.latency is not None:
            median = self.latency.median
            times = (1e3 * median["base"], 1e3 * median["result"])
            bars.insert(0, (f"time, ms per batch of {self.latency_batch}", times))
            for row, name in enumerate(("base", "result")):  # the middle half of the runs
                ends = [1e3 * end for end in self.latency.quartiles[name]]
                axes[1].plot(ends, [row, row], color="black", lw=1)
        else:
            macs = (self.base_macs / 1e6, self.macs / 1e6)
            bars.insert(0, ("multiplications per sample, millions", macs))
        for axis, (label, values) in zip(axes[1:], bars, strict=True):
            drawn = axis.barh(names, values, color=colours, height=0.55)
            axis.bar_label(drawn, fmt="{:.3g}", label_type="center", color="white")
            axis.set_xlabel(label)
        axes[0].set_yticks([0, 1], names)
        axes[0].set_ylim(1.6, -0.6)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        return figure

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Lines of the table: what, of the base, of the result, and how they compare."""
        low, high = (100 * end for end in self.drop_interval)
        change = f"{100 * self.accuracy_drop:.1f} [{low:.1f}, {high:.1f}] points lost"
        if self.accuracy_drop < 0:
            change = f"{-100 * self.accuracy_drop:.1f} [{-high:.1f}, {-low:.1f}] points gained"
        rows = [
            ("accuracy", f"{self.base_accuracy:.1%}", f"{self.accuracy:.1%}", change),
            (
                "  interval that covers 95 %",
                _ends(_share_interval(self.base_accuracy, self.n_samples)),
                _ends(_share_interval(self.accuracy, self.n_samples)),
                "",
            ),
        ]
        if self.latency is not None:
            median = self.latency.median
            low, high = self.speedup_interval
            base, result = (f"{1e3 * median[name]:.3g}" for name in ("base", "result"))
            compared = f"{self.speedup:.2f} [{low:.2f}, {high:.2f}] times as fast"
            rows.append((f"ms per batch of {self.latency_batch}", base, result, compared))
        return [*rows, *self._sizes()]

    def _sizes(self) -> list[tuple[str, str, str, str]]:
        """Rows of what both networks compute and hold."""
        return [
            _size("multiplications per sample", self.base_macs, self.macs),
            _size("parameters", self.base_parameters, self.parameters),
            _size("bytes", self.base_bytes, self.bytes),
        ]

    def remarks(self) -> list[str]:
        """Sentences below the table: the promise, and whatever is out of the ordinary."""
        remarks = [f"{self.n_samples} samples."]
        if self.promise is not None:
            low, high = (100 * end for end in self.drop_interval)
            seen = f"seen here: {100 * self.accuracy_drop:.1f} [{low:.1f}, {high:.1f}]"
            verdict = "kept" if self.kept else "EXCEEDED"
            if not self.kept and low <= 100 * self.promise.limit:
                verdict += ", within what so few samples can tell"
            remarks.append(f"{self.promise}; {seen}: {verdict}.")
        if self.distilled_epochs:
            n = self.distilled_epochs
            remarks.append(f"Trained for {n} epochs towards the base's answers, without labels.")
        if self.macs >= self.base_macs:
            remarks.append("It multiplies as often as the base or more: nothing was gained.")
        return remarks

    def __str__(self) -> str:
        rows = [("", "base", self.kind, ""), *self.rows()]
        wide = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{name:{wide[0]}}  {base:>{wide[1]}}  {found:>{wide[2]}}  {compared}".rstrip()
            for name, base, found, compared in rows
        ]
        return "\n".join([*lines, "", *self.remarks()])

    def _repr_html_(self) -> str:
        body = "".join(_html_row("td", row) for row in self.rows())
        remarks = "".join(f"<p>{escape(line)}</p>" for line in self.remarks())
        head = _html_row("th", ("", "base", self.kind, ""))
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>{remarks}"


@dataclass(frozen=True)
class SINFReport(PruningReport):
    """Base network and routed network side by side; ``print`` it, or let a notebook show it.

    Attributes
    ----------
    base_accuracy, accuracy, lost, gained, n_samples, base_macs, macs, base_parameters, parameters
        As in `PruningReport`, which has ``base_bytes``, ``bytes``, ``latency``, ``latency_batch``,
        ``promise`` and ``distilled_epochs`` as well.
    oracle_accuracy : float
        Of SINF if every sample were sent to its true cluster.
    route_accuracy : float
        Share of samples that the route predictor sends to the right cluster.
    base_route_accuracy : float
        Share of samples whose cluster the base's own answer implies.
    exit_share, alone_share, subgraph_share, fallback_share : float
        Shares of samples that leave at the route predictor; whose cluster needs no subgraph; that
        run one subgraph; and that take the fallback.
    fallback : str
    active_parameters : float
        Parameters that a sample passes, on average.
    route_layer : str
    clusters : list of ClusterRow

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import DCSPruner, SINFClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> clf = SINFClassifier(pruner=DCSPruner(budget=0.6), random_state=0).fit(X[:600], y[:600])
    >>> report = clf.report(X[600:800], y[600:800], repeats=0)
    >>> report.macs < report.base_macs
    True
    >>> report.to_dict()["n_samples"]
    200
    """

    oracle_accuracy: float
    route_accuracy: float
    base_route_accuracy: float
    exit_share: float
    alone_share: float
    subgraph_share: float
    fallback_share: float
    fallback: str
    active_parameters: float
    route_layer: str
    clusters: list[ClusterRow]

    kind: ClassVar[str] = "SINF"

    def _sizes(self) -> list[tuple[str, str, str, str]]:
        macs, held, size = super()._sizes()
        used = _size("parameters used per sample", self.base_parameters, self.active_parameters)
        return [macs, used, ("parameters held", *held[1:]), ("bytes held", *size[1:])]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Lines of the table: what, of the base, of the result, and how they compare."""
        rows = super().rows()
        if len(self.clusters) > 1:
            base, sinf = f"{self.base_route_accuracy:.1%}", f"{self.route_accuracy:.1%}"
            rows.append(("cluster predicted", base, sinf, ""))
            rows.append(
                ("accuracy if every route were right", "", f"{self.oracle_accuracy:.1%}", "")
            )
        return rows

    def remarks(self) -> list[str]:
        """Sentences below the table: which way samples took, and what is out of the ordinary."""
        ways = (
            (self.exit_share, "leave at the router"),
            (self.alone_share, "need no subgraph"),
            (self.subgraph_share, "run one subgraph"),
            (self.fallback_share, _FALLBACK_WAYS.get(self.fallback, "take the fallback")),
        )
        taken = ", ".join(f"{share:.1%} {way}" for share, way in ways if share > 0)
        remarks = [*super().remarks(), f"Of all samples {taken}."]
        if self.exit_share > _NEARLY_ALL:
            remarks.append(
                f"Nearly all samples leave at layer {self.route_layer!r}: for these data a linear "
                "probe on it is enough."
            )
        if self.fallback_share > _NEARLY_ALL and self.fallback == "base":
            remarks.append(
                "Nearly all samples run the base network: nothing is saved. A larger "
                "max_accuracy_drop, or fewer clusters, let more of them through the subgraphs."
            )
        if len(self.clusters) == 1:
            remarks.append("One cluster: nothing is routed; it is one smaller network.")
        return remarks

    def __str__(self) -> str:
        text = super().__str__()
        return "\n".join([text, "", *_per_cluster(self)]) if len(self.clusters) > 1 else text


def _size(name: str, base: float, found: float) -> tuple[str, str, str, str]:
    """A row of the table for something of which less is better."""
    compared = f"{base / found:.2f}x fewer" if found < base else f"{found / base:.2f}x as many"
    return name, _short(base), _short(found), compared


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _share_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share, which covers 95 %."""
    z = 1.959964
    middle, spread = (
        share + z**2 / (2 * n),
        z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5,
    )
    return (middle - spread) / (1 + z**2 / n), (middle + spread) / (1 + z**2 / n)


def _ends(interval: tuple[float, float]) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _html_row(cell: str, row: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in row) + "</tr>"


def _per_cluster(r: SINFReport) -> list[str]:
    """Lines of the table of clusters."""
    width = max([7, *(len(str(row.name)) for row in r.clusters)]) + 2
    head = ("classes", "samples", "base", "restricted", "subgraph", "SINF", "routed", "MACs")
    lines = [f"{'cluster':{width}}" + "".join(f"{h:>11}" for h in head)]
    for row in r.clusters:
        figures = (row.base, row.restricted, row.subgraph, row.routed, row.route)
        lines.append(
            f"{row.name!s:{width}}{row.n_classes:>11}{row.n_samples:>11}"
            + "".join(f"{'-' if np.isnan(f) else f'{f:.1%}':>11}" for f in figures)
            + f"{_short(row.macs):>11}"
        )
    lines += [
        "base: all classes open; restricted: the unpruned base answering with the cluster's own",
        "classes only (the control of 'subgraph'); SINF: as it predicts; routed: sent to the right",
        "cluster",
    ]
    return lines


def _short(n: float) -> str:
    """1.5M for 1,500,000."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.2f}{suffix}"
    return f"{n:.0f}"

"""What may be promised about the accuracy lost, from how many images, and with which confidence.

One image that certifies says one of three things: base and result agree in being right or wrong,
only the base is right (`lost`), or only the result is (`gained`). With ``p10`` and ``p01`` the
shares of the last two among all images of the distribution, the accuracy lost is ``p10 - p01``.
Everything here works on these counts, which must come from images that chose nothing.

Cross-fitting is left out on purpose. Choosing on K - 1 parts and certifying on the other makes
every image certify, but what it certifies is the mean loss of K networks, none of which is kept:
the one that is refitted on all images, and the exit that goes with it, is another network. A
bound for it would need that refitting on more images cannot lose more, which is not true in
general, and a bound for the mean of K results says nothing about the worst of them. Keeping the K
networks and drawing one at random for each image would be covered; it would cost K times the size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

__all__ = [
    "Certificate",
    "Discordant",
    "certify",
    "count_discordant",
    "drop_interval",
    "drop_upper_bound",
    "fixed_sequence",
    "images_needed",
    "p_value",
]

# Share of the error that goes to bounding the nuisance: small enough to cost nothing (216 images
# without a discordant pair give 1.061 points for 1.060), large enough to keep the search short.
NUISANCE_SHARE = 1e-3
# Points of the nuisance are a fifth of a standard error apart.
STEP = 0.1
# Below this a term of the sum is left out, and counted against the result.
NEGLIGIBLE = 1e-13
# Above this many images the normal approximation says how many are needed.
EXACT_UP_TO = 50_000
# To ask for more images than this helps nobody.
_MOST = 1_000_000


class Discordant(NamedTuple):
    """Counts of the images on which base and result differ.

    Attributes
    ----------
    lost : int
        Images that only the base has right.
    gained : int
        Images that only the result has right.
    n_images : int
        All images, discordant or not.
    """

    lost: int
    gained: int
    n_images: int


@dataclass(frozen=True)
class Certificate:
    """What was asked, what the images show, and whether that is enough.

    Attributes
    ----------
    limit : float
        Largest accuracy drop asked for, as a share (0.01 is one point).
    confidence : float
        Probability with which a certified drop holds, over the draw of the images.
    n_images : int
        Images that certified.
    lost, gained : int
        Those that only the base, and only the result, has right.
    bound : float
        The accuracy drop is at most this with probability `confidence`.
    certified : bool
        Whether `bound` is within `limit`.
    images_needed : int or None
        About how many images would certify, were the shares of lost and gained images those seen
        here. None: no number that one could have would, since the drop seen is not below the
        limit, or hardly.

    See Also
    --------
    certify : One from counts.

    Examples
    --------
    >>> from sinfkit.promise import certify
    >>> print(certify(lost=1, gained=0, n=500, limit=0.01))
    asked at most 1.0, certified 0.8 (90 %)
    >>> print(certify(lost=1, gained=0, n=200, limit=0.01))
    asked at most 1.0, not certified: 2.0 (90 %) on 200 images, about 926 would do
    """

    limit: float
    confidence: float
    n_images: int
    lost: int
    gained: int
    bound: float
    certified: bool
    images_needed: int | None

    @property
    def drop(self) -> float:
        """Accuracy lost on these images, as a share; nan without images."""
        return (self.lost - self.gained) / self.n_images if self.n_images else math.nan

    def __str__(self) -> str:
        asked = f"asked at most {100 * self.limit:.1f}"
        # Rounded up: what is printed holds as well.
        found = (
            f"{math.ceil(1000 * self.bound - 1e-6) / 10 + 0.0:.1f} ({100 * self.confidence:g} %)"
        )
        if self.certified:
            return f"{asked}, certified {found}"
        more = (
            f"no number would do while the drop seen is {100 * self.drop:.1f}"
            if self.images_needed is None
            else f"about {self.images_needed} would do"
        )
        return f"{asked}, not certified: {found} on {self.n_images} images, {more}"


def count_discordant(
    base_right: npt.ArrayLike,
    right: npt.ArrayLike,
    sample_weight: npt.ArrayLike | None = None,
) -> Discordant:
    """Count the images on which base and result differ.

    Parameters
    ----------
    base_right, right : array-like of bool, shape (n_images,)
        Whether base and result have each image right.
    sample_weight : array-like of float, shape (n_images,), default=None
        Non-negative weights. None: every image counts once.

    Returns
    -------
    Discordant
        `lost`, `gained` and `n_images`.

    Raises
    ------
    ValueError
        If the shapes differ, or a weight is negative or not finite.

    Notes
    -----
    Weights say what the promise is about (the weighted mean loss); they do not make images. An
    image of weight 3 is one draw, not three, so the image with the largest weight counts as one
    and every other as its share of that: equal weights of any size are the same as none, and a
    weight of zero leaves the image out. This is what keeping each image with probability
    ``weight / largest weight`` gives on average, and so kept are images drawn from the weighted
    distribution; the fractions left over are rounded to the careful side. Weights far apart leave
    few images, which is the price of a bound that holds for small counts.

    Examples
    --------
    >>> from sinfkit.promise import count_discordant
    >>> count_discordant([1, 1, 0, 1], [1, 0, 1, 0])
    Discordant(lost=2, gained=1, n_images=4)
    >>> count_discordant([1, 1, 0, 1], [1, 0, 1, 0], sample_weight=[2, 2, 2, 0])
    Discordant(lost=1, gained=1, n_images=3)
    """
    base, ours = np.asarray(base_right, dtype=bool), np.asarray(right, dtype=bool)
    weight = np.ones(base.shape) if sample_weight is None else np.asarray(sample_weight, float)
    if base.ndim != 1 or base.shape != ours.shape or base.shape != weight.shape:
        raise ValueError(
            "base_right, right and sample_weight must have one entry for each image: "
            f"got shapes {base.shape}, {ours.shape} and {weight.shape}"
        )
    if not np.all(np.isfinite(weight)) or np.any(weight < 0):
        raise ValueError("sample_weight must be finite and not negative")
    largest = weight.max(initial=0.0)
    if largest > 0:
        weight = weight / largest
    n = math.floor(weight.sum() + 1e-9)
    lost = min(n, math.ceil(weight[base & ~ours].sum() - 1e-9))
    gained = min(n - lost, math.floor(weight[~base & ours].sum() + 1e-9))
    return Discordant(lost, gained, n)


def p_value(lost: int, gained: int, n: int, limit: float, confidence: float = 0.9) -> float:
    """P-value of "the accuracy drop is at least `limit`", exact at every number of images.

    Parameters
    ----------
    lost, gained : int
        Images that only the base, and only the result, has right.
    n : int
        All images, drawn independently; they must have chosen nothing.
    limit : float
        Accuracy drop to refute, as a share in [-1, 1].
    confidence : float, default=0.9
        The confidence at which the test has the most power. The p-value is valid at every level;
        compare it with ``1 - confidence``.

    Returns
    -------
    float
        In [0, 1]. `drop_upper_bound` is where it crosses ``1 - confidence``.

    Raises
    ------
    ValueError
        If the counts do not fit each other, or a share is out of its range.

    Notes
    -----
    The number of discordant images ``m`` is binomial with probability ``q = p10 + p01``, and of
    these the lost ones are binomial with probability ``(q + drop) / (2 q)``. Outcomes are ordered
    by an approximate upper limit of the drop (a normal limit with its terms for skewness),

    ``T = d + z sqrt(m + 1.5) + (2 z**2 + 1) / 6 * d / (m + 1.5)``, with ``d = lost - gained``,

    which rises with `lost` at every ``m``. The p-value is the probability of an outcome ordered
    no higher than the one seen, at a drop of exactly `limit`, maximised over ``q``.

    Why it is valid: for each ``m`` such outcomes are those with at most so many lost, so at every
    fixed ``q`` their probability falls as the drop rises; the hypothesis "at least `limit`" has
    its maximum at `limit` [1]_. That is Buehler's construction, and it does not rest on the
    ordering, which decides only about power [2]_. The search over ``q`` is kept to an exact
    confidence interval of ``q``, whose error (1e-3 of ``1 - confidence``) is added [3]_.

    Without gained images it is the Clopper-Pearson bound of `lost`; where gains make up for
    losses it is far sharper. With 1,000 images and 2 % each of lost and gained, a drop of one
    point is refuted in 61 % of draws; from `lost` alone it never is.

    References
    ----------
    .. [1] C. J. Lloyd and M. V. Moldovan, "Exact one-sided confidence limits for the difference
       between two correlated proportions", Statistics in Medicine 26, 2007.
    .. [2] R. J. Buehler, "Confidence intervals for the product of two binomial parameters",
       Journal of the American Statistical Association 52, 1957.
    .. [3] R. L. Berger and D. D. Boos, "P values maximized over a confidence set for the nuisance
       parameter", Journal of the American Statistical Association 89, 1994.

    Examples
    --------
    >>> from sinfkit.promise import p_value
    >>> round(p_value(lost=0, gained=0, n=300, limit=0.01), 3)
    0.049
    >>> round(p_value(lost=20, gained=20, n=1000, limit=0.01), 3)
    0.068
    """
    check_counts(lost, gained, n)
    check_shares(limit, confidence)
    return exact_test(lost, gained, n, limit, confidence)


def drop_upper_bound(lost: int, gained: int, n: int, confidence: float = 0.9) -> float:
    """Upper confidence bound of the accuracy drop, exact at every number of images.

    Parameters
    ----------
    lost, gained : int
        Images that only the base, and only the result, has right.
    n : int
        All images, drawn independently; they must have chosen nothing.
    confidence : float, default=0.9
        Probability, over the draw of the images, that the drop is at most the bound.

    Returns
    -------
    float
        In [-1, 1]; 1.0 without images. Below zero where the result is surely better.

    Raises
    ------
    ValueError
        If the counts do not fit each other, or `confidence` is not in (0, 1).

    See Also
    --------
    p_value : The test that this bound inverts: construction, proof and sources.

    Examples
    --------
    216 images without a single disagreement resolve about one point:

    >>> from sinfkit.promise import drop_upper_bound
    >>> round(100 * drop_upper_bound(lost=0, gained=0, n=216), 2)
    1.06
    >>> round(100 * drop_upper_bound(lost=20, gained=20, n=1000), 2)
    0.83
    """
    check_counts(lost, gained, n)
    check_shares(0.0, confidence)
    if not n:
        return 1.0

    def excess(drop: float) -> float:
        return exact_test(lost, gained, n, drop, confidence) - (1 - confidence)

    if excess(1.0) > 0:
        return 1.0
    # The p-value falls with the drop: a bracket that is near keeps the search short.
    seen = (lost - gained) / n
    width = 2 * (math.sqrt(lost + gained) + 2) / n
    low, high = seen, min(1.0, seen + width)
    while excess(high) > 0:
        low, high = high, min(1.0, high + 2 * width)
    while excess(low) <= 0 and low > -1:
        low, high = max(-1.0, low - width), low
    return float(optimize.brentq(excess, low, high, xtol=1e-8)) if excess(low) > 0 else -1.0


def certify(lost: int, gained: int, n: int, limit: float, confidence: float = 0.9) -> Certificate:
    """Say whether the images show that one result loses at most `limit`.

    Parameters
    ----------
    lost, gained : int
        Images that only the base, and only the result, has right.
    n : int
        All images, drawn independently; they must not have chosen the result. Of several results
        tried on the same images `fixed_sequence` keeps the promise, not this.
    limit : float
        Largest accuracy drop allowed, as a share in [-1, 1].
    confidence : float, default=0.9
        Probability, over the draw of the images, with which a certified drop holds.

    Returns
    -------
    Certificate
        Bound and answer.

    Raises
    ------
    ValueError
        If the counts do not fit each other, or a share is out of its range.

    Examples
    --------
    >>> from sinfkit.promise import certify
    >>> certify(lost=2, gained=3, n=400, limit=0.01).certified
    True
    """
    certified = p_value(lost, gained, n, limit, confidence) <= 1 - confidence
    bound = drop_upper_bound(lost, gained, n, confidence)
    # Root finding stops short of the last digit; the two answers stay one.
    bound = min(bound, limit) if certified else max(bound, math.nextafter(limit, 2))
    rates = (lost / n, gained / n) if n else (0.0, 0.0)
    needed = images_needed(limit, confidence, *rates)
    if needed is not None and needed > _MOST:
        needed = None
    return Certificate(limit, confidence, n, lost, gained, bound, certified, needed)


def fixed_sequence(
    candidates: Iterable[tuple[int, int, int]], limit: float, confidence: float = 0.9
) -> tuple[int | None, Certificate | None]:
    """Go from careful to bold while each result is certified; stop at the first that is not.

    Trying many results on the same images does not spend the promise many times: the first result
    that loses too much has to be passed for any error at all, and passing it has probability
    ``1 - confidence`` at most [1]_.

    Parameters
    ----------
    candidates : iterable of tuple (lost, gained, n)
        Counts of each result, careful first. The order must not come from the images counted.
        Taken one at a time, so that a generator need not build what is never reached.
    limit : float
        Largest accuracy drop allowed, as a share in [-1, 1].
    confidence : float, default=0.9
        Probability, over the draw of the images, that the result returned keeps `limit`.

    Returns
    -------
    index : int or None
        The last one certified. None: not even the first.
    certificate : Certificate or None
        That of the result returned, or else of the first one tried. Its `bound` is the result's own
        where the walk came to its end. Where it stopped at a bolder one, what holds with
        probability `confidence` is `limit` itself, and so `bound` is `limit`. None: no candidates.

    Raises
    ------
    ValueError
        If counts do not fit each other, or a share is out of its range.

    References
    ----------
    .. [1] A. N. Angelopoulos, S. Bates, E. J. Candes, M. I. Jordan and L. Lei, "Learn then Test:
       calibrating predictive algorithms to achieve risk control", arXiv:2110.01052.
    .. [2] J. C. Hsu and R. L. Berger, "Stepwise confidence intervals without multiplicity
       adjustment for dose-response and toxicity studies", Journal of the American Statistical
       Association 94, 1999 (the bound at the end of the walk).

    Examples
    --------
    >>> from sinfkit.promise import fixed_sequence
    >>> index, certificate = fixed_sequence([(0, 0, 500), (2, 1, 500), (9, 2, 500)], 0.01)
    >>> index
    1
    >>> print(certificate)
    asked at most 1.0, certified 1.0 (90 %)
    """
    last: tuple[int, int, int] | None = None
    index = -1
    for index, counts in enumerate(candidates):
        if p_value(*counts, limit, confidence) > 1 - confidence:
            if last is None:
                return None, certify(*counts, limit, confidence)
            return index - 1, replace(certify(*last, limit, confidence), bound=limit)
        last = counts
    return (None, None) if last is None else (index, certify(*last, limit, confidence))


def images_needed(
    limit: float, confidence: float = 0.9, rate_lost: float = 0.0, rate_gained: float = 0.0
) -> int | None:
    """About how many images would certify a limit.

    Parameters
    ----------
    limit : float
        Largest accuracy drop allowed, as a share in [-1, 1].
    confidence : float, default=0.9
        Probability with which it is to hold.
    rate_lost, rate_gained : float, default=0.0
        Shares of images that only the base, and only the result, has right.

    Returns
    -------
    int or None
        The fewest whose expected counts certify (in about half of all draws they will); exact
        without discordant images. None: no number would do.

    Raises
    ------
    ValueError
        If a share is out of its range.

    Examples
    --------
    >>> from sinfkit.promise import images_needed
    >>> images_needed(0.01)
    230
    >>> images_needed(0.01, rate_lost=0.008, rate_gained=0.004)
    1054
    """
    check_shares(limit, confidence)
    drop, discordant = rate_lost - rate_gained, rate_lost + rate_gained
    if not (rate_lost >= 0 and rate_gained >= 0 and discordant <= 1):
        raise ValueError("rate_lost and rate_gained must be shares that add up to at most 1")
    if drop > limit - 1e-12:  # 0.03 - 0.02 is a little less than 0.01
        return None
    z = stats.norm.ppf(confidence)
    rough = math.ceil(z**2 * (discordant - drop**2) / (limit - drop) ** 2)
    if rough > EXACT_UP_TO:
        return rough

    def certifies(n: int) -> bool:
        lost = min(n, math.ceil(n * rate_lost - 1e-9))
        gained = min(n - lost, math.floor(n * rate_gained + 1e-9))
        return exact_test(lost, gained, n, limit, confidence) <= 1 - confidence

    low, high = 0, max(rough, 1)
    while not certifies(high):
        low, high = high, 2 * high
        if high > 2**40:
            return None
    # Close enough for "about"; to the last image where nothing is discordant.
    while high - low > max(1, high * discordant // 2):
        middle = (low + high) // 2
        low, high = (low, middle) if certifies(middle) else (middle, high)
    return high


def drop_interval(lost: int, gained: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of the accuracy drop, for reports: Tango's score interval.

    An approximation that is good from a few dozen images on; a promise takes `drop_upper_bound`.

    Parameters
    ----------
    lost, gained : int
        Images that only the base, and only the result, has right.
    n : int
        All images.
    confidence : float, default=0.95
        Share of intervals that cover the drop.

    Returns
    -------
    tuple of two floats
        Lower and upper end, in [-1, 1]; (-1, 1) without images.

    Raises
    ------
    ValueError
        If the counts do not fit each other, or `confidence` is not in (0, 1).

    References
    ----------
    .. [1] T. Tango, "Equivalence test and confidence interval for the difference in proportions
       for the paired-sample design", Statistics in Medicine 17, 1998.

    Examples
    --------
    >>> from sinfkit.promise import drop_interval
    >>> [round(100 * end, 2) for end in drop_interval(lost=9, gained=3, n=1000)]
    [-0.09, 1.44]
    """
    check_counts(lost, gained, n)
    check_shares(0.0, confidence)
    if not n:
        return -1.0, 1.0
    z = stats.norm.isf((1 - confidence) / 2)
    seen = (lost - gained) / n

    def score(drop: float) -> float:
        # The share gained that is likeliest at this drop, in closed form.
        b = -lost - gained + (2 * n - lost + gained) * drop
        c = -gained * drop * (1 - drop)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + drop * (1 - drop))
        gap = lost - gained - n * drop
        return abs(gap) - z * math.sqrt(max(variance, 0.0))

    def end(limit: float) -> float:
        # Where the score leaves the interval, between what is seen and the edge. What is seen has
        # score zero even where no image is discordant, so the search starts beside it.
        start = seen + 1e-9 * (limit - seen)
        if abs(limit - seen) < 1e-9 or score(limit) <= 0:
            return limit
        return float(optimize.brentq(score, start, limit, xtol=1e-10))

    return end(-1.0), end(1.0)


def exact_test(lost: int, gained: int, n: int, drop: float, confidence: float) -> float:
    """P-value of "the accuracy drop is at least `drop`"; see `p_value`."""
    if not n:
        return 1.0
    z = stats.norm.ppf(confidence)
    m = lost + gained
    error = NUISANCE_SHARE * (1 - confidence)
    low = float(special.betaincinv(m, n - m + 1, error / 2)) if m else 0.0
    high = float(special.betaincinv(m + 1, n - m, 1 - error / 2)) if m < n else 1.0
    low = max(low, drop)
    if low > high:
        # So many discordant images as this drop needs are out of the question.
        return error
    # In this scale the standard error of a share is the same everywhere.
    start, stop = np.arcsin(np.sqrt([low, high]))
    points = 2 + math.ceil((stop - start) * math.sqrt(n) / STEP)
    q = np.sin(np.linspace(start, stop, points)) ** 2
    q[0] = low

    first = max(0, math.floor(n * low - 7.5 * math.sqrt(n * low)))
    final = min(n, math.ceil(n * high + 7.5 * math.sqrt(n * high) + 25))
    ms = np.arange(first, final + 1)
    skew = 1 + (2 * z**2 + 1) / 6 / (ms + 1.5)
    spread = z * np.sqrt(ms + 1.5)
    ordered = (lost - gained) * skew[m - first] + spread[m - first]
    at_most = np.floor((ms + (ordered - spread) / skew) / 2 + 1e-9)
    weight = binomial_pmf(ms, n, q[:, None])
    rows, columns = np.nonzero(weight > NEGLIGIBLE)
    share = np.clip((q + drop) / np.maximum(2 * q, 1e-300), 0.0, 1.0)
    beyond = binomial_sf(at_most[columns], ms[columns], share[rows])
    # From the other side, so that terms left out count against the result.
    refuting = np.bincount(rows, weight[rows, columns] * beyond, minlength=len(q))
    return float(min(1.0, 1 - refuting.min() + error))


def binomial_pmf(k: npt.NDArray, n: int, p: npt.NDArray) -> npt.NDArray[np.float64]:
    """Probability of `k` in `n`; broadcasts."""
    log = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return np.exp(log + special.xlogy(k, p) + special.xlog1py(n - k, -p))


def binomial_sf(k: npt.NDArray, n: npt.NDArray, p: npt.NDArray) -> npt.NDArray[np.float64]:
    """Probability of more than `k` in `n`, with 1 below zero and 0 from `n` on; equal shapes."""
    inside = (k >= 0) & (k < n)
    tail = special.betainc(np.where(inside, k + 1, 1), np.where(inside, n - k, 1), p)
    return np.where(inside, tail, np.where(k < 0, 1.0, 0.0))


def check_counts(lost: int, gained: int, n: int) -> None:
    """Refuse counts that do not fit each other."""
    if not (lost >= 0 and gained >= 0 and lost + gained <= n):
        raise ValueError(
            f"lost and gained must be counts that add up to at most n: got {lost}, {gained}, {n}"
        )


def check_shares(limit: float, confidence: float) -> None:
    """Refuse a limit or a confidence that is no share."""
    if not -1 <= limit <= 1:
        raise ValueError(f"limit must be a share in [-1, 1] (0.01 is one point): got {limit}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1): got {confidence}")

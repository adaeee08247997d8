"""Is the promise kept where the true loss is known? Thousands of draws of images, no network.

A family of results goes from careful to bold; each loses and gains images with known
probabilities. In every draw some images choose (the grid of thresholds, the networks worth trying)
and others certify. The promise: in at most 1 - confidence of the draws is a result certified that
truly loses the limit or more. Four families:

single    one result whose true loss is exactly the limit: the hardest case of the test
plateau   results whose loss rises to exactly the limit and stays: the hardest case of the walk
exits     thresholds of an early exit, at quantiles of the choosing images
networks  twelve networks, not sorted by loss; those beaten on the choosing images are left out

    python -m benchmarks promise --draws 10000

"raw" is the boldest whose raw mean on the same images meets the limit; "best", on all images.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from scipy import stats

from sinfkit.promise import p_value

RESULTS = Path(__file__).parent / "results"
SIZES = (100, 200, 300, 500, 1000, 2000, 5000)
RATES = (0.01, 0.03, 0.08)
FAMILIES = ("single", "plateau", "exits", "networks")


class Certifies:
    """Whether counts certify, looked up: the most lost images for each number of discordant."""

    def __init__(self, n, limit, confidence):
        self.test = lambda lost, m: p_value(lost, m - lost, n, limit, confidence) <= 1 - confidence
        self.most = [0 if self.test(0, 0) else -1]

    def __call__(self, lost, gained):
        """Whether each pair of counts certifies."""
        while len(self.most) <= (lost + gained).max():
            m, k = len(self.most), self.most[-1]
            while k < m and self.test(k + 1, m):
                k += 1
            while k >= 0 and not self.test(k, m):
                k -= 1
            self.most.append(k)
        return lost <= np.asarray(self.most)[lost + gained]


def draw_counts(rng, n, lost, gained):
    """Counts for shares (draws, results): an image lost by one result is lost by the worse ones."""
    order = np.argsort(lost, axis=1, kind="stable")
    steps = np.concatenate(
        [np.diff(np.take_along_axis(lost, order, 1), prepend=0.0), np.diff(gained, prepend=0.0)], 1
    )
    counts = rng.multinomial(n, np.concatenate([steps, 1 - steps.sum(1, keepdims=True)], 1))
    k = lost.shape[1]
    n_lost = counts[:, :k].cumsum(1)
    return np.take_along_axis(n_lost, np.argsort(order, 1), 1), counts[:, k:-1].cumsum(1)


def family(name, rng, draws, n, limit, rate):
    """Shares lost and gained, speed-up, and what is walked, each (draws, results)."""
    if name == "single":
        drop, level = np.array([limit]), np.array([1.0])
    elif name == "plateau":
        drop, level = limit * np.minimum(np.arange(1, 13) / 5, 1), np.linspace(0.5, 1, 12)
    elif name == "exits":
        # Thresholds at quantiles of n choosing images; the j-th lets about j / 24 leave.
        leave = np.sort(rng.uniform(size=(draws, n)), axis=1)
        level = leave[:, np.arange(1, 24) * n // 24]
        drop = 4 * limit * level**3
    else:
        level = np.arange(1, 13) / 12
        drop = 3 * limit * level**2 * rng.uniform(0.6, 1.4, size=(draws, 12))
    drop, level = (np.broadcast_to(a, (draws, a.shape[-1])) for a in (drop, level))
    gained = max(rate - limit, 0) / 2 * level
    walk = np.ones(drop.shape, bool)
    if name == "networks":
        chosen = np.subtract(*draw_counts(rng, n, gained + drop, gained))
        best_bolder = np.minimum.accumulate(chosen[:, ::-1], axis=1)[:, ::-1]
        walk = chosen <= best_bolder
    return gained + drop, gained, 1 / (1 - 0.85 * level), walk


def simulate(name, n, rate, draws, limit, confidence, certifies, rng):
    """One row of the table."""
    lost, gained, speed, walk = family(name, rng, draws, n, limit, rate)
    n_lost, n_gained = draw_counts(rng, n, lost, gained)
    too_much = lost - gained >= limit * (1 - 1e-9)
    rows = np.arange(draws)

    def boldest(passes):
        """The last that passes in each draw: whether there is one, is too bold, its speed-up."""
        index = np.where(passes, np.arange(lost.shape[1]), -1).max(1)
        found = index >= 0
        return found, found & too_much[rows, index], np.where(found, speed[rows, index], 1.0)

    certified = np.logical_and.accumulate(certifies(n_lost, n_gained) | ~walk, axis=1) & walk
    found, exceeds, certified_speed = boldest(certified)
    _, raw_exceeds, raw_speed = boldest(walk & (n_lost - n_gained <= limit * n))
    best_speed = boldest(~too_much)[2]
    row = {
        "family": name,
        "images": n,
        "discordant": max(rate, limit),
        "certified": found.mean(),
        "exceeds": exceeds.mean(),
        "allowed": stats.binom.isf(1e-3, draws, 1 - confidence) / draws,
        "of_certified": exceeds.sum() / max(1, found.sum()),
        "raw_exceeds": raw_exceeds.mean(),
        "speed": np.median(certified_speed),
        "raw_speed": np.median(raw_speed),
        "best_speed": np.median(best_speed),
    }
    return row | {"kept": bool(row["exceeds"] <= row["allowed"])}


def main(arguments=None):
    """Print and write the table; return its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=0.01)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, default=RESULTS / "promise_simulation.csv")
    options, rows = parser.parse_args(arguments), []
    for n in options.sizes:
        certifies = Certifies(n, options.limit, options.confidence)
        for rate, name in ((r, f) for r in RATES for f in FAMILIES):
            rng = np.random.default_rng([n, int(1e6 * rate), FAMILIES.index(name)])
            asked = (options.draws, options.limit, options.confidence)
            row = simulate(name, n, rate, *asked, certifies, rng)
            if not rows:
                print("".join(f"{key:>13}" for key in row))
            shown = (f"{v:.4f}" if isinstance(v, float) else v for v in row.values())
            print("".join(f"{value!s:>13}" for value in shown), flush=True)
            rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"the promise is kept in {sum(row['kept'] for row in rows)} of {len(rows)} rows")
    return rows


if __name__ == "__main__":
    main()

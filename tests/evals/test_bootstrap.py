import math

import numpy as np
import pytest

from sympow_jax.evals import bootstrap
from sympow_jax.evals.length_summary import gained_from_context


def draw(rng, num_clusters):
    """Clustered documents of unequal number and length; the true token-weighted mean loss is 2."""
    rows = rng.integers(1, 6, num_clusters)
    clusters = np.repeat(np.arange(num_clusters), rows)
    counts = rng.integers(100, 400, (len(clusters), 1))
    level = 2 + 0.4 * rng.standard_normal(num_clusters)[clusters] + 0.2 * rng.standard_normal(len(clusters))
    return counts * level[:, None], counts, clusters


def test_intervals_cover_the_known_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        sums, counts, clusters = draw(rng, 20)
        _, ci95 = bootstrap.mean_and_interval(sums, counts, clusters, seed=seed, num_resamples=500)
        covered += ci95[0, 0] <= 2 <= ci95[0, 1]
    assert 368 <= covered <= 392, covered  # 92% to 98% of 400 draws


def test_ignoring_clusters_would_not_cover():
    """The same draws with every row as its own source cover far less: the clusters matter."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        sums, counts, clusters = draw(rng, 20)
        rows = np.arange(len(clusters))
        _, ci95 = bootstrap.mean_and_interval(sums, counts, rows, seed=seed, num_resamples=500)
        covered += ci95[0, 0] <= 2 <= ci95[0, 1]
    assert covered < 270, covered


def test_paired_intervals_cover_the_known_difference():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(400):
        sums, counts, clusters = draw(rng, 30)
        other = sums + counts * (0.05 + 0.02 * rng.standard_normal(counts.shape))
        _, ci95 = bootstrap.difference_and_interval(
            (sums, counts), (other, counts), clusters, seed=seed, num_resamples=500
        )
        covered += ci95[0, 0] <= 0.05 <= ci95[0, 1]
        assert np.diff(ci95[0]) < 0.05
    assert 368 <= covered <= 392, covered  # 92% to 98% of 400 draws


@pytest.mark.slow
def test_intervals_of_what_is_gained_from_context_cover_it():
    """True losses 3, 2 and 1.99 at 32, 512 and 4,096 tokens; what is hard in a document is so under every context."""
    rng, covered, draws = np.random.default_rng(2), np.zeros(2), 1500
    gains, spread = np.array([0.0, -1.0, -1.01]), np.array([0.0, 0.3, 0.32])
    for seed in range(draws):
        sums, counts, clusters = draw(rng, 30)
        own = gains + spread * rng.standard_normal(30)[clusters][:, None] + 0.1 * rng.standard_normal((len(sums), 3))
        arrays = {"same_target_sums": sums + counts * own, "same_target_counts": np.tile(counts, 3)}
        arrays |= {"lengths": np.array([32, 512, 4096]), "clusters": clusters}
        found = gained_from_context(arrays, 512, seed=seed)
        covered += [row["ci95"][0] <= gain <= row["ci95"][1] for row, gain in zip(found, (1.0, 0.01), strict=True)]
    assert (0.93 * draws <= covered).all() and (covered <= 0.97 * draws).all(), covered / draws


def test_same_seed_same_interval_and_columns_share_draws():
    sums, counts, clusters = draw(np.random.default_rng(2), 10)
    wide = np.repeat(sums, 3, axis=1), np.repeat(counts, 3, axis=1)
    _, ci95 = bootstrap.mean_and_interval(*wide, clusters, seed=5)
    _, again = bootstrap.mean_and_interval(sums, counts, clusters, seed=5)
    np.testing.assert_array_equal(ci95, np.repeat(again, 3, axis=0))


def test_blocks_of_draws_do_not_change_the_result(monkeypatch):
    sums, counts, clusters = draw(np.random.default_rng(2), 10)
    _, whole = bootstrap.mean_and_interval(sums, counts, clusters)
    monkeypatch.setattr(bootstrap, "_BLOCK_ENTRIES", 1000)
    np.testing.assert_array_equal(bootstrap.mean_and_interval(sums, counts, clusters)[1], whole)


def test_empty_bins_and_single_sources_give_nan():
    sums, counts = np.asarray([[1.0, 0.0], [3.0, 0.0]]), np.asarray([[1, 0], [1, 0]])
    mean, ci95 = bootstrap.mean_and_interval(sums, counts, np.asarray([0, 0]))
    assert mean[0] == 2 and np.isnan(mean[1]) and np.isnan(ci95).all()


def test_intervals_are_the_percentiles_of_hesterbergs_formula():
    """The quantile of a normal distribution at -sqrt(n / (n - 1)) t(0.025, n - 1); n = 10: -2.26216 * sqrt(10 / 9)."""
    rng = np.random.default_rng(3)
    values, clusters = rng.normal(size=(10, 1)), np.arange(10)
    _, ci95 = bootstrap.mean_and_interval(values, np.ones((10, 1)), clusters, seed=4)
    weights = np.random.default_rng(4).multinomial(10, np.full(10, 0.1), size=2000)
    tail = 0.5 * math.erfc(2.2621571628 * math.sqrt(10 / 9) / math.sqrt(2))
    np.testing.assert_allclose(ci95[0], np.quantile(weights @ values[:, 0] / 10, [tail, 1 - tail]), rtol=1e-8)

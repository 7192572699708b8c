# SPDX-License-Identifier: Apache-2.0
"""Masked statistics and global weights against float64 NumPy; masked garbage is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.ops import masking
from jaxrlhf.ops.masking import WEIGHTS, fixed_length_weights, weighted_sum, whiten

GARBAGE = [np.nan, np.inf, -np.inf, 1e30, -1.0]


def rows(seed: int, shape=(4, 7)):
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 5, shape).astype(np.float32)
    mask = rng.random(shape) < 0.6
    mask[0, 0], mask[-1] = True, False  # something kept, and a row with nothing
    return x, mask


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), axis=st.sampled_from([None, 0, 1]))
def test_sum_and_mean_match_numpy(seed, axis):
    x, mask = rows(seed)
    ma = np.ma.array(x.astype(np.float64), mask=~mask)
    want_sum = np.where(mask, x, 0).astype(np.float64).sum(axis)
    got_sum = masking.masked_sum(jnp.asarray(x), jnp.asarray(mask), axis)
    np.testing.assert_allclose(got_sum, want_sum, rtol=1e-5, atol=1e-4)
    got = masking.masked_mean(jnp.asarray(x), jnp.asarray(mask), axis)
    np.testing.assert_allclose(got, np.ma.filled(ma.mean(axis), 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", GARBAGE)
def test_masked_garbage_changes_neither_value_nor_gradient(bad):
    x, mask = map(jnp.asarray, rows(1))
    weights = masking.token_weights(mask)
    functions = {
        "sum": lambda x: masking.masked_sum(x, mask),
        "mean": lambda x: masking.masked_mean(x, mask),
        "var": lambda x: masking.masked_var(x, mask),
        "whiten": lambda x: (whiten(x, mask) ** 3).sum(),
        "unshifted": lambda x: (whiten(x, mask, shift_mean=False) ** 3).sum(),
        "weighted": lambda x: weighted_sum(x, weights),
    }
    for name, f in functions.items():
        clean, dirty = jnp.where(mask, x, 0), jnp.where(mask, x, bad)
        for a, b in zip(jax.value_and_grad(f)(clean), jax.value_and_grad(f)(dirty), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert np.isfinite(b).all(), name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_whitening_gives_mean_0_and_variance_1(seed):
    x, mask = rows(seed)
    y = np.asarray(whiten(jnp.asarray(x), jnp.asarray(mask)), np.float64)
    want = x.astype(np.float64)
    want = (want - want[mask].mean()) / want[mask].std() if mask.sum() > 1 else 0 * want
    np.testing.assert_allclose(y[mask], want[mask], atol=1e-5)
    assert (y[~mask] == 0).all()
    assert abs(y[mask].mean()) < 1e-5


def test_whitening_without_the_shift_keeps_the_mean():
    x, mask = rows(3)
    got = whiten(jnp.asarray(x), jnp.asarray(mask), shift_mean=False)
    want = x[mask].astype(np.float64)
    want = (want - want.mean()) / want.std() + want.mean()
    np.testing.assert_allclose(np.asarray(got)[mask], want, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.7, -12345.678, 1e-20])
def test_whitening_a_constant_gives_0(value):
    x, mask = rows(2)
    assert (whiten(jnp.full_like(jnp.asarray(x), value), jnp.asarray(mask)) == 0).all()
    assert masking.masked_var(jnp.full_like(jnp.asarray(x), value), jnp.asarray(mask)) == 0


def test_nothing_masked_in_gives_zeros_not_nan():
    x, mask = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    assert masking.masked_mean(x, mask) == 0
    assert (whiten(x, mask) == 0).all()
    for name, weights in WEIGHTS.items():
        w = weights(mask, length=3) if name == "fixed_length" else weights(mask)
        assert (w == 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_weights_reproduce_the_three_means(seed):
    x, mask = rows(seed, (5, 6))
    x64, used = x.astype(np.float64), mask.any(1)
    row_means = [x64[i][mask[i]].mean() for i in range(5) if used[i]]
    want = {
        "token_mean": x64[mask].mean(),
        "sequence_mean": np.mean(row_means),
        "fixed_length": np.where(mask, x64, 0).sum() / (used.sum() * 9),
    }
    m = jnp.asarray(mask)
    for name, make in WEIGHTS.items():
        weights = make(m, length=9) if name == "fixed_length" else make(m)
        np.testing.assert_allclose(
            weighted_sum(jnp.asarray(x), weights), want[name], rtol=1e-5, atol=2e-6, err_msg=name
        )
        assert weights.dtype == jnp.float32


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_weighted_sums_of_the_parts_add_up_to_the_whole(name):
    x, mask = map(jnp.asarray, rows(6, (8, 5)))  # the last part is wholly masked
    weights = WEIGHTS[name](mask, length=5) if name == "fixed_length" else WEIGHTS[name](mask)
    parts = [weighted_sum(x[i : i + 1], weights[i : i + 1]) for i in range(8)]
    np.testing.assert_allclose(sum(parts), weighted_sum(x, weights), rtol=1e-6)


def test_a_length_of_zero_is_refused():
    with pytest.raises(ValueError, match="length = 0"):
        fixed_length_weights(jnp.ones((1, 1), bool), length=0)


def on_shards() -> list[list[float]]:
    """Whitened values, their weights' sums and a mean, of rows sharded over all devices."""
    x, mask = rows(11, (16, 7))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, mask = jax.device_put((x, mask), where)

    @jax.jit
    def everything(x, mask):
        parts = [masking.token_weights(mask), masking.sequence_weights(mask), whiten(x, mask)]
        return [*parts, whiten(x, mask, shift_mean=False)]

    return [np.asarray(part).ravel().tolist() for part in everything(x, mask)]


def test_statistics_over_shards_are_those_of_one_device():
    for sharded, alone in zip(run_on_devices(8, on_shards), on_shards(), strict=True):
        np.testing.assert_allclose(sharded, alone, atol=1e-5)

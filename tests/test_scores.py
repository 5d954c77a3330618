"Conformal factors, intervals and reliability for numbers of any size."
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import ndtr

from dip_uq.calibration import shortest_interval, z_std
from dip_uq.scores import conformal_factor, miscalibration, reliability

sizes = st.tuples(st.integers(1, 40), st.integers(1, 9))  # images, pixels of each
errors = sizes.flatmap(lambda shape: arrays(float, shape, elements=st.floats(-1e100, 1e100)))
levels = st.integers(1, 99).map(lambda hundredths: Fraction(hundredths, 100))


def factor(error, std, level): return conformal_factor(torch.from_numpy(error), std, float(level))


@settings(deadline=None)
@given(errors, levels, st.floats(1e-100, 1e100))
def test_conformal_factor_holds_enough_errors_and_no_more(error, level, size):
    m, n = error.shape
    std = torch.full((m, n), size, dtype=torch.float64)
    k = math.ceil(level * (m + 1) * n)  # exact, as the level is a fraction
    if k > m * n:
        with pytest.raises(ValueError, match=f"{m} images cannot promise .*; take {math.ceil(level / (1 - level))} or"):
            factor(error, std, level)
        return
    scores, q = torch.from_numpy(error).abs() / std, factor(error, std, level)
    assert int((scores <= q).sum()) >= k > int((scores < q).sum())


@settings(deadline=None)
@given(errors, st.integers(-300, 300))
def test_conformal_interval_does_not_depend_on_the_length_of_the_bars(error, power):
    error = 1 + abs(error) / 1e100  # away from the smallest and the largest numbers
    std = torch.linspace(1, 2, error.size, dtype=torch.float64).view(error.shape)
    q = factor(error, std, 0.3)
    assert factor(error, 2.0**power * std, 0.3) == q / 2.0**power


@given(arrays(float, (4, 7), elements=st.floats(-1, 1)), st.permutations(range(4)), st.permutations(range(7)))
def test_order_is_irrelevant(error, images, pixels):
    std = torch.ones(4, 7, dtype=torch.float64)
    assert factor(error, std, 0.7) == factor(error[images][:, pixels], std, 0.7)


@settings(deadline=None)
@given(st.floats(-20, 1e3), st.floats(1e-3, 1e3), st.floats(0.01, 0.99), st.floats(-10, 10))
def test_shortest_intervals(gap, size, level, lowest):
    "They begin no lower than values do, hold their share, and are no longer than where nothing is known."
    std = torch.tensor(size, dtype=torch.float64)
    mean = lowest + gap * std
    low, high = shortest_interval(mean, std, level, lowest)
    assert low >= lowest and high > low
    def above(x): return float(ndtr(float((mean - x) / std)))
    assert math.isclose(above(low) - above(high), level * above(torch.tensor(lowest, dtype=torch.float64)), rel_tol=1e-6)
    free = [float(end) for end in shortest_interval(mean, std, level)]
    assert high - low <= (free[1] - free[0]) * (1 + 1e-9) and math.isclose(sum(free) / 2, mean, rel_tol=1e-6, abs_tol=1e-9 * size)


@settings(deadline=None)
@given(arrays(float, st.integers(1, 60), elements=st.floats(1e-3, 1e3)), st.integers(1, 12), st.floats(0.1, 10))
def test_reliability(std, groups, factor):
    "The mean square of all groups is that of all pixels, and a factor of the bars is its logarithm."
    std = torch.from_numpy(std)
    predicted, found = reliability(factor * std, std, groups)
    assert len(predicted) == min(groups, len(std)) and (predicted.diff() >= -1e-9 * predicted[1:]).all()
    assert torch.allclose(found / predicted, torch.full_like(found, factor)) and math.isclose(z_std(factor * std, std), factor)
    assert math.isclose(miscalibration(factor * std, std, groups), abs(math.log(factor)), abs_tol=1e-9)
    sizes = torch.tensor([len(part) for part in std.tensor_split(len(predicted))])
    assert math.isclose((found.square() * sizes).sum(), (factor * std).square().sum(), rel_tol=1e-9)

"What no scan may do to a result, whatever is told of its noise and in whatever order it was measured."
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dip_uq.data import Scan, ellipses, simulate, walnut
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.rays import fan_beam, parallel_beam
from dip_uq.variation import psnr

few = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FAN = dict(source_origin=60, origin_detector=30)
BEAMS = {"parallel": lambda angles: parallel_beam(angles, (20, 20), 29),
         "fan": lambda angles: fan_beam(2 * angles, (20, 20), 29, 1.4, **FAN)}
TURN = np.arange(14) * np.pi / 14


def solved(scan, **options): return solve(scan, UNet(2, 8), iterations=150, progress=False, **options)


def flipped(y): return y.flip(1)

def dead(y): return y.where(torch.arange(y.shape[1]) != 12, 0)

def whole(y): return y


@few
@given(st.sampled_from(list(BEAMS)), st.sampled_from([0.02, 0.1, 0.3]), st.integers(0, 99), st.sampled_from([1, 1, 0.5, 0.2]),
       st.floats(-1, 1).map(lambda x: 30**x) | st.none(), st.sampled_from([whole, whole, flipped, dead]))
def test_the_image_is_not_worse_than_the_fit(beam, noise, seed, arc, factor, fault):
    "By more than half a decibel, whatever is told of the noise; a wrong noise, a missing wedge and a dead bin are told."
    assume(not (fault is dead and factor is not None and factor > 20)) # what a dead bin leaves hides that so much is no noise
    scan = simulate((walnut, ellipses)[seed % 2](20, seed), BEAMS[beam](arc * TURN), noise, seed)
    told = None if factor is None else factor * scan.noise_std
    found = solved(replace(scan, measurement=fault(scan.measurement), noise_std=told))
    assert psnr(found.image, scan.truth) > psnr(found.recon.image, scan.truth) - 0.5
    assert (found.std > 0).all() and found.std.isfinite().all() and float(found.image.std()) > 0
    if factor is not None and factor < 0.1: assert "times noise_std" in str(found.doubts)
    if factor is not None and factor > 20: assert "as large as noise can be" in str(found.doubts)
    if arc < 0.5: assert "looks along a wedge" in str(found.doubts)
    if fault is dead: assert "of bins 12 every reading is the same" in str(found.doubts)


@cache
def as_it_is(beam):
    "A scan, and what four choices of random weights make of it."
    scan = simulate(walnut(20, 1), BEAMS[beam](TURN), 0.02, 1)
    return scan, [solved(scan, seed=seed) for seed in range(4)]


def apart(a, b): return float((a - b).square().mean().sqrt())


def agrees(found, image, usual):
    "Image and mean bar differ from the usual ones by no more than half as much again as these, by other weights, do."
    bars, bar = [float(u.std.mean()) for u in usual], float(found.std.mean())
    widest = max(apart(u.image, v.image) for u in usual for v in usual)
    return min(apart(image, u.image) for u in usual) < 1.5 * widest and min(bars) / 1.5 < bar < 1.5 * max(bars)


def reordered(scan, beam, order, half, whole_turns):
    "The same projections in another order, some of them half a turn on (parallel) and mirrored, or whole turns on."
    angles, y = scan.operator.angles[order] + 2 * np.pi * whole_turns, scan.measurement[order]
    if beam == "parallel":
        angles = angles + np.pi * half
        y = torch.stack([v.flip(0) if turned else v for v, turned in zip(y, half)])
    A = BEAMS[beam](angles / (1 if beam == "parallel" else 2))
    return Scan(y, A, scan.truth, scan.noise_std)


@few
@given(st.sampled_from(list(BEAMS)), st.permutations(range(14)), st.lists(st.booleans(), min_size=14, max_size=14),
       st.lists(st.integers(-1, 2), min_size=14, max_size=14))
def test_position_in_a_file_means_nothing(beam, order, half, whole_turns):
    "Neither for the image, beyond what other random weights make of it, nor for the error bars."
    scan, usual = as_it_is(beam)
    found = solved(reordered(scan, beam, list(order), np.array(half), np.array(whole_turns)))
    assert agrees(found, found.image, usual)


@few
@given(st.sampled_from(list(BEAMS)), st.integers(1, 3))
def test_a_turned_object_is_the_same_object(beam, quarters):
    scan, usual = as_it_is(beam)
    A = BEAMS[beam]((scan.operator.angles + quarters * np.pi / 2) / (1 if beam == "parallel" else 2))
    found = solved(Scan(scan.measurement, A, scan.truth.rot90(quarters), scan.noise_std))
    assert agrees(found, found.image.rot90(-quarters), usual)


@few
@given(st.sampled_from(list(BEAMS)), st.lists(st.integers(0, 13), min_size=1, max_size=14), st.integers(0, 99))
def test_repeated_projections_do_no_harm(beam, again, seed):
    "New readings of the same lines leave image and bars much as they were."
    scan, usual = as_it_is(beam)
    A = scan.operator[list(range(14)) + again]
    y = torch.cat([scan.measurement, simulate(scan.truth, A, 0.02, seed).measurement[14:]])
    found = solved(Scan(y, A, scan.truth, scan.noise_std))
    assert agrees(found, found.image, usual)

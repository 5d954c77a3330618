"""Is a step of the deep image prior faster in bfloat16, channels last, compiled, or on more threads?

    python benchmarks/speed.py --out speed.json [--size 128] [--repeats 12]

A step (forward, loss, backward, clipping, Adam) of a 5 × 32 U-Net, in each way and in turns with plain float32, so that
what else the machine does meets all of them alike; medians and ratios to float32 of the same round. `quality` fits a small
walnut in float32 and in bfloat16 and gives the PSNR of both.
"""
import multiprocessing
from contextlib import nullcontext
from statistics import median

import torch
from common import arguments, timed, write

from dip_uq.data import simulate, walnut
from dip_uq.dip import first_guess, picture, tv_for_noise
from dip_uq.networks import UNet, fresh
from dip_uq.pretraining import fan_scanner
from dip_uq.variation import psnr, total_variation

WAYS = dict(float32={}, bfloat16=dict(low=True), channels_last=dict(last=True), compiled=dict(compiled=True))


def scan(size): return simulate(walnut(size, 0), fan_scanner(size, 30), 0.05)


def stepper(s, net, low=False, last=False, compiled=False, iterations=1500):
    "A generator that makes one step each time it is asked, and yields the image before the step."
    device = s.measurement.device
    z, scale = first_guess(s, "noise")
    net = fresh(net, 0).to(device)
    if last: net, z = net.to(memory_format=torch.channels_last), z.to(memory_format=torch.channels_last)
    f, y, tv = torch.compile(net) if compiled else net, s.measurement / scale, tv_for_noise(s)
    adam = torch.optim.Adam(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 5e-3, total_steps=iterations)
    for _ in range(iterations):
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext(): x = picture(f, z).float()
        loss = (s.operator(x) - y).square().mean() / y.square().mean() + tv * total_variation(x)
        yield scale * x.detach()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        schedule.step()


def seconds(steps, repeats=1):
    return timed(lambda: [next(steps) for _ in range(repeats)])[1] / repeats


def ways(s, repeats):
    "Median seconds of a step in each way, and its ratio to float32 in the same round; a way that fails says why."
    running, failed = {}, {}
    for name, options in WAYS.items():
        running[name] = stepper(s, UNet(), **options)
        try: seconds(running[name], 2)  # compilation, first allocations
        except Exception as e: failed[name] = f"{type(e).__name__}: {e}"[:200]
    rounds = [{name: seconds(steps) for name, steps in running.items() if name not in failed} for _ in range(repeats)]
    return failed | {name: dict(seconds=median(r[name] for r in rounds),
                                ratio=median(r[name] / r["float32"] for r in rounds))
                     for name in running if name not in failed}


def worker(size, threads, ready, times):
    torch.set_num_threads(threads)
    steps = stepper(scan(size), UNet())
    seconds(steps, 2)
    ready.wait()
    times.put(seconds(steps, 10))


def side_by_side(size):
    "Steps per second of one run on all threads, and of as many one-thread runs at once."
    cores, context, rates = torch.get_num_threads(), multiprocessing.get_context("spawn"), {}
    for name, runs, threads in (("one run", 1, cores), ("a run on each core", cores, 1)):
        ready, times = context.Barrier(runs), context.Queue()
        workers = [context.Process(target=worker, args=(size, threads, ready, times)) for _ in range(runs)]
        for w in workers: w.start()
        rates[name] = sum(1 / times.get() for _ in workers)
        for w in workers: w.join()
    return rates | dict(ratio=rates["a run on each core"] / rates["one run"])


def quality(device, size=48, iterations=600):
    "PSNR after a short fit in float32 and in bfloat16, three seeds of the noise."
    found = []
    for seed in range(3):
        s = scan(size)
        s = simulate(s.truth, s.operator, 0.05, seed).to(device)
        last = {name: list(stepper(s, UNet(4, 16), iterations=iterations, low=name == "bfloat16"))[-1]
                for name in ("float32", "bfloat16")}
        found.append({name: psnr(image, s.truth) for name, image in last.items()})
    return found


if __name__ == "__main__":
    args = arguments(__doc__, size=128, repeats=12)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write(dict(device=str(device), threads=torch.get_num_threads(), side_by_side=side_by_side(args.size),
               ways=ways(scan(args.size).to(device), args.repeats), quality=quality(device)), args.out)

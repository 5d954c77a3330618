"""The talk's walnut on a GPU: 501² pixels, 60 and then 120 projections of 128 bins, a U-Net of three million weights, whole.

    python benchmarks/gpu.py --out gpu.json [--stages speed agreement 60 120] [--rehearse 1]

speed       seconds of a step of the fit, in float32 and in TF32, and of products with J and Jᵀ
agreement   evidence, error bars and image of a walnut of 48² on the CPU and on the GPU, from one fit
60, 120     `solve`; the picture of its report is written beside the file

With --rehearse everything runs on the CPU with 40² pixels and a small network. Each stage writes its figures when it is
done, so that what was cut off leaves the stages before.
"""
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import arguments, some, timed, write
from scale import WHOLE, scan_of

from dip_uq.dip import Reconstruction, reconstruct
from dip_uq.evidence import fit_evidence
from dip_uq.files import peak_memory_mb, versions
from dip_uq.linearization import Linearization
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.posterior import Posterior


def case(angles, rehearse):
    return (scan_of(40, angles, 40, 1.4), UNet(2, 8, 2)) if rehearse else (scan_of(*WHOLE[f"walnut{angles}"]), UNet(6, 128))


def speed(device, rehearse):
    "Seconds: medians of five, after one that is not counted; of the SVD of random rays once."
    scan, net = case(60, rehearse)
    scan = scan.to(device)
    recon = reconstruct(scan, net, iterations=2, stop="heldout", progress=False)
    lin, net = Linearization(recon, free_pixels=True), net.to(device)
    u, v = torch.randn(1, *recon.image.shape).to(device), torch.randn(1, lin.parameters).to(device)
    def median(act): return float(np.median([timed(act)[1] for _ in range(6)][1:]))
    def step(allow_tf32):
        with torch.backends.cudnn.flags(True, allow_tf32=allow_tf32):
            return median(lambda: scan.operator(net(recon.z)[0, 0]).square().sum().backward())
    pull, push = lin.pullback(1), lin.pushforward(1)
    drawn = torch.randn(scan.measurement.numel(), 1500, dtype=torch.float64, device=device)
    return dict(step=step(False), step_tf32=step(True), vjp=median(lambda: pull(u)), jvp=median(lambda: push(v)),
                svd=timed(torch.linalg.svd, drawn, False)[1])


def agreement(device):
    "How far the devices differ, as shares of the error bars or of the evidence."
    scan = scan_of(48, 48, 60, 1.12)
    recon = reconstruct(scan, UNet(3, 8), iterations=300, stop="heldout", progress=False)
    def found(device):
        with TemporaryDirectory() as folder:
            recon.save(path := Path(folder) / "fit.safetensors")
            lin = Linearization(Reconstruction.load(path, scan.to(device)), free_pixels=True)
        posterior = Posterior(fit_evidence(lin, progress=False))
        return posterior.evidence.value, posterior.mean.cpu(), posterior.std().cpu(), len(posterior.model.residual)
    (value, mean, std, kept), (other, its_mean, its_std, its_kept) = found("cpu"), found(device)
    return dict(kept=kept, evidence=value, evidence_differs=other - value, kept_differs=its_kept - kept,
                std_differs=float((its_std / std - 1).abs().max()), mean_differs=float(((its_mean - mean) / std).abs().max()))


def whole(device, angles, rehearse, picture):
    "What `solve` took, and then what it found: TV, with which that is compared, takes its time too."
    scan, net = case(angles, rehearse)
    s, seconds = timed(solve, scan.to(device), net, iterations=100 if rehearse else 2000)
    memory = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_memory_mb()
    found = dict(seconds=s.seconds | dict(total=seconds), peak_memory_mb=memory, kept=len(s.posterior.model.residual))
    yield found
    summary = s.summary()
    yield found | {k: summary[k] for k in ("d_x", "d_y", "parameters", "psnr", "psnr_tv", "psnr_fbp", "zstd", "coverage95", "heldout_zstd", "verdict", "doubts")}
    s.report().savefig(picture, dpi=140)


def main():
    args = arguments(__doc__, stages=some(["speed", "agreement", "60", "120"]), rehearse=0)
    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available(): raise SystemExit("no CUDA device; --rehearse 1 runs a small case on the CPU")
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for stage in args.stages:
        if stage == "speed": parts = [speed(device, args.rehearse)]
        elif stage == "agreement": parts = [agreement(device)]
        else: parts = whole(device, int(stage), args.rehearse, args.out.with_name(f"walnut{stage}.png"))
        for part in parts:
            found[stage] = dict(versions=versions(), device=device) | part
            write(found, args.out)


if __name__ == "__main__": main()

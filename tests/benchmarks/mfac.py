"""Measure M-FAC against the published recursion and the thread's own matrix products, in ratios of one process.

    python -m tests.benchmarks.mfac --out docs/benchmarks.md

Cost: about 5 minutes of one core and 5 GB of memory; --parts chooses. The part "device" needs a GPU, and 4 m d bytes of
its memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.numerics.mfac import gram_matrix, inverse_fisher, joint_update, new_gradients
from compress.numerics.mfac_window import FisherWindow

from .page import machine, publish, table

TITLE, DEVICE_TITLE = "M-FAC", "M-FAC on a GPU"
PARTS = ("static", "blocks", "file", "window", "device")
DAMPING = 1e-3
SIZE = 2048  # of the matrix product that the thread's rate is taken from


def cpu_time_s(call: Callable[[], object]) -> float:
    """Processor time of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


class Rate:
    """The thread's float32 matrix product: median of samples that are taken in between, in operations a second."""

    def __init__(self) -> None:
        self.square, self.samples = torch.randn(SIZE, SIZE), list[float]()

    def sample(self) -> None:
        self.samples.append(2 * SIZE**3 / cpu_time_s(lambda: self.square @ self.square))

    def median(self) -> float:
        return statistics.median(self.samples)


def recursion(gradients: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Theorem 1 of the paper, row by row: ``F_i^-1 = F_{i-1}^-1 - v_i v_i^T / q_i`` with ``v_i = F_{i-1}^-1 g_i``."""
    m = len(gradients)
    v, q = torch.empty_like(gradients), torch.empty(m)
    for i, gradient in enumerate(gradients):
        v[i] = gradient / damping
        if i:
            v[i] -= ((v[:i] @ gradient) / q[:i]) @ v[:i]
        q[i] = m + gradient @ v[i]
    return v, q


def recursion_diagonal(v: Tensor, q: Tensor, damping: float) -> Tensor:
    """From what ``recursion`` gives."""
    return 1 / damping - (v.square() / q[:, None]).sum(0)


def block_recursion(gradients: Tensor, size: int, damping: float) -> Tensor:
    """The same for blocks no larger than m, whose inverses ``[n, B, B]`` are kept: a rank-one update a gradient."""
    m, d = gradients.shape
    parts = gradients.reshape(m, d // size, size)
    inverse = torch.eye(size).repeat(d // size, 1, 1) / damping
    for gradient in parts:
        v = inverse @ gradient[:, :, None]
        inverse.sub_((v / (m + gradient[:, None, :] @ v)) @ v.mT)
    return inverse


def block_rows_recursion(gradients: Tensor, size: int, damping: float) -> tuple[Tensor, Tensor]:
    """``recursion`` in each block: ``v`` ``[n, m, B]`` and ``q`` ``[n, m]``; no inverse is kept."""
    m, d = gradients.shape
    parts = gradients.reshape(m, d // size, size)
    v, q = torch.empty(d // size, m, size), torch.empty(d // size, m)
    for i, gradient in enumerate(parts):
        v[:, i] = gradient / damping
        if i:
            shares = (v[:, :i] @ gradient[:, :, None])[..., 0] / q[:, :i]
            v[:, i] -= (shares[:, None] @ v[:, :i])[:, 0]
        q[:, i] = m + (gradient * v[:, i]).sum(1)
    return v, q


def static_rows(d: int, rounds: int) -> list[tuple[str, ...]]:
    """m = 1024, the full matrix."""
    m, rate, times = 1024, Rate(), {"precompute": list[float](), "diagonal": list[float]()}
    gradients = torch.randn(m, d) * torch.exp(torch.randn(d))
    found: list[Any] = [None, None]
    for _ in range(rounds):
        rate.sample()
        times["precompute"].append(cpu_time_s(lambda: found.__setitem__(0, inverse_fisher(gradients, DAMPING))))
        rate.sample()
        times["diagonal"].append(cpu_time_s(lambda: found.__setitem__(1, found[0].diagonal())))
    start = time.process_time()
    v, q = recursion(gradients, DAMPING)
    theirs = time.process_time() - start
    start = time.process_time()
    expected = recursion_diagonal(v, q, DAMPING)
    their_diagonal = time.process_time() - start
    apart = float(((found[1] - expected).abs() / expected).max())
    ours, diagonal = (statistics.median(times[name]) for name in ("precompute", "diagonal"))
    share = m * m * d / ours / rate.median()
    return [
        (f"precompute, m = {m}, d = {d:,}", f"{ours:.2f} s", f"{theirs:.1f} s", f"{theirs / ours:.1f}x"),
        (
            "precompute and diagonal",
            f"{ours + diagonal:.2f} s",
            f"{theirs + their_diagonal:.1f} s",
            f"{(theirs + their_diagonal) / (ours + diagonal):.1f}x",
        ),
        ("precompute, `m^2 d` operations", f"{m * m * d / ours / 1e9:.0f} GFLOP/s", "", f"{share:.0%} of the rate"),
        (f"matrix product of {SIZE}, the rate", f"{rate.median() / 1e9:.0f} GFLOP/s", "", ""),
        ("largest relative difference of the diagonals", f"{apart:.1g}", "", ""),
    ]


def block_rows(d: int, rounds: int) -> list[tuple[str, ...]]:
    """m = 256, blocks of 128."""
    m, size = 256, 128
    gradients = torch.randn(m, d // size * size)
    ours = statistics.median(cpu_time_s(lambda: inverse_fisher(gradients, DAMPING, blocks=size)) for _ in range(rounds))
    shown = f"precompute, m = {m}, d = {gradients.shape[1]:,}, blocks of {size}"
    rows = []
    for way, call in (("inverses by rank-one updates", block_recursion), ("row by row", block_rows_recursion)):
        theirs = cpu_time_s(lambda call=call: call(gradients, size, DAMPING))  # type: ignore[misc]
        rows.append((f"{shown}, against {way}", f"{ours:.2f} s", f"{theirs:.1f} s", f"{theirs / ours:.1f}x"))
    return rows


def file_child(m: int, d: int, memory: int) -> dict[str, Any]:
    """All that M-FAC computes of gradients that lie where ``memory`` says; what it takes, and a hash of the results."""
    torch.set_num_threads(1)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            peak[0] = max(peak[0], *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    gradients = new_gradients(m, d, torch.float32, memory=memory)
    for row in range(0, m, 32):
        drawn = torch.randn(32, d, generator=torch.Generator().manual_seed(row))
        gradients[slice(row, row + 32), slice(0, d)] = drawn
    del drawn
    weights = torch.randn(d, generator=torch.Generator().manual_seed(1))
    gram = gram_matrix(gradients)
    diagonal = inverse_fisher(gradients, DAMPING, gram=gram).diagonal()
    keep = weights.abs() > 0.5
    change = joint_update(gradients, weights, keep, gram=gram).solve(DAMPING)
    spent = time.process_time() - start
    done.set()
    watcher.join()
    digest = hashlib.sha256()
    for result in (gram, diagonal, change):
        digest.update(result.numpy().tobytes())
    return {"cpu_s": spent, "rss_anon": peak[0], "sha256": digest.hexdigest()}


def file_rows(d: int) -> list[tuple[str, ...]]:
    """m = 1024 gradients, in memory and in a file, each in a process of its own."""
    m, found = 1024, {}
    for shown, memory in (("memory", 2**40), ("a file, `--memory 512MB`", 512_000_000)):
        command = [sys.executable, "-m", "tests.benchmarks.mfac", "--child", str(m), str(d), str(memory)]
        found[shown] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    first, second = found.values()
    is_same = first["sha256"] == second["sha256"]
    return [
        (
            f"{4e-9 * m * d:.1f} GB of gradients in {shown}",
            f"{result['cpu_s']:.1f} s",
            f"{result['cpu_s'] / first['cpu_s']:.2f}x",
            f"{result['rss_anon'] / 1e6:.0f} MB",
            "same bits" if is_same else "other bits",
        )
        for shown, result in found.items()
    ]


def device_rows(d: int, rounds: int) -> list[tuple[str, ...]]:
    """m = 1024 on a GPU: against its own float32 matrix product, and against the processor's results."""
    m, device, square = 1024, torch.device("cuda"), torch.randn(4 * SIZE, 4 * SIZE, device="cuda")
    gradients = new_gradients(m, d, torch.float32, memory=0, device=device)
    assert not isinstance(gradients, Tensor)
    assert gradients.chunks[0].device.type == "cuda", "the device has no room for the gradients; lower --device-d"
    for part in gradients.chunks:
        part.normal_().mul_(torch.randn(part.shape[1], device=device).exp_())
    times: dict[str, list[float]] = {"rate": [], "precompute": [], "diagonal": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = call()
        torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)
        return found

    for _ in range(rounds + 1):
        timed("rate", lambda: [square @ square for _ in range(5)])
        inverse = timed("precompute", lambda: inverse_fisher(gradients, DAMPING))
        diagonal = timed("diagonal", lambda inverse=inverse: inverse.diagonal())
    found = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first is a warm-up
    peak = torch.cuda.max_memory_allocated()
    rate = 5 * 2 * len(square) ** 3 / found["rate"]
    both = found["precompute"] + found["diagonal"]
    del inverse, diagonal
    few = gradients.index_select(1, torch.arange(0, d, max(1, d // 200_000), device=device))
    return [
        (
            f"matrix product of {len(square)}, the rate",
            f"{1e3 * found['rate'] / 5:.1f} ms",
            f"{rate / 1e12:.1f} TFLOP/s",
        ),
        *(
            (f"{name}, m = {m}, d = {d:,}", f"{1e3 * time:.0f} ms", f"{share:.0%} of the rate")
            for name, time, flops in (
                ("precompute", found["precompute"], m * m * d),
                ("diagonal", found["diagonal"], m * m * d),
                ("both", both, 2 * m * m * d),
            )
            for share in (flops / time / rate,)
        ),
        ("memory of the device at its peak", f"{peak / 1e9:.1f} GB", f"gradients {4e-9 * m * d:.1f} GB"),
        *((f"{name} of d = {few.shape[1]:,}, from the processor's", f"{apart:.1g}", "") for name, apart in _apart(few)),
    ]


def _apart(gradients: Tensor) -> Iterable[tuple[str, float]]:
    """Largest differences of a device's results from the processor's, relative to the largest entry."""
    d, both = gradients.shape[1], []
    weights, x = torch.randn(2, d, generator=torch.Generator().manual_seed(0))
    for own in (gradients, gradients.cpu()):
        there = own.device
        inverse = inverse_fisher(own, DAMPING)
        change = joint_update(own, weights.to(there), (weights.abs() > 0.5).to(there)).solve(DAMPING)
        results = inverse.diagonal(), inverse.ihvp(x.to(there)), inverse.ihvp(x.double().to(there)), change
        both.append([result.cpu() for result in results])
    names = "diagonal", "float32 product with the inverse", "float64 product with the inverse", "joint update"
    for name, ours, theirs in zip(names, *both, strict=True):
        yield name, float((ours - theirs).abs().max() / theirs.abs().max())


def window_rows(rounds: int) -> list[tuple[str, ...]]:
    """Exponents of the time of a change and of an element, by least squares in logarithms."""
    sizes_m = [(m, 40_000) for m in (64, 128, 256, 512)]
    cases = {
        "gradient added to a full window, with m, d = 40,000": (sizes_m, 0, _change),
        "the same with d, m = 128": ([(128, d) for d in (20_000, 40_000, 80_000, 160_000)], 1, _change),
        "the same with m, d = 16: the m x m part": ([(m, 16) for m in (512, 1024, 2048)], 0, _change),
        "gradient removed from anywhere, with m, d = 40,000": (sizes_m, 0, _remove),
        "element, with m, d = 4 m": ([(m, 4 * m) for m in (128, 256, 512, 1024)], 0, _element),
        "element, with d, m = 256": ([(256, d) for d in (2000, 8000, 32_000)], 1, _element),
    }
    rows = []
    for name, (sizes, axis, measure) in cases.items():
        times = [measure(m, d, rounds) for m, d in sizes]
        x, y = (np.log([size[axis] for size in sizes]), np.log(times))
        shown = ", ".join(_duration(t) for t in times)
        rows.append((name, shown, f"{np.polyfit(x, y, 1)[0]:.2f}"))
    return rows


def _full(m: int, d: int) -> FisherWindow:
    window = FisherWindow(m, d, DAMPING)
    for row in torch.randn(m, d, generator=torch.Generator().manual_seed(0)):
        window.add(row)
    window.element(0, 1)
    return window


def _change(m: int, d: int, rounds: int) -> float:
    window, fresh = _full(m, d), torch.randn(2 * rounds, d)
    return statistics.median(_each(lambda i: window.add(fresh[i]), range(2 * rounds)))


def _remove(m: int, d: int, rounds: int) -> float:
    window = _full(m, d)
    return statistics.median(_each(lambda i: window.remove((7 * i) % len(window)), range(2 * rounds)))


def _element(m: int, d: int, rounds: int) -> float:
    window, count = _full(m, d), 50
    places = torch.randint(d, (rounds, count, 2), generator=torch.Generator().manual_seed(1)).tolist()
    return statistics.median(_each(lambda i: [window.element(*at) for at in places[i]], range(rounds))) / count


def _each(call: Callable[[int], object], numbers: Iterable[int]) -> list[float]:
    return [cpu_time_s(lambda i=i: call(i)) for i in numbers]  # type: ignore[misc]


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and put the section into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--d", type=int, default=268_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file-d", type=int, default=1_000_000)
    parser.add_argument("--child", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device-d", type=int, default=25_000_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.child is not None:
        print(json.dumps(file_child(*given.child)))
        return
    if "device" in given.parts and torch.cuda.is_available():
        shown = f"- GPU: {torch.cuda.get_device_name()}; float32 without TF32, wall time"
        rows = table(("", "time", ""), device_rows(given.device_d, given.rounds))
        command = ["```sh", "python -m tests.benchmarks.mfac --parts device --out docs/benchmarks.md", "```"]
        publish(given.out, DEVICE_TITLE, [*machine(), shown, "", rows, *command])
    if set(given.parts) == {"device"}:
        return
    text = [
        *machine(),
        "",
        "One thread; processor time, medians of what is repeated. Ratios are of one process; different tables may be",
        "of different ones (--parts).",
        "",
    ]
    against: list[tuple[str, ...]] = []
    if "static" in given.parts:
        against += static_rows(given.d, given.rounds)
    if "blocks" in given.parts:
        against += block_rows(given.d, given.rounds)
    if against:
        text += [table(("", "here", "published recursion", "ratio"), against)]
    if "file" in given.parts:
        head = ("gram, diagonal and joint update", "CPU time", "ratio", "anonymous memory at its peak", "")
        text += [table(head, file_rows(given.file_d))]
    if "window" in given.parts:
        text += [table(("window of gradients", "CPU time", "exponent"), window_rows(given.rounds))]
    text += ["```sh", "python -m tests.benchmarks.mfac --out docs/benchmarks.md", "```"]
    publish(given.out, TITLE, text)


if __name__ == "__main__":
    main()

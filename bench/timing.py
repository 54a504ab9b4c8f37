"""Medians of interleaved repetitions, peak memory of a call, and the machine's ceilings."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from latent_engine.kernels import native

SAMPLE = 10e-3  # seconds a sample should last, so that the clock and the call's jitter do not matter
WARM_UP = 0.15  # seconds of untimed calls before it: a large call of XLA's slows the next ones down for 0.14 s


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, and the 20th and 80th percentiles."""

    median: float
    low: float
    high: float


def _clock(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds a call over `repeats` calls; on CUDA the device's own time."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def time_calls(calls: dict[str, Callable[[], object]], device: str, rounds: int = 9,
               beside: dict[str, Callable[[], object]] | None = None) -> dict[str, Timing]:
    """Times all calls in turns, so that a disturbance of the machine hits all of them.

    Every call must have run before. What takes over a second, or over ten times the fastest, gets 3 rounds, but those
    `beside`, which also set no measure for the others. Before each sample a call shorter than the warm-up runs untimed: what
    the others left in caches, allocator and thread pools is not part of it.
    """
    beside = beside or {}
    calls = calls | beside
    once, samples = {}, {name: [] for name in calls}
    for name, call in calls.items():
        once[name] = _clock(call, 1, device)
        if once[name] < WARM_UP:
            once[name] = min(_clock(call, 1, device) for _ in range(2))
    repeats = {name: max(1, round(SAMPLE / max(t, 1e-7))) for name, t in once.items()}
    slow = min(1.0, 10 * min(once[name] for name in (calls.keys() - beside.keys() or calls)))
    few = {name for name, t in once.items() if t > slow and name not in beside}
    for turn in range(rounds):
        for name, call in calls.items():
            if name in few and turn >= 3:
                continue
            begin = time.perf_counter()
            while once[name] < WARM_UP and time.perf_counter() - begin < WARM_UP:
                call()
            samples[name].append(_clock(call, repeats[name], device))
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[3])


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes above the level before the call, at their highest; None where the system cannot tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        if native.cpp:
            native.cpp.release_memory()
        before = _kilobytes(status, "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        call()
        return max(0, _kilobytes(status, "VmHWM") - before) * 1024
    except (OSError, AttributeError):
        return None


def _kilobytes(status: Path, key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", status.read_text()).group(1))


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do, measured in this run: bytes read plus written, fp32 FMAs and exps a second, and operations where
    FMAs and additions come in equal numbers: twice the FMAs where additions have pipes of their own, as many where they share.

    `tape` are the seconds that PyTorch's autograd takes where there is next to nothing to compute: the gradient of one
    product of two numbers by `torch.autograd.grad`, which no gradient through it can beat.
    """

    bytes: float
    fmas: float
    exps: float
    operations: float
    tape: float

    def bound(self, work: "Work") -> tuple[float, str]:
        """The least time for `work`, and which ceiling sets it."""
        rates = {"bytes": self.bytes, "FMA": self.fmas, "exp": self.exps, "operations": self.operations}
        times = {limit: work.amount(limit) / rate for limit, rate in rates.items()}
        limit = max(times, key=times.get)
        return times[limit], limit


@dataclass(frozen=True)
class Work:
    """What a call must at least do: bytes of inputs and outputs, multiplications and FMAs, exps; additions, subtractions and
    comparisons where the suite's formula has a number of them."""

    bytes: float
    fmas: float
    exps: float
    additions: float = 0

    def amount(self, limit: str) -> float:
        return {"bytes": self.bytes, "FMA": self.fmas, "exp": self.exps, "operations": self.fmas + self.additions}[limit]


class Probes:
    """What ceilings are measured by: copying out of cache, an SGEMM for the FMA rate, the exp in cache, torch's or on a CPU, if
    it is faster, that of our kernels on each thread, and FMAs and subtractions in a CPU's registers, on each thread too. On
    CUDA, where these share their pipes, an operation takes what an FMA takes."""

    def __init__(self, device: str) -> None:
        n = 2**26 if device == "cuda" else 2**24
        source = torch.rand(n, device=device)
        target = torch.empty_like(source)
        side = 8192 if device == "cuda" else 1536
        a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
        x = torch.rand(2**22 if device == "cuda" else 2**17, device=device)
        y = torch.empty_like(x)
        self.calls = {"bytes": lambda: target.copy_(source), "FMA": lambda: torch.mm(a, b),
                      "exp": lambda: torch.exp(x, out=y), "operations": lambda: torch.mm(a, b)}
        self.amounts = {"bytes": 8 * n, "FMA": side**3, "exp": x.numel(), "operations": side**3}
        if device == "cpu" and native.cpp:
            few, rounds, threads = np.linspace(-8, 0, 2**13, dtype=np.float32), 2**12, torch.get_num_threads()
            self.calls |= {"our exp": lambda: native.cpp.exp(few), "operations": lambda: native.cpp.arithmetic(rounds)}
            self.amounts |= {"our exp": threads * few.size, "operations": threads * native.cpp.arithmetic(rounds)}
        for call in self.calls.values():
            call()

    def of(self, limit: str) -> dict[str, Callable[[], object]]:
        """The calls that measure one ceiling: "bytes", "FMA", "exp" or "operations"."""
        return {name: call for name, call in self.calls.items() if name.endswith(limit)}

    def rate(self, limit: str, seconds: dict[str, float]) -> float:
        """That ceiling, from the seconds that its calls took."""
        return max(self.amounts[name] / seconds[name] for name in self.of(limit))


def measure_ceilings(device: str) -> Ceilings:
    """The ceilings at this moment."""
    probes, number = Probes(device), torch.ones((), device=device, requires_grad=True)
    times = time_calls(probes.calls | {"tape": lambda: torch.autograd.grad(number * number, number)}, device)
    low = {name: timing.low for name, timing in times.items()}
    return Ceilings(*(probes.rate(limit, low) for limit in ("bytes", "FMA", "exp", "operations")), low["tape"])

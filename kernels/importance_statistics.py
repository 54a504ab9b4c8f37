"""Statistics of importance weights: is the estimate of the likelihood to be trusted, and how far?

For S log-weights of one data point, m their maximum, s₁ = Σ exp(log w − m), s₂ = Σ exp(2 (log w − m)):

    log-likelihood       log p̂(x) = m + log s₁ − log S                       (a lower bound in expectation: Burda et al. 2016)
    effective samples    ESS = (Σ w)² / Σ w² = s₁² / s₂                       (Kish 1965; between 1 and S)
    standard error       of log p̂: √((1/ESS − 1/S) · S/(S − 1))              (delta method)
    tail                 k̂, the shape of a generalised Pareto distribution fitted to the ⌈min(S/5, 3√S)⌉ largest weights
                         (Vehtari, Simpson, Gelman, Yao & Gabry 2024): below 0.7 the estimate and its error can be trusted,
                         above 1 the weights have no mean.

m, s₁, s₂ and Σ log w are float64 whatever the log-weights are, and can be merged: chunks of samples and processes give the
same to float64 rounding however the samples were divided.
"""

import math
from functools import reduce
from statistics import NormalDist

import torch
from torch import Tensor, distributed

from .backends import Op, register
from .importance import SUPPORT, check_log_weights, check_options
from .library import Primitive
from .reference import importance as bounds
from .reference import importance_statistics as reference

LEAST_TAIL = 5  # samples, for a fit of k̂


def importance_weights(log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """Normalised weights w^(1 − α) / Σ w^(1 − α) of `log_w[S, ...]` over its samples: the gradient of the Rényi bound.

    Zeros where all weights of a data point are zero. Differentiable. O(S·N). ValueError where there is no sample, or `alpha`
    is not a number or ±∞.
    """
    log_w = check_log_weights("importance_weights", log_w)
    return bounds.normalised_weights(log_w, *check_options("importance_weights", log_w.shape[0], alpha))


def effective_sample_size(log_w: Tensor, *, backend: str | None = None) -> Tensor:
    """Kish's effective sample size of the weights `exp(log_w[S, ...])`, float64 `[...]`; NaN where all weights are zero.

    Not differentiable. O(S·N).
    """
    log_w = check_log_weights("effective_sample_size", log_w)
    S, shape = log_w.shape[0], log_w.shape[1:]
    if S == 0:
        raise ValueError("effective_sample_size: needs at least one sample, given S = 0.")
    flat = log_w.detach().reshape(S, shape.numel())
    _, total, squares, _ = _add_moments(flat, _no_moments(flat), backend)
    return (total.square() / squares).reshape(shape)


def pareto_k(log_w: Tensor) -> Tensor:
    """Pareto k̂ of the weights `exp(log_w[S, ...])`, float64 `[...]`; ∞ where fewer than 5 weights lie in the tail (S ≤ 20).

    Not differentiable. O(S·N).
    """
    log_w = check_log_weights("pareto_k", log_w)
    S = log_w.shape[0]
    flat = log_w.detach().reshape(S, math.prod(log_w.shape[1:]))
    return _tail_shape(flat.topk(min(S, _tail_size(S) + 1), dim=0).values, S).reshape(log_w.shape[1:])


class ImportanceAccumulator:
    """Collects log-weights in chunks of samples, in memory that does not grow with them.

    Args:
        max_samples: how many samples a data point will have at most; needed for `pareto_k` only, which keeps the
            ⌈3 √max_samples⌉ + 1 largest log-weights of each.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Results are float64, in the shape of one sample. The same log-weights give the same results to float64 rounding, whatever
    the chunks and processes; `pareto_k` gives the same exactly.

    >>> samples = ImportanceAccumulator()
    >>> for log_w in torch.zeros(4, 100, 3):
    ...     _ = samples.add(log_w)
    >>> samples.log_likelihood(), samples.effective_sample_size()
    (tensor([0., 0., 0.], dtype=torch.float64), tensor([400., 400., 400.], dtype=torch.float64))
    """

    def __init__(self, *, max_samples: int | None = None, backend: str | None = None) -> None:
        if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
            raise ValueError(f"ImportanceAccumulator: max_samples must be a positive integer or None, given {max_samples!r}.")
        self.samples = 0  # of each data point, so far
        self.max_samples = max_samples
        self._backend = backend
        self._shape: torch.Size | None = None
        self._state: Tensor | None = None  # float64 [4, N]: m, s₁, s₂, Σ log w
        self._tail: Tensor | None = None  # the largest log-weights, descending

    @torch.no_grad()
    def add(self, log_w: Tensor) -> "ImportanceAccumulator":
        """Adds samples `log_w[S, ...]`; the same data points each time."""
        log_w = check_log_weights("ImportanceAccumulator.add", log_w)
        S, shape = log_w.shape[0], log_w.shape[1:]
        if self._state is not None and shape != self._shape:
            raise ValueError(f"ImportanceAccumulator.add: log_w must have shape {['S', *self._shape]} as before, "
                             f"given {list(log_w.shape)}.")
        if self._state is not None and log_w.device != self._state.device:
            raise ValueError(f"ImportanceAccumulator.add: log_w is on {log_w.device} but the samples before it on "
                             f"{self._state.device}; move it there.")
        self._check_count(self.samples + S)
        flat = log_w.detach().reshape(S, shape.numel())
        self._state = _add_moments(flat, _no_moments(flat) if self._state is None else self._state, self._backend)
        if self._tail is None:
            self._shape, self._tail = shape, flat.new_empty(0, shape.numel())
        self.samples += S
        self._keep_tail(flat)
        return self

    @torch.no_grad()
    def merge(self, other: "ImportanceAccumulator") -> "ImportanceAccumulator":
        """Adds the samples that `other` has collected of the same data points."""
        if other._state is None:
            return self
        if self.max_samples is not None and len(other._tail) < min(other.samples, _tail_size(self.max_samples) + 1):
            raise ValueError(f"ImportanceAccumulator.merge: the other one kept too few of its largest log-weights; "
                             f"construct it with max_samples = {self.max_samples} too.")
        if self._state is not None and other._shape != self._shape:
            raise ValueError(f"ImportanceAccumulator.merge: the data points have shape {list(self._shape)} here and "
                             f"{list(other._shape)} there.")
        self._check_count(self.samples + other.samples)
        if self._state is None:
            self._shape, self._tail = other._shape, other._tail[:0]
        self.samples += other.samples
        self._state = other._state if self._state is None else reference.merge_moments(self._state, other._state)
        self._keep_tail(other._tail)
        return self

    @torch.no_grad()
    def all_reduce(self, group: "distributed.ProcessGroup | None" = None) -> "ImportanceAccumulator":
        """Merges the samples of the same data points from all processes of `group`; every process gets the same bits.

        ValueError in every process if one has added no samples, or they differ in their data points' shape or max_samples.
        """
        ranks = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(ranks, (self.samples, self._shape, self.max_samples), group)
        counts, shapes, limits = zip(*ranks, strict=True)
        if 0 in counts:
            raise ValueError(f"ImportanceAccumulator.all_reduce: every process must have added samples, given {list(counts)}.")
        if len(set(shapes)) > 1 or len(set(limits)) > 1:
            raise ValueError(f"ImportanceAccumulator.all_reduce: the processes must have data points of one shape and one "
                             f"max_samples, given {[list(s) for s in shapes]} and {list(limits)}.")
        self._check_count(sum(counts))
        states = [torch.empty_like(self._state) for _ in ranks]
        distributed.all_gather(states, self._state, group)
        kept = [0 if self.max_samples is None else min(samples, _tail_size(self.max_samples) + 1) for samples in counts]
        tail = torch.full_like(self._state[:1], -torch.inf).repeat(max(kept), 1)  # float64, as one process may have had them
        tail[:len(self._tail)] = self._tail
        tails = [torch.empty_like(tail) for _ in ranks]
        distributed.all_gather(tails, tail, group)
        self.samples, self._state, self._tail = sum(counts), reduce(reference.merge_moments, states), tail[:0]
        self._keep_tail(torch.cat([rows[:n] for rows, n in zip(tails, kept, strict=True)]))
        return self

    def log_likelihood(self) -> Tensor:
        """log p̂(x), the importance-weighted bound over all samples."""
        top, total, *_ = self._collected()
        return self._shaped(top.masked_fill(top.isinf(), 0.0) + (total / self.samples).log())

    def elbo(self) -> Tensor:
        """The mean log-weight."""
        return self._shaped(self._collected()[3] / self.samples)

    def effective_sample_size(self) -> Tensor:
        """(Σ w)² / Σ w², between 1 and the number of samples; NaN where all weights are zero."""
        _, total, squares, _ = self._collected()
        return self._shaped(total.square() / squares)

    def standard_error(self) -> Tensor:
        """Of `log_likelihood`, by the delta method; ∞ after one sample. Not to be trusted where `pareto_k` exceeds 0.7."""
        if self.samples < 2:
            return torch.full_like(self.elbo(), torch.inf)
        spread = 1 / self.effective_sample_size() - 1 / self.samples
        return (spread.clamp(min=0) * (self.samples / (self.samples - 1))).sqrt()

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Limits of a two-sided normal confidence interval of the log-likelihood."""
        if not 0 < confidence < 1:
            raise ValueError(f"ImportanceAccumulator.interval: confidence must lie in (0, 1), given {confidence!r}.")
        half = NormalDist().inv_cdf(0.5 + 0.5 * confidence) * self.standard_error()
        return self.log_likelihood() - half, self.log_likelihood() + half

    def pareto_k(self) -> Tensor:
        """k̂ over all samples, exactly that of `pareto_k` on them together."""
        if self.max_samples is None:
            raise ValueError("ImportanceAccumulator.pareto_k: the largest log-weights were not kept; "
                             "construct it with max_samples, how many samples there will be at most.")
        self._collected()
        return self._shaped(_tail_shape(self._tail[:_tail_size(self.samples) + 1], self.samples))

    def _collected(self) -> Tensor:
        if self._state is None or not self.samples:
            raise ValueError("ImportanceAccumulator: no samples have been added yet.")
        return self._state

    def _shaped(self, value: Tensor) -> Tensor:
        return value.reshape(self._shape)

    def _check_count(self, samples: int) -> None:
        if self.max_samples is not None and samples > self.max_samples:
            raise ValueError(f"ImportanceAccumulator: {samples} samples are more than max_samples = {self.max_samples}.")

    def _keep_tail(self, log_w: Tensor) -> None:
        if self.max_samples is not None:
            candidates = torch.cat((self._tail, log_w))
            self._tail = candidates.topk(min(len(candidates), _tail_size(self.max_samples) + 1), dim=0).values


def _no_moments(log_w: Tensor) -> Tensor:
    """The moments [4, N] of no samples of log_w[S, N]."""
    state = log_w.new_zeros(4, log_w.shape[1], dtype=torch.float64)
    state[0] = -torch.inf
    return state


def _add_moments(log_w: Tensor, state: Tensor, backend: str | None) -> Tensor:
    """The moments [4, N] of `state` and of log_w[S, N] together."""
    name = OP.choose(log_w, backend)
    if name == "reference":
        return reference.merge_moments(state, reference.moments(log_w))
    return MOMENTS(name, log_w, state) if len(log_w) else state


def _tail_size(samples: int) -> int:
    return math.ceil(min(samples / 5, 3 * math.sqrt(samples)))


def _tail_shape(largest: Tensor, samples: int) -> Tensor:
    """k̂ [N] from the _tail_size(samples) + 1 largest log-weights, descending; the last one is the threshold.

    Weights that equal the threshold are not part of the tail, as in the authors' code, so that its length may vary.
    """
    largest = largest.double()
    shape = largest.new_full(largest.shape[1:], torch.inf)
    if len(largest) <= LEAST_TAIL:
        return shape
    weights = (largest - largest[0]).exp()
    # weights below the smallest normal number count as that
    threshold = weights[-1].clamp(min=torch.finfo(weights.dtype).tiny)
    lengths = (weights > threshold).sum(0)
    for length in lengths.unique().tolist():
        if length >= LEAST_TAIL:
            columns = lengths == length
            excess = weights[:length, columns] - threshold[columns]
            shape[columns] = reference.generalised_pareto_shape(excess.flip(0))
    return shape.masked_fill(largest.isnan().any(0), torch.nan)


def _fake_moments(log_w: Tensor, state: Tensor) -> Tensor:
    return torch.empty_like(state, memory_format=torch.contiguous_format)


# The moments of `state` and of log_w[S, N] together; S > 0.
MOMENTS = Primitive("importance", "importance_moments", "(Tensor log_w, Tensor state) -> Tensor", _fake_moments)
OP = register(Op("effective_sample_size", "importance_moments", SUPPORT))

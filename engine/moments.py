"""Mean and covariance of feature rows that arrive in batches, and what they factor into.

Blocks of rows are centred at their own mean and combined pairwise (Chan, Golub & LeVeque 1983): with n rows, mean m and
scatter matrix S = Σ (x − m)(x − m)ᵀ of each of two blocks,

    m = m₁ + (m₂ − m₁) n₂/n,    S = S₁ + S₂ + (m₂ − m₁)(m₂ − m₁)ᵀ n₁n₂/n,    n = n₁ + n₂.

No term cancels, so the same rows give the same moments to rounding, whatever the batches and their order.
"""

import io
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checkpoint import write_file
from .data import DataError

if TYPE_CHECKING:
    from torch import distributed

BLOCK = 1024  # rows that are centred together, or as many as there are features: then the product dominates
STRIP = 256  # rows of a symmetric product that are computed together, from the diagonal on


class Moments:
    """Mean `[D]` and covariance `[D, D]` (over N − 1) of N feature rows, in float64.

    Attributes:
        count: N; None for statistics from a file that does not say.

    Fewer than D rows are kept as they are, which gives their covariance a thin factor. Time O(N·D²); memory O(D²), and O(N·D)
    for fewer than D rows.

    >>> moments = Moments()
    >>> for batch in torch.arange(12.0).reshape(3, 2, 2):
    ...     _ = moments.add(batch)
    >>> moments.mean(), moments.covariance()
    (tensor([5., 6.], dtype=torch.float64), tensor([[14., 14.],
            [14., 14.]], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count: int | None = 0
        self._rows: list[Tensor] = []
        self._folded: _Sums | None = None  # all that is not in `_rows`

    @torch.no_grad()
    def add(self, rows: Tensor) -> "Moments":
        """Adds feature rows `[N, D]`; the same D and device each time.

        Raises:
            ValueError: rows that do not fit or are not finite.
        """
        if rows.dim() != 2 or not rows.shape[1] or rows.shape[1] != (self.dimensions or rows.shape[1]):
            raise ValueError(f"Moments.add: rows must have shape [N, {self.dimensions or 'D'}], given {list(rows.shape)}; "
                             "flatten images to rows.")
        self._check_count("add")
        if not bool(rows.sum(dtype=torch.float64).isfinite()):  # NaN and ∞ both show in the sum
            raise ValueError("Moments.add: rows must be finite; look for NaN in the features.")
        block = max(rows.shape[1], BLOCK)
        for part in rows.detach().split(block) if len(rows) else ():
            self._rows.append(part.to(torch.float64, copy=True))
            self.count += len(part)
            if sum(map(len, self._rows)) >= block:
                self._fold()
        return self

    @torch.no_grad()
    def merge(self, other: "Moments") -> "Moments":
        """Adds the rows that `other` has collected; it stays as it is.

        Raises:
            ValueError: another D, or statistics without a count.
        """
        self._check_count("merge")
        other._check_count("merge")
        if self.dimensions and other.dimensions and self.dimensions != other.dimensions:
            raise ValueError(f"Moments.merge: {self.dimensions} features here, {other.dimensions} there.")
        kept, folded = tuple(other._rows), other._folded
        if folded is not None:
            own = _nothing(folded.mean) if self._folded is None else self._folded
            own.scatter.add_(folded.scatter)
            self._folded = _join(own, folded.count, folded.mean)
            self.count += folded.count
        for rows in kept:
            self.add(rows)
        return self

    @torch.no_grad()
    def all_reduce(self, group: "distributed.ProcessGroup | None" = None) -> "Moments":
        """Merges the rows of all processes of `group`: every process gets the moments of all rows.

        ValueError in every process if one has added no rows, or they differ in D.
        """
        from torch import distributed

        ranks = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(ranks, (self.count, self.dimensions), group)
        counts, dimensions = zip(*ranks, strict=True)
        if not all(counts) or len(set(dimensions)) > 1:
            raise ValueError("Moments.all_reduce: every process must have added rows of one number of features, given "
                             + ", ".join(f"{n or 'no'} rows of {d or 'unknown'}" for n, d in ranks) + ".")
        own, total = self._sums(), sum(counts)
        mean = own.mean * (own.count / total)
        distributed.all_reduce(mean, group=group)
        shift = own.mean - mean
        scatter = own.scatter.addr(shift, shift, alpha=own.count)
        distributed.all_reduce(scatter, group=group)
        self.count, self._rows, self._folded = total, [], _Sums(total, mean, scatter)
        return self

    def mean(self) -> Tensor:
        """`[D]`; ValueError without rows."""
        return torch.cat(self._rows).mean(0) if self._is_thin() else self._sums().mean

    def covariance(self) -> Tensor:
        """`[D, D]`, over N − 1; ValueError for fewer than two rows."""
        upper = self._upper_covariance()
        return upper.triu() + upper.triu(1).T

    @torch.no_grad()
    def factor(self) -> Tensor:
        """A `[D, r]` with A Aᵀ the covariance; r = N for N < D rows, else see `factor_covariance`."""
        if self._is_thin() and self.count > 1:
            rows = torch.cat(self._rows)
            return (rows - rows.mean(0)).T / math.sqrt(self.count - 1)
        return factor_covariance(self._upper_covariance().T)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the .npz file of pytorch-fid, arrays `mu` and `sigma`, with the `count` beside them."""
        arrays = {"mu": self.mean(), "sigma": self.covariance()}
        content = io.BytesIO()
        np.savez(content, **{name: t.cpu().numpy() for name, t in arrays.items()},
                 **({} if self.count is None else {"count": self.count}))
        write_file(Path(path), content.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Moments":
        """Reads a file of `save` or of pytorch-fid; the latter has no count, so that nothing can be added to it.

        Raises:
            DataError: no such file, or one without finite arrays `mu` `[D]` and `sigma` `[D, D]`.
        """
        arrays = read_arrays(path)
        if not {"mu", "sigma"} <= arrays.keys():
            raise DataError(f"{path} has no statistics: it holds {', '.join(arrays) or 'no arrays'}; looked for mu and sigma.")
        mean, covariance = (torch.from_numpy(np.atleast_1d(arrays[name]).astype(np.float64)) for name in ("mu", "sigma"))
        covariance = covariance.reshape(1, 1) if covariance.numel() == 1 else covariance
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise DataError(f"{path}: mu and sigma must have shapes [D] and [D, D], given {list(mean.shape)} and "
                            f"{list(covariance.shape)}.")
        if not bool(mean.isfinite().all() & covariance.isfinite().all()):
            raise DataError(f"{path}: mu and sigma must be finite; look for NaN in the features they are of.")
        self = cls()
        self.count = int(arrays["count"]) if "count" in arrays else None
        self._folded = _Sums(self.count, mean, covariance * (1 if self.count is None else self.count - 1))
        return self

    @property
    def dimensions(self) -> int | None:
        """D; None before the first rows."""
        known = self._rows[0].shape[1:] if self._rows else self._folded.mean.shape if self._folded else (None,)
        return known[0]

    def _is_thin(self) -> bool:
        return self._folded is None and 0 < self.count < self.dimensions

    def _sums(self, least: int = 1) -> "_Sums":
        if self.count is not None and self.count < least:
            raise ValueError(f"Moments: at least {least} rows are needed, given {self.count}.")
        if self._is_thin():
            return _add_rows(_nothing(self._rows[0][0]), torch.cat(self._rows))
        self._fold()
        return self._folded

    def _upper_covariance(self) -> Tensor:
        """The covariance on and above the diagonal."""
        return self._sums(2).scatter / (1 if self.count is None else self.count - 1)

    def _fold(self) -> None:
        if self._rows:
            sums = _nothing(self._rows[0][0]) if self._folded is None else self._folded
            self._folded = _add_rows(sums, torch.cat(self._rows) if len(self._rows) > 1 else self._rows[0])
            self._rows = []

    def _check_count(self, method: str) -> None:
        if self.count is None:
            raise ValueError(f"Moments.{method}: these statistics come from a file without the number of rows, so no rows can "
                             "join them; collect them anew, or write the file with Moments.save.")


class _Sums(NamedTuple):
    """Number of rows, their mean `[D]`, and on and above the diagonal their scatter matrix `[D, D]` about it."""

    count: int
    mean: Tensor
    scatter: Tensor


def _nothing(like: Tensor) -> _Sums:
    """The sums of no rows `[D]` like this one."""
    return _Sums(0, torch.zeros_like(like), like.new_zeros(len(like), len(like)))


def _add_rows(sums: _Sums, rows: Tensor) -> _Sums:
    """The sums with `rows` `[N, D]`, which it overwrites, as it does the scatter matrix."""
    mean = rows.mean(0)
    rows -= mean
    add_gram(sums.scatter, rows)
    return _join(sums, len(rows), mean)


def add_gram(target: Tensor, rows: Tensor) -> Tensor:
    """Adds rowsᵀ rows to `target` `[D, D]`, right on and above the diagonal only: little more than half of the products."""
    for first in range(0, len(target), STRIP):
        strip = slice(first, first + STRIP)
        target[strip, first:].addmm_(rows[:, strip].T, rows[:, first:])
    return target


def _join(sums: _Sums, count: int, mean: Tensor) -> _Sums:
    """The sums with `count` rows of that mean, whose own scatter matrix has been added."""
    total, shift = sums.count + count, mean - sums.mean
    sums.scatter.addr_(shift, shift, alpha=sums.count * count / total)
    return _Sums(total, sums.mean + shift * (count / total), sums.scatter)


def factor_covariance(covariance: Tensor) -> Tensor:
    """A `[D, r]` with A Aᵀ = `covariance` `[D, D]`, which may be singular; r is its numerical rank. Reads the lower triangle.

    Cholesky's triangle where there is one, D³/3 operations; otherwise eigenvectors scaled by the roots of their eigenvalues,
    where those up to D·eps times the largest, or negative, count as 0.
    """
    D, eps = len(covariance), torch.finfo(covariance.dtype).eps
    triangle, failed = torch.linalg.cholesky_ex(covariance)
    pivots = triangle.diagonal().square()
    if not failed and pivots.min() > D * eps * pivots.max():
        return triangle
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > D * eps * values[-1].clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an .npz file.

    Raises:
        DataError: there is none, or it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable .npz file ({error}).") from error

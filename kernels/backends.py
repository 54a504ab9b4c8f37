"""Which implementation serves a call.

In this order: the `backend=` argument of the call; `use_backend` / `set_backend`; the environment variable
LATENT_ENGINE_BACKEND, read once at import; the automatic choice, which takes the first backend of the op's table that
can serve the call. A forced backend that cannot serve the call raises `BackendError`; the automatic choice ends at the
reference, which serves everything, and `explain` tells why it got there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from . import native

BACKENDS = ("cpp", "cuda", "triton", "reference")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


@dataclass(frozen=True)
class Support:
    """What one backend of an op serves: the source of the errors, `explain`, the matrix and the tests' parameters."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    max_dim: int | None = None  # largest size of the last dimension of the first argument
    max_scales: int | None = None  # largest number of scales of a kernel function

    def rejection(self, x: Tensor, scales: int = 0) -> str | None:
        """Why `x`, with that many scales, cannot be served, or None."""
        if x.device.type not in self.devices:
            return f"serves {' and '.join(self.devices)} tensors, given a {x.device.type} tensor"
        if x.dtype not in self.dtypes:
            return f"serves {', '.join(str(t) for t in self.dtypes)}, given {x.dtype}"
        if self.max_dim is not None and x.shape[-1] > self.max_dim:
            return f"serves up to {self.max_dim} dimensions, given {x.shape[-1]}"
        if self.max_scales is not None and scales > self.max_scales:
            return f"serves up to {self.max_scales} scales, given {scales}"
        return None


@dataclass(frozen=True)
class Op:
    """One public op: its name, the primitive that a backend must have, and what each backend serves.

    `support` is in the order of the automatic choice; the reference serves every call and is not listed. What is missing
    here is looked up once, when the op is defined: its primitive must exist by then.
    """

    name: str
    primitive: str
    support: dict[str, Support]
    missing: dict[str, str | None] = field(init=False)
    unlimited: dict[tuple[str, torch.dtype], str] = field(init=False)  # automatic choices that no size can change

    def __post_init__(self) -> None:
        object.__setattr__(self, "missing", {b: native.missing(b, self.primitive) for b in self.support})
        object.__setattr__(self, "unlimited", {})
        for backend, support in reversed(self.support.items()):
            for key in () if self.missing[backend] else product(support.devices, support.dtypes):
                self.unlimited.pop(key, None)
                if support.max_dim is None and support.max_scales is None:
                    self.unlimited[key] = backend

    def rejection(self, backend: str, x: Tensor, scales: int = 0) -> str | None:
        """Why `backend` cannot serve a call whose first tensor is `x`, or None if it can."""
        if backend == "reference":
            return None
        if backend not in self.support:
            return f"has no {self.name} kernel"
        if self.missing[backend]:
            return self.missing[backend]
        if backend == "triton" and native.TRITON_INTERPRETED and x.device.type == "cpu":
            return None
        return self.support[backend].rejection(x, scales)

    def choose(self, x: Tensor, backend: str | None = None, scales: int = 0) -> str:
        """The backend for a call whose first tensor is `x`; raises `BackendError` if a forced one cannot serve it."""
        forced = backend or _forced
        if forced is None:
            if (chosen := self.unlimited.get((x.device.type, x.dtype))) is not None:
                return chosen
            for name in self.support:
                # The Triton interpreter is for tests: it serves CPU tensors only when asked for by name.
                if self.rejection(name, x, scales) is None and not (name == "triton" and x.device.type == "cpu"):
                    return name
            return "reference"
        _check_name(forced)
        reason = self.rejection(forced, x, scales)
        if reason:
            raise BackendError(f"{self.name}: the backend {forced!r} was asked for, but it {reason}. "
                               f"Leave `backend` out for the automatic choice, or use backend='reference'.")
        return forced


_ops: dict[str, Op] = {}
_forced: str | None = None


def register(op: Op) -> Op:
    """Makes an op known to `explain` and `backend_matrix`."""
    _ops[op.name] = op
    return op


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"Unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}.")


def set_backend(backend: str | None) -> None:
    """Forces `backend` ("cpp", "cuda", "triton" or "reference") for all later calls; None restores the automatic choice."""
    global _forced
    if backend is not None:
        _check_name(backend)
    _forced = backend


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Forces `backend` inside the `with` block, for the whole process; None means the automatic choice."""
    before = _forced
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def explain(op: str | Callable, *args: object, backend: str | None = None, **kwargs: object) -> dict[str, str]:
    """For each backend "chosen", "could serve this call" or the reason why it cannot.

    `op` is a public op or its name; the other arguments are those of the call, of which the first tensor and the number of
    `scales` decide.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _ops:
        raise ValueError(f"Unknown op {name!r}; the ops are {', '.join(_ops)}.")
    x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if x is None:
        raise TypeError(f"explain: needs the arguments of a call of {name}, tensors among them; given none.")
    found, scales = _ops[name], len(kwargs.get("scales") or ())
    chosen = found.choose(x, backend, scales)
    return {b: "chosen" if b == chosen else found.rejection(b, x, scales) or "could serve this call" for b in BACKENDS}


def backend_matrix() -> dict[str, dict[str, str]]:
    """Per op and backend: what it serves here, or why it is not there. Printed by `python -m latent_engine doctor`."""
    return {name: {b: _cell(op, b) for b in BACKENDS} for name, op in _ops.items()}


def _cell(op: Op, backend: str) -> str:
    if backend == "reference":
        return "any device, any float"
    if backend not in op.support:
        return "not written"
    support = op.support[backend]
    served = f"{'/'.join(support.devices)}: {', '.join(str(t).removeprefix('torch.') for t in support.dtypes)}"
    return f"{served} ({op.missing[backend]})" if op.missing[backend] else served


set_backend(os.environ.get("LATENT_ENGINE_BACKEND") or None)

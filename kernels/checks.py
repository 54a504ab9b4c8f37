"""Argument checks shared by the ops: one clear error that says what was given, what was expected and what to do."""

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64)
_WORKING = frozenset(FULL)  # has no == to ask of a dtype of NumPy
_is_autocast = torch._C._is_any_autocast_enabled


def checked_floats(op: str, like: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The floating-point `tensors`, of one device and of the dtype of the one called `like`, in the precision of the kernels.

    float32 under autocast; else half-precision ones as float32, except the first, the op's input, on CUDA, whose kernels
    read it as it is.
    """
    given = tuple(tensors.values())
    if are_alike(given):
        return given
    tensors = _working_precision(op, tensors)
    check_floats(op, like, tensors)
    return tuple(tensors.values())


def are_alike(tensors: tuple[Tensor, ...]) -> bool:
    """float32 or float64 all, on one device and outside autocast: the usual call, with nothing to convert or to complain of.

    What is cheap to run in here counts: between the layers of a network little of Python is left in the caches.
    """
    try:
        dtype, device = tensors[0].dtype, tensors[0].device
        for t in tensors[1:]:
            if t.dtype is not dtype or t.device != device:
                return False
    except AttributeError:
        return False
    return dtype in _WORKING and not _is_autocast()


def _working_precision(op: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `tensors`, converted. Beside float64 half-precision ones stay what they are, for `check_floats` to say so."""
    name, first = next(iter(tensors.items()))
    if not isinstance(first, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, given {type(first).__name__}.")
    device = first.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return {n: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in tensors.items()}
    dtypes = {getattr(t, "dtype", None) for t in tensors.values()}
    if dtypes.isdisjoint(HALF) or torch.float64 in dtypes:
        return tensors
    kept = first if device == "cuda" else None
    return {n: t.float() if isinstance(t, Tensor) and t.dtype in HALF and t is not kept else t for n, t in tensors.items()}


def check_floats(op: str, like: str, tensors: dict[str, Tensor]) -> None:
    """Floating point all, of one device and of the dtype of the one called `like`.

    Half-precision tensors pass beside float32 ones: kernels read them as float32.
    """
    standard = tensors[like]
    if not isinstance(standard, Tensor) or not standard.is_floating_point():
        given = standard.dtype if isinstance(standard, Tensor) else type(standard).__name__
        raise TypeError(f"{op}: {like} must be a floating-point tensor, given {given}.")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, given {type(tensor).__name__}.")
        if tensor.dtype != standard.dtype and not (tensor.dtype in HALF and standard.dtype == torch.float32):
            raise TypeError(f"{op}: {name} is {tensor.dtype} but {like} is {standard.dtype}; "
                            f"convert one of them, e.g. {name}.to({like}.dtype).")
        if tensor.device != standard.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {like} is on {standard.device}; "
                             f"move one of them, e.g. {name}.to({like}.device).")


def check_data(op: str, name: str, tensor: Tensor) -> None:
    """`tensor` is data: it requires no gradient, which it would not get."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, given {type(tensor).__name__}.")
    if tensor.requires_grad:
        raise ValueError(f"{op}: {name} is data and gets no gradient, but it requires one; pass {name}.detach().")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """`tensor` has exactly the shape `expected`; `meaning` spells it out, e.g. "[K]"."""
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {meaning} = {list(expected)}, given {list(tensor.shape)}.")


def check_mixture(op: str, z: Tensor, means: Tensor, log_weights: Tensor) -> None:
    """z[..., D], means[K, D] and log_weights[K] fit together."""
    if z.dim() == 0:
        raise ValueError(f"{op}: z must have shape [..., D], given a scalar.")
    if means.dim() != 2 or means.shape[1] != z.shape[-1]:
        raise ValueError(f"{op}: means must have shape [K, D] with D = {z.shape[-1]} as in z{list(z.shape)}, "
                         f"given {list(means.shape)}.")
    check_shape(op, "log_weights", log_weights, (means.shape[0],), "[K]")


def check_indices(op: str, name: str, indices: Tensor, low: int, high: int) -> None:
    """All of `indices` lie in [low, high): an error at once on CPU, an asynchronous device assert on CUDA.

    Compiled graphs do not check, nor does a call under vmap, whose batching rule checks the folded tensor.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(indices) or indices.numel() == 0:
        return
    if indices.device.type != "cpu":
        torch._assert_async(((indices >= low) & (indices < high)).all(), f"{op}: {name} must lie in [{low}, {high})")
        return
    smallest, largest = (int(v) for v in torch.aminmax(indices))
    if smallest < low or largest >= high:
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}), given values from {smallest} to {largest}.")


def is_positive(value: object) -> bool:
    """A finite number above zero; a tensor is none."""
    return isinstance(value, (int, float)) and 0 < value < float("inf")

"""Argument checks shared by the ops: one clear error that says what was given, what was expected and what to do."""

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def check_floats(op: str, **tensors: Tensor) -> None:
    """All floating point, one dtype, one device; the first tensor sets the standard.

    Half-precision tensors pass beside float32 ones: kernels read them as float32.
    """
    (first_name, first), *rest = tensors.items()
    if not isinstance(first, Tensor) or not first.is_floating_point():
        given = first.dtype if isinstance(first, Tensor) else type(first).__name__
        raise TypeError(f"{op}: {first_name} must be a floating-point tensor, given {given}.")
    for name, tensor in rest:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, given {type(tensor).__name__}.")
        if tensor.dtype != first.dtype and not (tensor.dtype in HALF and first.dtype == torch.float32):
            raise TypeError(f"{op}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; "
                            f"convert one of them, e.g. {name}.to({first_name}.dtype).")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; "
                             f"move one of them, e.g. {name}.to({first_name}.device).")


def working_precision(op: str, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The floating-point `tensors` in the precision that kernels compute in; the first, called `name`, is the op's input.

    float32 under autocast; else half-precision ones as float32, except the first on CUDA, whose kernels read it as it is.
    Beside float64 they stay what they are, for `check_floats` to say so.
    """
    first = tensors[0]
    if not isinstance(first, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, given {type(first).__name__}.")
    device = first.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return tuple(t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors)
    dtypes = {getattr(t, "dtype", None) for t in tensors}
    if dtypes.isdisjoint(HALF) or torch.float64 in dtypes:
        return tensors
    keep = device == "cuda"
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in HALF and not (keep and t is first) else t
                 for t in tensors)


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """`tensor` has exactly the shape `expected`; `meaning` spells it out, e.g. "[K]"."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {meaning} = {list(expected)}, given {list(tensor.shape)}.")


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

"""Registration of primitives with torch.library, and their autograd.

A primitive is a functional op `<name>` that backends implement: C++ and CUDA as `latent_engine::<name>` (compiled, one
dispatch key each), Triton as `latent_engine::triton_<name>` (the function `<name>` of `kernels/triton/<module>.py`,
imported at its first call). Schema and fake are defined here in Python, so that `torch.compile` sees one node whether or
not the compiled libraries are there.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

NAMESPACE = "latent_engine"
# Asked for at every call: by these names, since little of Python is left in the caches between the layers of a network.
is_compiling, is_transformed = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
_library = torch.library.Library(NAMESPACE, "DEF")
# The interpreter runs Triton kernels on CPU tensors.
_TRITON_KEYS = ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET") == "1" else ("CUDA",)


class Primitive:
    """One schema with a compiled and a Triton implementation.

    Args:
        module: file of the op in `kernels/triton/`.
        name: name of the primitive, and of the function in that file.
        signature: the schema after the name; functional, fresh outputs.
        fake: shapes and dtypes of the outputs from those of the inputs.
        tags: what passes over graphs must know of it.
    """

    def __init__(self, module: str, name: str, signature: str, fake: Callable, tags: Sequence[torch.Tag] = ()) -> None:
        def run_triton(*args: object) -> object:
            return getattr(importlib.import_module(f"{__package__}.triton.{module}"), name)(*args)

        self.compiled = self._define(name, signature, fake, tags)
        self.triton = self._define(f"triton_{name}", signature, fake, tags)
        for key in _TRITON_KEYS:
            _library.impl(f"triton_{name}", run_triton, key)

    def __call__(self, backend: str, *args: object) -> Any:
        return (self.triton if backend == "triton" else self.compiled)(*args)

    @staticmethod
    def _define(name: str, signature: str, fake: Callable, tags: Sequence[torch.Tag]) -> OpOverload:
        _library.define(name + signature, tags=tags)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default


class Differentiable:
    """A forward primitive with its autograd; call it with the backend's name and the primitive's arguments.

    Compiled graphs hold the primitive itself, with autograd registered on it. Eager calls go through an
    `autograd.Function`, which costs less than autograd in Python at the dispatcher.

    Args:
        forward, backward: the primitives; no backward where the forward one makes the gradients.
        save: `setup_context(ctx, inputs, output)` of both.
        gradients: `(ctx, backward_op, *output_gradients)` -> one gradient for each argument of `forward`.
        vmap: the batching rule `(call, info, in_dims, *args)`, where `call(*args)` runs the op on folded arguments; without
            one the op raises NotImplementedError under vmap.
    """

    def __init__(self, forward: Primitive, backward: Primitive | None, save: Callable, gradients: Callable,
                 vmap: Callable | None = None) -> None:
        self._compiled = self._wire(forward.compiled, backward and backward.compiled, save, gradients, vmap)
        self._triton = self._wire(forward.triton, backward and backward.triton, save, gradients, vmap)

    def __call__(self, backend: str, *args: object) -> Any:
        if is_compiling() or is_transformed():
            op, apply, *_ = self._triton if backend == "triton" else self._compiled
            return op(*args) if is_compiling() else apply(*args)
        return self.eager(backend, *args)

    def eager(self, backend: str, *args: object) -> Any:
        """The same where neither torch.compile nor a transform of torch.func looks on."""
        *_, run, apply = self._triton if backend == "triton" else self._compiled
        # `no_grad` leaves forward-mode AD on.
        return apply(*args) if torch.is_grad_enabled() or forward_ad._current_level >= 0 else run(*args)

    @staticmethod
    def _wire(forward_op: OpOverload, backward_op: OpOverload | None, save: Callable, gradients: Callable,
              batch: Callable | None) -> tuple[OpOverload, Callable, Callable, Callable]:
        """The op as compiled graphs hold it, its call under transforms of torch.func, without autograd, and with it."""
        def backward_(ctx, *grads):
            return gradients(ctx, backward_op, *grads)

        def run(*args):
            with torch._C._AutoDispatchBelowAutograd():  # autograd is that of the Functions
                return forward_op(*args)

        def no_tangents(ctx, *tangents):
            raise NotImplementedError(f"{forward_op}: forward-mode AD is not supported; use reverse mode, or "
                                      f"backend='reference'.")

        class Transformed(torch.autograd.Function):
            jvp = staticmethod(no_tangents)
            forward = staticmethod(run)
            setup_context = staticmethod(save)
            backward = staticmethod(backward_)

            @staticmethod
            def vmap(info, in_dims, *args):
                if batch is None:
                    raise NotImplementedError(f"{forward_op}: vmap is not supported; loop over the batches, or use "
                                              f"backend='reference'.")
                return batch(Transformed.apply, info, in_dims, *args)

        class Eager(torch.autograd.Function):  # without `setup_context` a call between layers takes 5 µs less
            backward = staticmethod(backward_)
            jvp = staticmethod(no_tangents)

            @staticmethod
            def forward(ctx, *args):
                outputs = run(*args)
                save(ctx, args, outputs)
                return outputs

        torch.library.register_autograd(forward_op, backward_, setup_context=save, lib=_library)
        # `Eager.apply` inspects the signature at every call, 14 µs, which only functorch transforms need.
        return forward_op, Transformed.apply, run, super(torch.autograd.Function, Eager).apply


def reference_gradients(reference: Callable, tensors: Sequence[Tensor], needs: Sequence[bool],
                        grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of `reference(*tensors)`, for double backward: one for each True in `needs`, else None.

    `grads` are the gradients of the outputs, None where one is unused.
    """
    wanted = [i for i, need in enumerate(needs) if need]

    def outputs_of(*inputs: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, tensor in zip(wanted, inputs, strict=True):
            arguments[i] = tensor
        outputs = reference(*arguments)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return tuple(o for o, g in zip(outputs, grads, strict=True) if g is not None)

    # Not autograd.grad: under torch.func's vjp and jacrev the saved tensors no longer require a gradient.
    _, gradients_of = torch.func.vjp(outputs_of, *(tensors[i] for i in wanted))
    found = iter(gradients_of(tuple(g for g in grads if g is not None)))
    return tuple(next(found) if need else None for need in needs)

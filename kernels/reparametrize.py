"""Samples of a diagonal Gaussian posterior by reparametrisation, and its KL divergence to N(0, I), in one pass.

For q(z | x_n) = N(μ_n, diag σ²_n), given as μ and v = log σ² (Kingma & Welling 2014, §2.4 and appendix B):

    z_snd = μ_nd + σ_nd ε_snd        KL_nd = ½ (μ²_nd + e^v_nd − 1 − v_nd)

Gradients, with g and k those that come in of z and KL:

    ∂μ_nd = Σ_s g_snd + k_nd μ_nd        ∂v_nd = ½ (σ_nd Σ_s g_snd ε_snd + k_nd (e^v_nd − 1))

Kernels take one exponential an element, σ = e^h for h = v/2, and with it u = e^h − 1 and u − h, each to full relative accuracy:
then e^v − 1 = u (u + 2), and e^v − 1 − v = u² + 2 (u − h) has no cancellation left, where the formula as written loses all
digits of the divergence of a posterior near the prior. Backward saves the arguments only. Noise may be given by keys, of which
it is a function (kernels/reference/noise.py): the C++ kernels make it where they need it, and again in the backward pass.
"""

import torch
from torch import Generator, Tensor

from .backends import Op, Support, register
from .checks import HALF, are_alike, check_data, check_shape, checked_floats
from .library import Differentiable, Primitive, is_compiling, is_transformed, reference_gradients
from .reference import reparametrize as reference
from .reference.noise import standard_normal


def noise_keys(samples: int | None = None, generator: Generator | None = None) -> Tensor:
    """Random keys of the noise of `reparametrize`, int64 on the CPU: `[samples]`, or `[]` of one sample without an axis.

    Each is 63 bits of `generator`, one of the CPU, or of PyTorch's default, which is thereby advanced: `torch.manual_seed`
    fixes the noise. What a key stands for is in kernels/reference/noise.py.
    """
    return torch.empty(() if samples is None else samples, dtype=torch.int64).random_(generator=generator)


def reparametrize(mean: Tensor, log_var: Tensor, noise: Tensor | None = None, *,
                  backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Samples z = mean + exp(log_var / 2) · noise, and the divergence KL(N(mean, exp(log_var)) ‖ N(0, 1)), in nats.

    Args:
        mean, log_var: `[N, D]`, or of any other shape, that of one another. Where they are the halves of an encoder's output,
            `encoder(x).chunk(2, 1)`, they are read in place.
        noise: ε, draws of N(0, 1): of the shape of `mean`, or `[S, ...]` with an axis of samples before it. It is data and gets
            no gradient: one that requires it is a ValueError. Or `noise_keys`, int64 of shape `[]` or `[S]`, a key for each
            sample: on a CPU the kernel then makes the noise, several times as fast as `torch.randn`, and keeps none of it. The
            same keys and shape give the same noise with every backend, up to rounding; other backends write it first. None: one
            sample, by PyTorch's default generator, on a CPU and not compiled the one of `noise_keys()`.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        z of the shape of the noise, and the divergence of each element, of the shape of `mean`: its sum over the latent
        dimensions is that of a row. float64 inputs give float64; float32, and bfloat16 and float16, give float32, as does
        everything under autocast.

    Differentiable, twice, in mean and log_var; a result that is not used costs nothing. Time O(S·N·D), and nothing is kept for
    the backward pass but the arguments. The divergence is accurate relative to itself, also next to that of the prior. A NaN
    spoils its element only. The same inputs give the same bits, at any number of threads.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or the noise requires a gradient.
        BackendError: the backend asked for cannot serve the call.

    >>> reparametrize(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]))
    (tensor([[1., 3.]]), tensor([[0.5000, 0.5000]]))
    """
    op = "reparametrize"
    if noise is None:
        if are_alike((mean, log_var)) and _is_drawn_within(mean, log_var, backend):
            z, kl, _ = _reparametrize_drawn.eager("cpp", mean, log_var)
            return z, kl
        noise = _draw(mean)
    keyed = _are_keys(noise)
    if not are_alike((mean, log_var) if keyed else (mean, log_var, noise)):
        given = {} if keyed else {"noise": noise}
        mean, log_var, *rest = checked_floats(op, "log_var", mean=mean, log_var=log_var, **given)
        noise = rest[0] if rest else noise
    check_data(op, "noise", noise)
    shape = mean.shape
    shape_of_z = noise.shape + shape if keyed else noise.shape
    if log_var.shape != shape:
        check_shape(op, "log_var", log_var, tuple(shape), "that of mean")
    if shape_of_z != shape and shape_of_z[1:] != shape:
        raise ValueError(f"{op}: noise must have the shape of mean = {list(shape)}, or [S, ...] with an axis of samples before "
                         f"it, or be int64 keys of shape [] or [S]; given {list(noise.shape)} of {noise.dtype}.")
    if keyed and noise.device != mean.device:
        noise = noise.to(mean.device)

    is_matrix = len(shape) == 2
    if not is_matrix:
        mean, log_var, noise = _as_rows(mean, log_var, noise)
    name = OP.choose(mean, backend)
    if keyed and name != "cpp":
        noise = standard_normal(noise, mean.shape, log_var.dtype)
    z, kl = _reference(mean, log_var, noise) if name == "reference" else _reparametrize(name, mean, log_var, noise)
    return (z, kl) if is_matrix else (z.reshape(shape_of_z), kl.reshape(shape))


def _is_drawn_within(mean: Tensor, log_var: Tensor, backend: str | None) -> bool:
    """Whether the kernel may draw the key by itself; compiled graphs and transforms have to see that there is chance."""
    return (OP.choose(mean, backend) == "cpp" and mean.dim() == 2 and mean.shape == log_var.shape
            and not is_compiling() and not is_transformed())


def _draw(mean: Tensor) -> Tensor:
    if not isinstance(mean, Tensor) or (mean.device.type == "cpu" and not is_compiling()):
        return noise_keys()
    dtype = torch.float32 if mean.dtype in HALF else mean.dtype
    return torch.randn(mean.shape, dtype=dtype, device=mean.device)


def _are_keys(noise: Tensor) -> bool:
    return isinstance(noise, Tensor) and noise.dtype == torch.int64


def _as_rows(mean: Tensor, log_var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean and log_var as [N, D], noise as [N, D] or [S, N, D]: halves of images of channels are views, too. Keys stay."""
    shape = mean.shape
    rows = (shape[0], shape[1:].numel()) if len(shape) > 2 else (1, shape.numel())
    if not _are_keys(noise):
        noise = noise.reshape(*noise.shape[:noise.dim() - mean.dim()], *rows)
    return mean.reshape(rows), log_var.reshape(rows), noise


def _reference(mean, log_var, noise):
    noise = standard_normal(noise, mean.shape, log_var.dtype) if _are_keys(noise) else noise
    return reference.reparametrize(mean.to(log_var.dtype), log_var, noise)


def _fake_fwd(mean, log_var, noise):
    shape = noise.shape + log_var.shape if _are_keys(noise) else noise.shape
    return log_var.new_empty(shape), log_var.new_empty(log_var.shape)


def _fake_drawn_fwd(mean, log_var):
    return log_var.new_empty(mean.shape), log_var.new_empty(mean.shape), log_var.new_empty((), dtype=torch.int64)


def _fake_bwd(grad_z, grad_kl, mean, log_var, noise, need_mean, need_log_var):
    return (mean.new_empty(mean.shape if need_mean else (0, 0)), log_var.new_empty(log_var.shape if need_log_var else (0, 0)))


# mean, log_var: [N, D]; noise: [N, D] or [S, N, D], in C++ also keys, [] or [S]. One of the two incoming gradients may be None.
# Gradients not needed come back empty.
FWD = Primitive("reparametrize", "reparametrize_fwd", "(Tensor mean, Tensor log_var, Tensor noise) -> (Tensor, Tensor)",
                _fake_fwd)
BWD = Primitive("reparametrize", "reparametrize_bwd", "(Tensor? grad_z, Tensor? grad_kl, Tensor mean, Tensor log_var, "
                "Tensor noise, bool need_mean, bool need_log_var) -> (Tensor, Tensor)", _fake_bwd)

# One sample, whose key, the last output, it draws: between the layers of a network 30 µs less than two calls from Python.
DRAWN_FWD = Primitive("reparametrize", "reparametrize_drawn_fwd", "(Tensor mean, Tensor log_var) -> (Tensor, Tensor, Tensor)",
                      _fake_drawn_fwd, tags=(torch.Tag.nondeterministic_seeded,))

# On CPU the half-precision arguments reach the kernels as float32.
OP = register(Op("reparametrize", "reparametrize_fwd", {
    "cpp": Support(("cpu",), (torch.float32, torch.float64, *HALF)),
    "triton": Support(("cuda",), (torch.float32, *HALF)),
    "cuda": Support(("cuda",), (torch.float32, *HALF)),
}))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _save_drawn(ctx, inputs, output) -> None:
    _save(ctx, (*inputs, output[2]), output)
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, bwd, grad_z, grad_kl, *_):
    tensors, (need_mean, need_log_var, *others) = ctx.saved_tensors, ctx.needs_input_grad
    nothing = (None,) * len(others)  # of given noise
    if grad_z is None and grad_kl is None:
        return None, None, *nothing
    if torch.is_grad_enabled():  # double backward
        found = reference_gradients(_reference, tensors, (need_mean, need_log_var, False), (grad_z, grad_kl))
        return *found[:2], *nothing
    dmean, dlog_var = bwd(grad_z, grad_kl, *tensors, need_mean, need_log_var)
    return dmean if need_mean else None, dlog_var if need_log_var else None, *nothing


def _vmap(call, info, in_dims, mean, log_var, noise):
    """A batch axis joins the rows. All of a batch have the noise of one key."""
    size = info.batch_size

    def fold(t, dim):
        t = t.unsqueeze(-3).expand(*t.shape[:-2], size, *t.shape[-2:]) if dim is None else t.movedim(dim, -3)
        return t.flatten(-3, -2)

    rows, dims = (mean if in_dims[0] is None else mean.movedim(in_dims[0], 0)).shape[-2:]
    if _are_keys(noise):
        noise = standard_normal(noise, (rows, dims), log_var.dtype)
    z, kl = call(*(fold(t, d) for t, d in zip((mean, log_var, noise), in_dims, strict=True)))
    z, kl = z.unflatten(-2, (size, rows)), kl.unflatten(-2, (size, rows))
    return (z, kl), (z.dim() - 3, 0)


_reparametrize = Differentiable(FWD, BWD, _save, _gradients, _vmap)
_reparametrize_drawn = Differentiable(DRAWN_FWD, BWD, _save_drawn, _gradients)

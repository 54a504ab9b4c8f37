"""What mixtures of diagonal and of full covariances promise alike: tests of both call these with their op."""

import torch

from oracles import assert_within_budget, longdouble


def responsibilities_and_their_gradient(op, inputs, names, backend):
    """Both within the budget of the plain formula; inputs of 21 points and 70 components."""
    device = inputs[0].device
    weights = torch.randn(21, 70, generator=torch.Generator().manual_seed(4)).to(device)

    def gradients(backend, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        log_prob, resp = op(*leaves, responsibilities=True, backend=backend)
        return resp, torch.autograd.grad((resp * weights).sum() + log_prob.sum(), leaves)

    resp, grads = gradients(backend, torch.float32)
    direct, direct_grads = gradients("reference", torch.float32)
    exact, exact_grads = gradients("reference", torch.float64)
    torch.testing.assert_close(resp.sum(1), torch.ones(21, device=device))
    assert_within_budget("responsibilities", resp.detach(), direct.detach(), longdouble(exact))
    for name, a, d, e in zip(names, grads, direct_grads, exact_grads, strict=True):
        assert_within_budget(name, a, d, longdouble(e))


def only_needed_gradients(op, inputs, gradients, backend):
    """Each alone, and equal to that of `gradients`, which are all."""
    for i, expected in enumerate(gradients):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        op(*leaves, backend=backend).sum().backward()
        assert [t.grad is not None for t in leaves] == [j == i for j in range(len(leaves))]
        torch.testing.assert_close(leaves[i].grad, expected)

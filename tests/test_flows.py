"""Flows: inverse and determinant against autograd, causality, and densities that integrate to one."""

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

from latent_engine.flows import MADE, AutoregressiveFlow, RealNVP
from latent_engine.priors import FlowPrior, StandardNormal

KINDS = {"autoregressive": AutoregressiveFlow, "realnvp": RealNVP}


def scrambled(module, scale=0.5):
    """`module` in float64 with random parameters, none of which is at its initial zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.double().parameters():
            p.normal_(std=scale)
    return module


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("context", [0, 3], ids=["alone", "context"])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_determinant_and_inverse_are_exact(kind, dim, context):
    flow = scrambled(kind(dim, 3, (16, 9), context))
    z, c = torch.randn(4, 3, dim, dtype=torch.float64), torch.randn(3, context, dtype=torch.float64)
    u, log_det = flow(z, c)
    again, inverse_log_det = flow.inverse(u, c)
    torch.testing.assert_close(again, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det)
    for row, condition, found in zip(z[0], c, log_det[0], strict=True):
        matrix = jacobian(lambda t, condition=condition: flow(t, condition)[0], row)
        assert found.item() == pytest.approx(np.linalg.slogdet(matrix)[1], abs=1e-9)
    assert log_det.std() > 0.1 or dim + context == 1


@pytest.mark.parametrize("hidden", [(), (12,), (12, 17)], ids=["direct", "one", "two"])
@pytest.mark.parametrize("degrees", [[1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 2, 1]], ids=["forward", "reverse", "coupling"])
def test_outputs_see_exactly_the_dimensions_of_lower_degree(degrees, hidden):
    made = scrambled(MADE(4, hidden, outputs=3, degrees=torch.tensor(degrees), context=2))
    c = torch.randn(2, dtype=torch.float64)
    reach = sum(jacobian(lambda z: made(z, c), torch.randn(4, dtype=torch.float64)).abs() for _ in range(20))
    expected = torch.tensor(degrees)[:, None] > torch.tensor(degrees)
    assert torch.equal(reach > 0, expected.expand(3, 4, 4))
    of_context = sum(jacobian(lambda c: made(torch.randn(4, dtype=torch.float64), c), c).abs() for _ in range(20))
    assert (of_context > 0).all()


def test_the_first_dimension_without_context_is_constant():
    made = scrambled(MADE(1, (7,)))
    assert torch.equal(made(torch.tensor([[-2.0], [3.0]], dtype=torch.float64))[0], made(torch.zeros(1, dtype=torch.float64)))


def test_reversed_orders_make_every_dimension_depend_on_every_other(kind):
    flow = scrambled(kind(4, 3, (16,)))
    reach = sum(jacobian(lambda z: flow(z)[0], torch.randn(4, dtype=torch.float64)).abs() for _ in range(20))
    assert (reach > 0).all()


def test_gradients_of_both_directions(kind):
    flow = scrambled(kind(3, 2, (7,), 2))
    z, c = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    torch.autograd.gradcheck(flow, (z, c))
    torch.autograd.gradcheck(flow.inverse, (z, c))


def test_far_points_stay_finite_and_come_back(kind):
    flow = scrambled(kind(40, 8, (64,)), scale=0.2).float()
    z = torch.tensor([[0.0], [1e3], [1e6]]).expand(3, 40).clone().requires_grad_()
    u, log_det = flow(z)
    assert u.isfinite().all() and log_det.isfinite().all() and log_det.abs().max() <= 2 * 8 * 40
    (u.square().sum() - log_det.sum()).backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters()) and z.grad.isfinite().all()
    assert flow.inverse(torch.full((2, 40), 1e3))[0].isfinite().all()


@pytest.mark.parametrize("prior", ["maf", "iaf", "realnvp"])
def test_a_flow_prior_is_normalised_and_its_samples_follow_its_density(prior):
    axis = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    line = scrambled(FlowPrior(1, prior, 3, (6,)), scale=0.3)
    assert np.trapezoid(line(axis[:, None]).detach().exp(), axis) == pytest.approx(1, abs=1e-6)

    plane = scrambled(FlowPrior(2, prior, 3, (6,)), scale=0.1)
    axis = torch.linspace(-20, 20, 501, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = plane(grid).detach().exp().reshape(501, 501).numpy()
    assert np.trapezoid(np.trapezoid(density, axis), axis) == pytest.approx(1, abs=1e-4)

    z = plane.sample(20_000, torch.Generator().manual_seed(0))
    assert z.shape == (20_000, 2) and not z.requires_grad
    cell = (axis[1] - axis[0]).item() ** 2
    for statistic in (lambda z: z, lambda z: z.square(), lambda z: z[:, :1] * z[:, 1:]):
        expected = (statistic(grid) * torch.from_numpy(density).reshape(-1, 1)).sum(0) * cell
        error = statistic(z).std(0) / 20_000**0.5
        assert ((statistic(z).mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("prior", ["maf", "iaf", "realnvp"])
def test_a_flow_prior_starts_from_the_standard_normal_and_learns(prior):
    torch.manual_seed(0)
    flow, data = FlowPrior(2, prior, 4, (16,)), torch.randn(500, 2)
    data = torch.stack([data[:, 0], 0.3 * data[:, 1] + data[:, 0].square()], 1)
    torch.testing.assert_close(flow(data), StandardNormal(2)(data))
    before, optimizer = flow(data).mean(), torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        (-flow(data).mean()).backward()
        optimizer.step()
    exact = StandardNormal(1)(data[:, :1]) + torch.distributions.Normal(data[:, 0].square(), 0.3).log_prob(data[:, 1])
    assert flow(data).mean() > before + 1 and flow(data).mean() > exact.mean() - 0.3


def test_an_unknown_flow_is_refused():
    with pytest.raises(ValueError, match="kind must be one of maf, iaf, realnvp, conv, given 'glow'"):
        FlowPrior(2, "glow")

"""Network layers against PyTorch's."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from latent_engine.networks import AffineBridge, UpConv2d, mlp, residual_decoder


def pair(channels, dtype=torch.float64):
    """UpConv2d and nn.ConvTranspose2d from the same seed."""
    layers = []
    for build in (lambda: UpConv2d(5, channels), lambda: nn.ConvTranspose2d(5, channels, 4, stride=2, padding=1)):
        torch.manual_seed(0)
        layers.append(build().to(dtype))
    return layers


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_up_conv_is_conv_transpose(channels, training, memory_format):
    """Parameters by name and value, outputs, and every gradient: `[N, 5, 7, 4]` -> `[N, channels, 14, 8]`."""
    ours, theirs = (layer.train(training) for layer in pair(channels))
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    assert all(torch.equal(ours_state[name], theirs_state[name]) for name in ours_state)
    x = torch.randn(3, 5, 7, 4, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn(3, channels, 14, 8, dtype=torch.float64)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (x, *ours.parameters()), grad),
                               torch.autograd.grad(expected, (x, *theirs.parameters()), grad))


def test_up_conv_in_float32_is_as_accurate_as_conv_transpose():
    ours, theirs = pair(1, torch.float32)
    x = torch.randn(8, 5, 14, 14)
    exact = copy.deepcopy(theirs).double()(x.double())
    assert (ours(x) - exact).norm() <= 2 * (theirs(x) - exact).norm() + 4 * torch.finfo(torch.float32).eps * exact.norm()


def test_up_conv_runs_under_autocast():
    decoder = nn.Sequential(nn.Conv2d(1, 5, 1), UpConv2d(5, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(torch.zeros(2, 1, 7, 7)).dtype == torch.bfloat16


def test_up_conv_in_eval_mode_has_forward_derivatives():
    layer, x = pair(1)[0].eval(), torch.randn(2, 5, 3, 3, dtype=torch.float64)
    tangent = torch.func.jvp(layer, (x,), (x,))[1]
    torch.testing.assert_close(tangent, layer(x) - layer.bias)  # linear up to the bias


def test_a_residual_decoder_has_three_blocks_of_two_layers():
    decoder = residual_decoder(2, (1, 3, 5), width=7).double()
    state = [value.numpy() for value in decoder.state_dict().values()]
    shapes = [value.shape for value in state]
    assert shapes == [(7, 2), (7,), *[(7, 7), (7,)] * 6, (15, 7), (15,)]
    z = torch.randn(4, 2, dtype=torch.float64)
    h = z.numpy() @ state[0].T + state[1]
    for first in (2, 6, 10):
        weight1, bias1, weight2, bias2 = state[first:first + 4]
        h = h + np.maximum(np.maximum(h, 0) @ weight1.T + bias1, 0) @ weight2.T + bias2
    expected = np.maximum(h, 0) @ state[-2].T + state[-1]
    np.testing.assert_allclose(decoder(z).detach().flatten(1), expected)


def test_an_affine_bridge_is_a_head_that_sees_the_input_too():
    bridge = AffineBridge(nn.Sequential(*mlp([2, 7, 15]), nn.Unflatten(1, (1, 3, 5))), 2, 15)
    z = torch.randn(4, 2)
    *hidden, head, _ = bridge.network
    wide = torch.cat([nn.Sequential(*hidden)(z), z], 1)
    expected = wide @ torch.cat([head.weight, bridge.bridge.weight], 1).T + head.bias
    torch.testing.assert_close(bridge(z), expected.view(4, 1, 3, 5))

"""Residual networks and weight normalisation: sizes, the formula, and the start from data."""

import numpy as np
import pytest
import torch
from torch import nn

from latent_engine.causal import masked_conv
from latent_engine.resnet import ResidualBlock, resnet_decoder, resnet_encoder
from latent_engine.weight_norm import starting, weight_norm


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 28, 20), (2, 9, 3), (1, 1, 1)])
def test_networks_have_the_shape_of_the_images(shape):
    encoder, decoder = resnet_encoder(shape, 6, 2), resnet_decoder(3, shape, 2)
    assert encoder(torch.zeros(2, *shape)).shape == (2, 6)
    assert decoder(torch.zeros(2, 3)).shape == (2, *shape)


def test_the_paper_s_widths_are_the_default():
    for network, channels in ((resnet_encoder((1, 28, 28), 64), [32, 64, 64]), (resnet_decoder(32, (1, 28, 28)), [64, 32, 32])):
        blocks = [module for module in network if isinstance(module, ResidualBlock)]
        assert [block.inner.out_channels for block in blocks] == channels
        (whole,) = (m for m in network if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and m.kernel_size == (4, 4))
        assert {whole.in_channels, whole.out_channels} == {64, 512}


def test_a_residual_block_adds_its_skip_before_the_last_elu():
    torch.manual_seed(0)
    block, x = resnet_encoder((2, 5, 7), 3, 4)[0], torch.randn(3, 2, 5, 7)
    inner = nn.functional.conv2d(nn.functional.elu(block.outer(x)), block.inner.weight, block.inner.bias, padding=1)
    expected = nn.functional.elu(inner + nn.functional.conv2d(x, block.skip.weight, block.skip.bias, 2, 1))
    torch.testing.assert_close(block(x), expected)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4), 0),
    "convolution": (lambda: nn.Conv2d(4, 3, 3), (5, 4, 6, 7), 0),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, 2), (5, 4, 6, 7), 1),
    "causal": (lambda: masked_conv(4, 3, 5, False), (5, 6, 7, 4), 0),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_of_a_layer_start_with_mean_zero_and_variance_one(kind):
    torch.manual_seed(0)
    build, shape, axis = LAYERS[kind]
    layer, x = weight_norm(build()).double(), 2 + 3 * torch.randn(shape, dtype=torch.float64)
    with starting(layer) as found:
        first = layer(x)
    assert found
    torch.testing.assert_close(layer(x), first)
    values = first.detach().movedim(-1 if kind in ("linear", "causal") else 1, 0).reshape(3, -1).numpy()
    np.testing.assert_allclose(values.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(values.var(1), 1)
    gain, v = (getattr(layer.parametrizations.weight, f"original{i}").detach().numpy() for i in (0, 1))
    norm = np.sqrt(np.square(v).sum(tuple(i for i in range(v.ndim) if i != axis), keepdims=True))
    np.testing.assert_allclose(layer.weight.detach(), gain * v / norm)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_all_layers_of_a_network_start_in_one_pass(kind):
    torch.manual_seed(0)
    network = resnet_encoder((1, 9, 8), 6, 4) if kind == "encoder" else resnet_decoder(5, (1, 9, 8), 4)
    x, outputs = torch.randn(200, *((1, 9, 8) if kind == "encoder" else (5,))), []
    with starting(network):
        network(x)
    layers = [module for module in network.modules() if hasattr(module, "parametrizations")]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    network(x)
    assert len(outputs) == len(layers) > 10
    for output in outputs:
        axes = [i for i in range(output.dim()) if i != 1]
        torch.testing.assert_close(output.mean(axes), torch.zeros(output.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(output.var(axes, correction=0), torch.ones(output.shape[1]), atol=1e-3, rtol=0)


def test_an_output_that_does_not_vary_keeps_its_gain():
    layer = weight_norm(nn.Linear(3, 2))
    gain, x = layer.parametrizations.weight.original0.detach().clone(), torch.ones(4, 3)
    with starting(layer):
        layer(x)
    assert torch.equal(layer.parametrizations.weight.original0, gain)
    torch.testing.assert_close(layer(x), torch.zeros(4, 2), atol=1e-6, rtol=0)


def test_networks_without_gains_are_left_alone():
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    before = layer(x)
    with starting(layer) as found:
        assert torch.equal(layer(x), before)
    assert not found

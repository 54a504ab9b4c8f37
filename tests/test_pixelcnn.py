"""PixelCNN decoders: causal convolutions against masked ones, causality, normalisation, and samples of known noise."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from latent_engine.bench.pixelcnn_sampling import full_passes
from latent_engine.pixelcnn import CausalConv2d, PixelCNN

PAPER, CODE = (7, 7, 5, 5, 3, 3), (7, 7, 7, 5, 5, 3, 3)


def decoder(shape=(1, 5, 4), kernels=(5, 3, 3), dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    return PixelCNN(3, shape, kernels, **{"width": 6, "features": 2, **sizes}).to(dtype)


@pytest.mark.parametrize(("kernel", "centre"), [(1, True), (3, True), (3, False), (5, False), (7, True)])
@pytest.mark.parametrize("sides", [(6, 9), (2, 3), (1, 1)])
def test_a_causal_convolution_is_a_masked_one(kernel, centre, sides):
    torch.manual_seed(0)
    conv, x = CausalConv2d(3, 4, kernel, centre).double(), torch.randn(2, *sides, 3, dtype=torch.float64)
    masked = torch.zeros(4, 3, kernel, kernel, dtype=torch.float64)
    last = kernel * kernel // 2 + centre
    for tap in range(last):
        masked[:, :, tap // kernel, tap % kernel] = conv.weight.view(4, last, 3)[:, tap]
    expected = F.conv2d(x.movedim(-1, 1), masked, conv.bias, padding=kernel // 2).movedim(1, -1)
    torch.testing.assert_close(conv(x), expected)


def reach(height, width, kernels):
    """`[pixels, pixels]`: which pixels a pixel sees through windows one after another, the first one without itself."""
    rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    far = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    seen = torch.ones(height * width, height * width).tril(-1) * (far <= kernels[0] // 2)
    for kernel in kernels[1:]:
        seen = torch.ones_like(seen).tril() * (far <= kernel // 2) @ seen
    return seen > 0


@pytest.mark.parametrize("kernels", [PAPER, CODE, (3,)], ids=["paper", "code", "one"])
@pytest.mark.parametrize("shape", [(1, 4, 9), (2, 5, 3)])
def test_outputs_depend_on_the_pixels_before_them_that_windows_reach_and_on_no_other(kernels, shape):
    network = decoder(shape, kernels)
    z, x = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, *shape, dtype=torch.float64)
    of_z, of_x = torch.autograd.functional.jacobian(lambda z, x: network(z, x).squeeze(0), (z, x))
    pixels = shape[1] * shape[2]
    by_pixel = of_x.abs().view(shape[0], pixels, shape[0], pixels).sum((0, 2))
    assert (by_pixel.triu() == 0).all()
    assert torch.equal(by_pixel > 0, reach(*shape[1:], kernels))
    assert (of_z.abs().sum((0, 3, 4)) > 0).all()


def test_probabilities_of_all_images_sum_to_one_and_are_those_of_the_draws():
    network, z = decoder((1, 2, 3)), torch.randn(1, 3, dtype=torch.float64)
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64).view(64, 1, 2, 3)
    with torch.no_grad():
        for p in network.head.parameters():
            p.mul_(2)
        logits = network(z.expand(64, 3), images)
    p = torch.where(images == 1, logits.sigmoid(), 1 - logits.sigmoid()).flatten(1).prod(1)
    assert p.sum().item() == pytest.approx(1, abs=1e-12) and p.max() > 3 * p.min()
    noise = torch.rand(20_000, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = network.draw(z.expand(20_000, 3), noise).x.flatten(1) @ torch.tensor([32, 16, 8, 4, 2, 1], dtype=torch.float64)
    np.testing.assert_allclose(np.bincount(drawn.long(), minlength=64) / 20_000, p, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "kernels"), [((1, 28, 28), (7, 5, 3)), ((1, 5, 4), PAPER), ((2, 3, 7), CODE),
                                                ((1, 1, 1), (3, 3)), ((1, 6, 1), (5, 3))])
def test_drawing_pixel_by_pixel_gives_the_images_of_full_passes(shape, kernels, dtype):
    network, n = decoder(shape, kernels, dtype), 1 if shape[1] == 28 else 3
    z, noise = torch.randn(n, 3, dtype=dtype), torch.rand(n, *shape, dtype=dtype)
    found, expected = network.draw(z, noise), full_passes(network, z, noise)
    assert torch.equal(found.x, expected.x)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.logits, network(z, found.x).detach())
    assert found.x.unique().tolist() in ([0.0], [1.0], [0.0, 1.0]) and not found.logits.requires_grad


def test_an_image_depends_on_its_own_z_and_noise_alone():
    network = decoder()
    z, noise = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 1, 5, 4, dtype=torch.float64)
    assert torch.equal(network.draw(z, noise).x[2:3], network.draw(z[2:3], noise[2:3]).x)
    assert network.draw(z[:0], noise[:0]).x.shape == (0, 1, 5, 4)


@pytest.mark.parametrize(("build", "words"), [
    (lambda: PixelCNN(3, (1, 4, 4), (4, 3)), "odd kernel, from 3 on without the centre; given 4"),
    (lambda: PixelCNN(3, (1, 4, 4), (1, 3)), "odd kernel, from 3 on without the centre; given 1"),
    (lambda: PixelCNN(3, (1, 4, 4), ()), "at least one convolution: kernels is empty"),
    (lambda: PixelCNN(3, (1, 4, 4), width=0), "width must be at least 1, given 0"),
])
def test_networks_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()

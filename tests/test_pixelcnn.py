"""PixelCNN decoders: causal convolutions against masked ones, causality, normalisation, and samples of known noise."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from latent_engine.bench.pixelcnn_sampling import LATENT_DIM, full_passes, measure
from latent_engine.causal import CausalConv2d, Window, masked_conv
from latent_engine.pixelcnn import PixelCNN

PAPER, CODE = (7, 7, 5, 5, 3, 3), (7, 7, 7, 5, 5, 3, 3)


def decoder(shape=(1, 5, 4), kernels=(5, 3, 3), dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    return PixelCNN(3, shape, kernels, **{"width": 6, "features": 2, **sizes}).to(dtype)


@pytest.mark.parametrize(("kernel", "centre"), [(1, True), (3, True), (3, False), (5, False), (7, True)])
@pytest.mark.parametrize("sides", [(6, 9), (2, 3), (1, 1)])
def test_a_masked_convolution_has_the_weights_before_its_centre(kernel, centre, sides):
    torch.manual_seed(0)
    conv, x = masked_conv(3, 4, kernel, centre).double(), torch.randn(2, *sides, 3, dtype=torch.float64)
    masked = torch.zeros(4, 3, kernel, kernel, dtype=torch.float64)
    last = kernel * kernel // 2 + centre
    for tap in range(last):
        masked[:, :, tap // kernel, tap % kernel] = conv.weight.view(4, last, 3)[:, tap]
    expected = F.conv2d(x.movedim(-1, 1), masked, conv.bias, padding=kernel // 2).movedim(1, -1)
    torch.testing.assert_close(conv(x), expected)


WINDOWS = {"down": (1, 1, 1, 3), "down-right": (1, 1, 0, 2), "above": (2, 1, 1, 0), "wide": (1, 0, 3, 1)}


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("sides", [(6, 5), (1, 2)])
def test_a_window_gives_the_outputs_of_a_convolution_by_rows_and_by_pixels(kind, sides):
    torch.manual_seed(0)
    (above, left, right, last), (height, width) = WINDOWS[kind], sides
    conv, x = CausalConv2d(3, 4, above, left, right, last).double(), torch.randn(2, *sides, 3, dtype=torch.float64)
    expected = torch.empty(2, *sides, 4, dtype=torch.float64)
    padded = np.pad(x.numpy(), ((0, 0), (above, 0), (left, right), (0, 0)))
    for row, column in np.ndindex(sides):
        seen = padded[:, row:row + above + 1, column:column + left + 1 + right].reshape(2, -1)[:, :conv.in_features]
        expected[:, row, column] = conv.bias.detach() + torch.from_numpy(seen) @ conv.weight.detach().T
    torch.testing.assert_close(conv(x).detach(), expected)
    by_row, by_pixel = Window(conv, 2, width), Window(conv, 2, width)
    with torch.no_grad():
        for row in range(height):
            by_row.next_row()
            by_pixel.next_row()
            torch.testing.assert_close(by_row.row(x[:, row]), expected[:, row])
            for column in range(width):
                by_pixel.write(column, x[:, row, column])
                if last <= left + 1:
                    torch.testing.assert_close(by_pixel.read(column), expected[:, row, column])


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
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.output, network(z, found.x).detach())
    assert found.x.unique().tolist() in ([0.0], [1.0], [0.0, 1.0]) and not found.output.requires_grad


def test_an_image_depends_on_its_own_z_and_noise_alone():
    network = decoder()
    z, noise = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 1, 5, 4, dtype=torch.float64)
    assert torch.equal(network.draw(z, noise).x[2:3], network.draw(z[2:3], noise[2:3]).x)
    assert network.draw(z[:0], noise[:0]).x.shape == (0, 1, 5, 4)


def test_the_benchmark_times_both_ways_to_draw():
    network = PixelCNN(LATENT_DIM, (1, 3, 4), (3, 3), width=4)
    for n in (2, 16):
        times = measure(network, n, rounds=2)
        assert len(times) == 2 and min(t.median for t in times.values()) > 0


@pytest.mark.parametrize(("build", "words"), [
    (lambda: PixelCNN(3, (1, 4, 4), (4, 3)), "needs an odd kernel, given 4"),
    (lambda: PixelCNN(3, (1, 4, 4), (1, 3)), "1×1 without its centre has none"),
    (lambda: PixelCNN(3, (1, 4, 4), ()), "at least one convolution: kernels is empty"),
    (lambda: PixelCNN(3, (1, 4, 4), width=0), "width must be at least 1, given 0"),
])
def test_networks_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()

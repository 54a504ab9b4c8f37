"""FID from folders, tensors and files, with any features and with pytorch-fid's Inception."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from latent_engine.data import DataError, load
from latent_engine.extras import MissingExtraError
from latent_engine.features import Inception, image_batches
from latent_engine.metrics import feature_moments, fid, frechet_distance, frechet_jackknife
from latent_engine.moments import Moments

URL = "https://example.com/weights/inception.pth"
# What the engine uses of pytorch-fid and how it loads its weights, with one convolution for a network.
STAND_IN = f"""
import torch
FID_WEIGHTS_URL = {URL!r}
def load_state_dict_from_url(url, progress):
    return torch.hub.load_state_dict_from_url(url, progress=progress)
class InceptionV3(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 5, 3)
        self.net.load_state_dict(load_state_dict_from_url(FID_WEIGHTS_URL, progress=True))
    def forward(self, x):
        return [self.net(x).mean((2, 3), keepdim=True)]
"""


class Network(nn.Module):
    """Features `[B, 4, 2, 2]` that depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 5, stride=3), nn.Dropout(0.5), nn.Tanh(), nn.AdaptiveAvgPool2d(2))

    def forward(self, x):
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        return self.layers(x)


def images(n, seed=0, size=12):
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write_images(folder, x, suffix=".png"):
    pillow = pytest.importorskip("PIL.Image")
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(x):
        pillow.fromarray(image.movedim(0, 2).numpy()).save(folder / f"{number:03d}{suffix}")
    return folder


def rows_of(network, x):
    with torch.no_grad():
        return network.eval()(x.float() / 255).flatten(1)


def test_fid_is_the_distance_of_the_features_whatever_they_come_from(tmp_path):
    network, x, y = Network(), images(40), images(30, 1) // 2
    features = rows_of(network, x), rows_of(network, y)
    expected = pytest.approx(frechet_distance(*features), rel=1e-6)
    network.train()
    folder = write_images(tmp_path / "x", x)
    feature_moments(y, network, batch_size=7).save(tmp_path / "y.npz")
    np.savez(tmp_path / "features.npz", features=features[1].numpy())
    for source in (x, x.float() / 255, folder, str(folder), features[0], Moments().add(features[0])):
        for reference in (y, tmp_path / "y.npz", str(tmp_path / "features.npz"), features[1]):
            assert fid(source, reference, network, batch_size=16) == expected
    assert network.training and all(p.grad is None for p in network.parameters())
    assert fid(x, y, lambda batch: network.eval()(batch)) == expected


def test_estimators_get_the_rows(tmp_path):
    network, x, y = Network(), images(60), images(50, 1)
    rows = rows_of(network, x), rows_of(network, y)
    for found, expected in zip(fid(x, y, network, batch_size=7, estimator=lambda *sets: sets), rows, strict=True):
        torch.testing.assert_close(found, expected)
    Moments().add(rows[1]).save(tmp_path / "y.npz")
    found = fid(x, tmp_path / "y.npz", network, estimator=lambda x, y: frechet_jackknife(x, y, groups=60))
    expected = frechet_jackknife(rows[0], Moments().add(rows[1]), groups=60)
    assert found.interval() == pytest.approx(expected.interval(), rel=1e-5)


def test_image_files_of_any_size_and_kind(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    folder = write_images(tmp_path, images(5))
    write_images(tmp_path, images(2, 1, size=9), ".BMP")
    gray = pillow.fromarray(np.arange(81, dtype=np.uint8).reshape(9, 9))
    gray.save(folder / "z.png")
    (folder / "notes.txt").write_text("no image")
    files = sorted(path for path in folder.iterdir() if path.suffix != ".txt")
    shapes = [list(batch.shape) for batch in image_batches(files, 3)]
    assert sum(shape[0] for shape in shapes) == 8 and all(shape[0] <= 3 and shape[1] == 3 for shape in shapes)
    last = list(image_batches(files, 3))[-1][-1]
    torch.testing.assert_close(last, (torch.arange(81).reshape(9, 9) / 255).expand(3, 9, 9))
    assert feature_moments(folder, Network()).count == 8


def test_digits_are_far_from_noise_and_near_each_other():
    """Features of a network with random weights tell halves of a data set apart from noise."""
    digits = load("mnist5k").x[:1000]
    noise = torch.rand(500, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    assert 20 * fid(digits[:500], digits[500:], network) < fid(noise, digits[500:], network)


@pytest.mark.parametrize(("source", "error", "message"), [
    ("nowhere", DataError, "There is no folder nowhere"),
    ("empty", DataError, r"The folder .*empty has no image; looked for .bmp"),
    ("nowhere.npz", DataError, "nowhere.npz is not a readable .npz file"),
    ("other.npz", DataError, "holds x; looked for features, or mu and sigma"),
    ("broken", DataError, r"a\.png cannot be read as an image"),
    (torch.zeros(3, 4, 5), ValueError, r"images \[N, C, H, W\] or features \[N, D\], given \[3, 4, 5\]"),
    (torch.zeros(0, 3, 5, 5), ValueError, r"given \[0, 3, 5, 5\]"),
    (torch.full((3, 3, 9, 9), 2.0), DataError, r"must lie in \[0, 1\], given values from 2 to 2"),
    (torch.zeros(3, 3, 9, 9, dtype=torch.int64), DataError, "uint8 or float32"),
    (torch.zeros(4, 7), ValueError, r"given \[4, 7\] and \[9, 16\]"),
])
def test_sources_that_hold_no_images(source, error, message, tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    np.savez("other.npz", x=np.zeros(3))
    with pytest.raises(error, match=message):
        fid(source, images(9), Network())


@pytest.mark.parametrize(("features", "given"), [
    (lambda x: [x], "list"), (lambda x: x.mean((1, 2, 3)), r"\[9\]"), (lambda x: x[:4], r"\[4, 3, 12, 12\]"),
])
def test_features_of_another_shape(features, given):
    with pytest.raises(ValueError, match=rf"must give a tensor \[B, D\] for images \[9, 3, 12, 12\], given {given}"):
        fid(images(9), images(9), features)
    with pytest.raises(ValueError, match="batch_size must be at least 1, given 0"):
        fid(images(9), images(9), features, batch_size=0)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs stand-ins for torchvision and pytorch-fid in an empty cache without a network."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "pytorch_fid")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens

    def packages(torchvision="", pytorch_fid=STAND_IN):
        for name, file, text in (("torchvision", "__init__", torchvision), ("pytorch_fid", "__init__", ""),
                                 ("pytorch_fid", "inception", pytorch_fid)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{file}.py").write_text(text)

    yield packages
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "pytorch_fid")]:
        del sys.modules[name]


def test_inception_takes_weights_from_a_file_or_the_cache(install, tmp_path):
    install()
    weights = nn.Conv2d(3, 5, 3).state_dict()
    torch.save(weights, tmp_path / "mine.pth")
    network = Inception(tmp_path / "mine.pth")
    gray = images(4)[:, :1].float() / 255
    expected = nn.functional.conv2d(gray.repeat(1, 3, 1, 1), weights["weight"], weights["bias"]).mean((2, 3))
    torch.testing.assert_close(network(gray), expected)
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\] or \[N, 1, H, W\], given \[2, 4, 9, 9\]"):
        network(torch.zeros(2, 4, 9, 9))
    with pytest.raises(FileNotFoundError, match=f"inception.pth and cannot be downloaded .* Put {URL} there"):
        fid(images(9), images(9))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(weights, cache / "inception.pth")
    assert fid(images(9), images(9, 1)) == pytest.approx(fid(images(9), images(9, 1), network))


def test_inception_is_not_loaded_where_there_are_no_images(tmp_path):
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    Moments().add(rows).save(tmp_path / "y.npz")
    assert fid(rows, tmp_path / "y.npz") == pytest.approx(0, abs=1e-9)


def test_weights_that_are_not_inceptions(install, tmp_path):
    install()
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none.pth with the weights"):
        Inception(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("nothing")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text.pth", "linear.pth", "list.pth"):
        with pytest.raises(ValueError, match=f"{name} does not hold the weights of pytorch-fid's Inception"):
            Inception(tmp_path / name)


def test_torchvision_of_another_pytorch(install):
    install(torchvision="raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(MissingExtraError, match=r"torchvision \(extra fid\), which does not import beside PyTorch "
                                                r".*: operator torchvision::nms does not exist\. Install both from one"):
        fid(images(9), images(9))


@pytest.mark.parametrize("missing", ["torchvision", "pytorch_fid"])
def test_packages_that_are_not_installed(install, missing, monkeypatch):
    install()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"needs the package {missing}, .* pip install 'latent-engine\[fid\]'"):
        fid(images(9), images(9))


def test_inception_of_pytorch_fid(pytorch_fid, tmp_path, monkeypatch):
    """The real network, with weights drawn at random: its features are those of pytorch-fid's own call."""
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        patch.setattr(pytorch_fid, "load_state_dict_from_url", lambda url, progress: None)
        torch.save(pytorch_fid.fid_inception_v3().state_dict(), tmp_path / "random.pth")
    network = Inception(tmp_path / "random.pth")
    x = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert network.eval()(x).shape == (2, 2048)
        torch.testing.assert_close(network(x), network.net(x)[0][:, :, 0, 0])
    assert not any(p.requires_grad for p in network.parameters())

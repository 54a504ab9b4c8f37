"""Data sets by name and path, damaged files, and the order of the batches."""

import gzip
import hashlib
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_engine.data import Data, DataError, batch_order, load, read_idx


def write_idx(path, array, code=8):
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    raw = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 5, 4), np.uint8)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """No ./data and no $LATENT_ENGINE_DATA of the machine's owner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LATENT_ENGINE_DATA", raising=False)


@pytest.mark.parametrize(("split", "per_class"), [("train", 500), ("test", 100)])
def test_embedded_mnist_is_class_balanced(split, per_class):
    data = load("mnist5k", split)
    assert data.x.shape == (10 * per_class, 1, 28, 28) and data.x.dtype == torch.uint8
    assert data.y.bincount().tolist() == [per_class] * 10
    assert "MNIST" in data.source


def test_embedded_mnist_holds_the_first_digits_of_mnist():
    assert load("mnist5k").y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    pixels = load("mnist5k").x[0].numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest().startswith("23ceaef5eb61f0e7")


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_other_named_sets_are_labelled_images_and_their_splits_differ(name):
    if name == "digits":
        pytest.importorskip("sklearn")
    train, test = load(name), load(name, "test")
    assert len(train) > len(test) > 100
    assert set(train.y.tolist()) == set(test.y.tolist()) == set(range(10))
    rows = {row.numpy().tobytes() for row in train.x}
    assert not any(row.numpy().tobytes() in rows for row in test.x)
    assert torch.equal(load(name).x, train.x)


def test_pixels_are_floats_in_the_unit_interval():
    data = Data(torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(4, 1, 1, 1))
    for binarize in (False, "none"):
        assert torch.equal(data.pixels(binarize).x.flatten(), torch.tensor([0, 127, 128, 255]) / 255)
        assert data.pixels(binarize).binarized == "none"
    for binarize in (True, "threshold"):
        assert data.pixels(binarize).x.flatten().tolist() == [0, 0, 1, 1]
        assert data.pixels(binarize).binarized == "threshold"
    with pytest.raises(DataError, match=r"must lie in \[0, 1\].*255"):
        Data(torch.full((1, 1, 2, 2), 255.0)).pixels(binarize=True)
    with pytest.raises(DataError, match="nan"):
        Data(torch.full((1, 1, 2, 2), float("nan"))).pixels(binarize=True)


def test_a_static_draw_has_the_intensities_as_probabilities_and_is_always_the_same():
    intensity = torch.tensor([0, 26, 128, 230, 255], dtype=torch.uint8)
    data = Data(intensity.repeat(20000).view(-1, 1, 1, 5))
    x = data.pixels("static").x
    assert set(x.unique().tolist()) == {0, 1} and data.pixels("static").binarized == "static"
    p = intensity.double() / 255
    assert ((x.double().mean((0, 1, 2)) - p).abs() <= 4 * (p * (1 - p) / 20000).sqrt()).all()
    state = torch.get_rng_state()
    assert torch.equal(data.pixels("static").x, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(replace(data, split="test").pixels("static").x, x)


def test_dynamic_rows_keep_their_intensities_and_have_one_fixed_draw_to_evaluate_on(images):
    data = Data(torch.from_numpy(images)[:, None])
    dynamic = data.pixels("dynamic")
    assert dynamic.binarized == "dynamic" and torch.equal(dynamic.x, data.pixels("none").x)
    assert torch.equal(dynamic.fixed().x, data.pixels("static").x) and dynamic.fixed().binarized == "static"
    for binarize in ("none", "threshold", "static"):
        assert torch.equal(data.pixels(binarize).fixed().x, data.pixels(binarize).x)


def test_zeros_and_ones_stay_as_they_were_made(images):
    for made in ("threshold", "static"):
        data = Data(torch.from_numpy(images)[:, None]).pixels(made)
        for binarize in ("none", "threshold", "static", "dynamic"):
            assert torch.equal(data.pixels(binarize).x, data.x) and data.pixels(binarize).binarized == made


def test_unknown_binarisations_are_refused(images):
    data = Data(torch.from_numpy(images)[:, None])
    with pytest.raises(DataError, match="binarize must be one of none, threshold, static, dynamic, given 'random'"):
        data.pixels("random")
    with pytest.raises(DataError, match=r"binarized must be one of none, .*given True"):
        replace(data, binarized=True)


def test_rows_are_taken_with_their_labels():
    data = Data(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), torch.arange(5) % 3, "five")
    taken = data.take(torch.tensor([4, 1]))
    assert taken.x.flatten().tolist() == [4, 1] and taken.y.tolist() == [1, 1] and taken.name == "five"
    assert Data(data.x).take(torch.tensor([2])).y is None


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path, images, suffix):
    labels = np.arange(7, dtype=np.uint8)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", labels)
    data = load(tmp_path)
    assert np.array_equal(data.x[:, 0], images) and data.y.tolist() == labels.tolist()
    assert str(tmp_path) in data.source
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte"):
        load(tmp_path, "test")


@pytest.mark.parametrize(("code", "dtype"), [(8, "u1"), (9, "i1"), (11, "i2"), (12, "i4"), (13, "f4"), (14, "f8")])
def test_idx_values_of_every_type(tmp_path, code, dtype):
    array = np.array([[1, 2, 3], [-4 if dtype != "u1" else 4, 5, 100]], dtype)
    write_idx(tmp_path / "file", array, code)
    assert np.array_equal(read_idx(tmp_path / "file"), array)


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels"), ("x_train", "y_train")])
@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 3, 5, 4), (6, 5, 4, 3)], ids=["NHW", "NCHW", "NHWC"])
def test_npz(tmp_path, keys, shape):
    images = np.random.default_rng(0).random(shape)
    np.savez(tmp_path / "set.npz", **{keys[0]: images, keys[1]: np.arange(6, dtype=np.int16)})
    data = load(tmp_path / "set.npz")
    expected = images[:, None] if len(shape) == 3 else images if shape[1] == 3 else images.transpose(0, 3, 1, 2)
    assert data.x.dtype == torch.float32 and np.array_equal(data.x, expected.astype(np.float32))
    assert data.y.tolist() == list(range(6))


def test_npz_without_labels_or_test_split(tmp_path, images):
    np.savez(tmp_path / "train.npz", images=images)
    np.savez(tmp_path / "test.npz", images=images[:2])
    assert load(tmp_path / "train.npz").y is None
    with pytest.raises(DataError, match="no test images"):
        load(tmp_path / "train.npz", "test")
    assert len(load(tmp_path)) == 7 and len(load(tmp_path, "test")) == 2


def test_a_folder_with_a_single_npz(tmp_path, images):
    np.savez(tmp_path / "faces.npz", images=images, ages=np.arange(3))
    assert np.array_equal(load(tmp_path).x[:, 0], images) and load(tmp_path).y is None
    with pytest.raises(DataError, match=r"faces\.npz has no test images: it holds images, ages"):
        load(tmp_path, "test")
    np.savez(tmp_path / "more.npz", images=images)
    with pytest.raises(DataError, match=r"has no train data: looked for .* and a single \.npz"):
        load(tmp_path)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "faces.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match=r"Cannot read .*faces\.pkl.*numpy\.savez.*A pickle is never read"):
        load(tmp_path / "faces.pkl")


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(("name", "split", "shape", "classes"), [
    ("mnist", "train", (60000, 1, 28, 28), 10), ("mnist", "test", (10000, 1, 28, 28), 10),
    ("cifar10", "train", (5000, 3, 32, 32), 10), ("cifar10", "test", (1000, 3, 32, 32), 10),
    ("omniglot-small", "train", (3872, 1, 28, 28), 242), ("omniglot-small", "test", (968, 1, 28, 28), 242),
    ("freyfaces", "train", (1965, 1, 28, 20), None), ("freyfaces/freyfaces.npz", "train", (1965, 1, 28, 20), None)])
def test_data_sets_of_the_papers_are_read_from_their_folders(name, split, shape, classes):
    data = load(SHARED / name, split)
    assert data.x.dtype == torch.uint8 and data.x.shape == shape
    assert data.y is None if classes is None else data.y.unique().tolist() == list(range(classes))


def test_a_name_is_looked_up_in_the_data_folders_first(tmp_path, monkeypatch, images):
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "mnist5k.npz", x=images)
    assert load("mnist5k").source == "data/mnist5k.npz"
    (tmp_path / "elsewhere").mkdir()
    np.savez(tmp_path / "elsewhere" / "mnist5k.npz", x=images[:3])
    monkeypatch.setenv("LATENT_ENGINE_DATA", str(tmp_path / "elsewhere"))
    assert len(load("mnist5k")) == 3


def test_missing_data_names_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"No data 'mnst5k'; looked for data/mnst5k, .*Did you mean 'mnist5k'"):
        load("mnst5k")
    with pytest.raises(DataError, match=r"No data '.*nothing/here'.*IDX files"):
        load(tmp_path / "nothing" / "here")
    with pytest.raises(DataError, match="has no train data"):
        load(tmp_path)
    with pytest.raises(DataError, match="split must be 'train' or 'test', given 'valid'"):
        load("mnist5k", "valid")


@pytest.mark.parametrize("cut", [0, 3, 10, -1])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "set.npz"])
def test_truncated_files(tmp_path, images, name, cut):
    path = tmp_path / name
    if name == "set.npz":
        np.savez_compressed(path, x=images)
    else:
        write_idx(path, images)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=name):
        load(path if name == "set.npz" else tmp_path)


def test_corrupt_files(tmp_path, images):
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, images)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match="is damaged: its header says"):
        load(tmp_path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="is not an IDX file: it starts with 3c 68"):
        load(tmp_path)
    for content in (b"", b"PK nonsense", b"\x93NUMPY nonsense"):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"not a readable \.npz"):
            load(tmp_path / "set.npz")
    np.savez(tmp_path / "set.npz", x=np.array([{}, {}], dtype=object))
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        load(tmp_path / "set.npz")


@pytest.mark.parametrize(("arrays", "message"), [
    ({"x": np.zeros((3, 4), np.uint8)}, r"images must be .* given uint8 \[3, 4\]"),
    ({"x": np.zeros((0, 4, 4), np.uint8)}, "not empty"),
    ({"x": np.zeros((3, 4, 4), np.int64)}, "given int64"),
    ({"x": np.zeros((3, 4, 4)), "y": np.zeros(2, int)}, r"labels must be integers \[N\] = \[3\]"),
    ({"x": np.zeros((3, 4, 4)), "y": np.zeros(3)}, "given float64"),
    ({"pictures": np.zeros((3, 4, 4))}, "it holds pictures; looked for x_train, x or images"),
])
def test_wrong_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "set.npz")


def test_wrong_tensors():
    with pytest.raises(DataError, match=r"x must be a uint8 or float32 tensor \[N, C, H, W\]"):
        Data(torch.zeros(3, 4, 4))
    with pytest.raises(DataError, match="y must be an int64 tensor"):
        Data(torch.zeros(3, 1, 4, 4), torch.zeros(3))


def test_an_epoch_visits_every_row_once():
    batches = batch_order(103, 10, seed=1, epoch=2)
    assert [len(b) for b in batches] == [10] * 10 + [3]
    assert torch.cat(batches).dtype == torch.int64
    assert torch.cat(batches).sort().values.tolist() == list(range(103))


def test_batch_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return tuple(torch.cat(batch_order(50, 50, seed, epoch)).tolist())

    state = torch.get_rng_state()
    pairs = [(seed, epoch) for seed in (0, 1, 2**32, 2**40) for epoch in range(20)]
    assert len({order(*pair) for pair in pairs}) == len(pairs)
    assert order(3, 4) == order(3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="batch_size must be at least 1, given 0"):
        batch_order(10, 0, 0, 0)

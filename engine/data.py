"""Image data sets in memory, by name or path, and the order in which training visits them.

A name is looked up in this order: the folder $LATENT_ENGINE_DATA, ./data, what the package embeds or generates,
scikit-learn. A row's number in the data set is its identity: a latent table finds a row's representation by it.
"""

import difflib
import gzip
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .extras import require

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "test")
Binarization = Literal["none", "threshold", "static", "dynamic"]
_ACCEPTED = ("a name (mnist5k, digits, synthetic), a folder with MNIST's IDX files (plain or .gz), with train.npz and "
             "test.npz or with one .npz, or an .npz file with the arrays x and y, images and labels, or x_train, "
             "y_train, x_test and y_test")


class DataError(ValueError):
    """A data set was not found, or its files are damaged or of the wrong kind."""


@dataclass(frozen=True, eq=False)
class Data:
    """Images and, where known, their labels.

    Attributes:
        x: `[N, C, H, W]`, uint8 (0 to 255) or float32.
        y: int64 `[N]`, or None.
        name, split: what was asked for.
        source: where it came from, for people.
        binarized: "threshold" or "static": x holds zeros and ones, see `pixels`; "dynamic": x holds probabilities, from
            which training draws zeros and ones anew at each step; "none".
    """

    x: Tensor
    y: Tensor | None = None
    name: str = "tensor"
    split: str = "train"
    source: str = "memory"
    binarized: Binarization = "none"

    def __post_init__(self) -> None:
        if self.binarized not in get_args(Binarization):
            raise DataError(f"{self.name}: binarized must be one of {', '.join(get_args(Binarization))}, "
                            f"given {self.binarized!r}.")
        if self.x.dim() != 4 or self.x.dtype not in (torch.uint8, torch.float32):
            raise DataError(f"{self.name}: x must be a uint8 or float32 tensor [N, C, H, W], "
                            f"given {self.x.dtype} {list(self.x.shape)}.")
        if self.y is not None and (self.y.dtype != torch.int64 or self.y.shape != self.x.shape[:1]):
            raise DataError(f"{self.name}: y must be an int64 tensor [N] = [{len(self.x)}], "
                            f"given {self.y.dtype} {list(self.y.shape)}.")

    def __len__(self) -> int:
        return len(self.x)

    def pixels(self, binarize: Binarization | bool) -> "Data":
        """The same rows as float32 in [0, 1], binarised in one of the field's ways.

        Args:
            binarize: "none" (False): gray; "threshold" (True): 1 above 0.5, else 0; "static": zeros and ones drawn once,
                1 with the pixel's intensity as probability, the same at every call (Salakhutdinov & Murray 2008; a draw of
                our own, not their file); "dynamic": drawn so anew at each training step (Burda et al. 2016), for which
                the rows keep their intensities and `fixed` gives one draw to evaluate on. Rows of zeros and ones stay.

        Raises:
            DataError: another `binarize`; float32 images with values outside [0, 1] or NaN.
        """
        kind = {False: "none", True: "threshold"}.get(binarize, binarize)
        if kind not in get_args(Binarization):
            raise DataError(f"binarize must be one of {', '.join(get_args(Binarization))}, given {binarize!r}.")
        x = self.x.float() / 255 if self.x.dtype == torch.uint8 else self.x
        if len(self) and not bool(((x >= 0) & (x <= 1)).all()):
            raise DataError(f"{self.name}: float32 images must lie in [0, 1], given values from {x.min():g} to "
                            f"{x.max():g}. Scale them, or give them as uint8 from 0 to 255.")
        if self.binarized in ("threshold", "static"):
            kind = self.binarized
        elif kind == "threshold":
            x = (x > 0.5).float()
        elif kind == "static":
            # The splits draw from streams of their own.
            generator = torch.Generator().manual_seed(zlib.crc32(self.split.encode()))
            x = (torch.rand(x.shape, generator=generator).to(x.device) < x).float()
        return replace(self, x=x, binarized=kind)

    def fixed(self) -> "Data":
        """What to evaluate on: rows that training draws dynamically as their static draw, all others as they are."""
        return self.pixels("static") if self.binarized == "dynamic" else self

    def take(self, rows: Tensor) -> "Data":
        """The rows of these numbers, int64 `[M]`."""
        return replace(self, x=self.x[rows], y=None if self.y is None else self.y[rows])


def batch_order(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The row indices of each mini-batch of an epoch, int64: a random permutation of `n` rows, cut into batches.

    A pure function of its arguments, so an interrupted run visits the same rows again. The last batch may be smaller.
    """
    if batch_size < 1:
        raise ValueError(f"batch_order: batch_size must be at least 1, given {batch_size}.")
    # torch's CPU generator reads 32 bits of its seed: hash the pair instead of packing it.
    mixed = int(np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed)).split(batch_size)


def load(name_or_path: str | os.PathLike[str], split: str = "train") -> Data:
    """A data set by name or path.

    Args:
        name_or_path: "mnist5k" (5,000 + 1,000 MNIST digits, embedded), "digits" (scikit-learn's 8×8 digits, the last
            fifth for the test), "synthetic" (bars, generated); a folder with MNIST's IDX files, plain or .gz, with
            train.npz and test.npz, or with a single .npz of another name; an .npz file with x and y, images and labels,
            or x_train, y_train, x_test, y_test, whose other arrays are ignored.
            Images are uint8 or floating point, [N, H, W], [N, C, H, W] or [N, H, W, C]; labels are integers [N] and
            may be missing.
        split: "train" or "test".

    Raises:
        DataError: nothing of that name, a missing split, or truncated, corrupt or misshapen files.
        MissingExtraError: "digits" without scikit-learn.
    """
    if split not in SPLITS:
        raise DataError(f"split must be 'train' or 'test', given {split!r}.")
    given = os.fspath(name_or_path)
    is_name = isinstance(name_or_path, str) and re.fullmatch(r"[\w-]+", given) is not None
    roots = [Path(r) for r in (os.environ.get("LATENT_ENGINE_DATA"), "data") if r] if is_name else []
    tried = [root / f"{given}{suffix}" for root in roots for suffix in ("", ".npz")]
    for path in tried:
        if path.exists():
            return _read(path, given, split)
    if is_name and given in _BUILT_IN:
        return _BUILT_IN[given](split)
    path = Path(given).expanduser()
    if path.exists():
        return _read(path, given if is_name else path.stem, split)
    close = difflib.get_close_matches(given, _BUILT_IN, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    looked = ", ".join(str(p) for p in [*tried, path])
    raise DataError(f"No data {given!r}; looked for {looked}.{hint} Give {_ACCEPTED}.")


def _mnist5k(split: str) -> Data:
    data = _read(ASSETS / "mnist5k.npz", "mnist5k", split)
    return replace(data, source="embedded in the package (MNIST, CC BY-SA 3.0)")


def _digits(split: str) -> Data:
    datasets = require("sklearn.datasets", "eval", "The data set 'digits'")
    bunch = datasets.load_digits()
    cut = len(bunch.images) * 4 // 5  # the file goes writer by writer
    rows = slice(cut) if split == "train" else slice(cut, None)
    return _data(bunch.images[rows] / 16, bunch.target[rows], "digits", split, "scikit-learn load_digits")


def _synthetic(split: str) -> Data:
    """Bars: class c < 5 is a horizontal bar near row 5c + 2, c ≥ 5 a vertical one; noise, one pixel of jitter."""
    n = 1000 if split == "train" else 200
    generator = torch.Generator().manual_seed(SPLITS.index(split))
    y = torch.arange(n) % 10
    start = 5 * (y % 5) + 1 + torch.randint(-1, 2, (n,), generator=generator)
    offset = torch.arange(28) - start[:, None]
    bar = ((offset >= 0) & (offset < 4)).float()[:, :, None].expand(n, 28, 28)
    bar = torch.where((y < 5)[:, None, None], bar, bar.mT)
    x = 0.8 * bar + 0.2 * torch.rand(n, 28, 28, generator=generator)
    return Data(x[:, None], y, "synthetic", split, "generated (bars)")


_BUILT_IN: dict[str, Callable[[str], Data]] = {"mnist5k": _mnist5k, "digits": _digits, "synthetic": _synthetic}
NAMES = tuple(_BUILT_IN)


def _read(path: Path, name: str, split: str) -> Data:
    if path.is_dir():
        prefix = {"train": "train", "test": "t10k"}[split]
        images, labels = (_idx_file(path, f"{prefix}-{kind}") for kind in ("images", "labels"))
        if images:
            return _data(read_idx(images), read_idx(labels) if labels else None, name, split, str(path))
        if (path / f"{split}.npz").exists():
            return _read(path / f"{split}.npz", name, split)
        others = [file for file in path.glob("*.npz") if file.stem not in SPLITS]
        if len(others) == 1:
            return _read(others[0], name, split)
        raise DataError(f"The folder {path} has no {split} data: looked for {prefix}-images-idx3-ubyte, the same with "
                        f".gz, {split}.npz, and a single .npz. Give {_ACCEPTED}.")
    if path.suffix == ".npz":
        return _read_npz(path, name, split)
    raise DataError(f"Cannot read {path}. Give {_ACCEPTED}; numpy.savez(path, x=..., y=...) writes one. A pickle is never "
                    "read, for it can run code.")


def _idx_file(folder: Path, stem: str) -> Path | None:
    rank = 3 if stem.endswith("images") else 1
    names = (f"{stem}{dot}idx{rank}-ubyte{gz}" for dot in "-." for gz in ("", ".gz"))
    return next((folder / n for n in names if (folder / n).is_file()), None)


_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file, plain or gzipped: two zero bytes, a type, a rank, big-endian sizes, then the values.

    Raises:
        DataError: the file is not IDX, is truncated or has bytes left over.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}). It may be a broken download: fetch it again.") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES:
        raise DataError(f"{path} is not an IDX file: it starts with {raw[:4].hex(' ') or 'nothing'}, expected 00 00, "
                        f"a type from 08 to 0e and the number of dimensions.")
    dtype, start = np.dtype(_IDX_TYPES[raw[2]]), 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    expected = start + dtype.itemsize * math.prod(shape)
    if len(raw) != expected:
        raise DataError(f"{path} is damaged: its header says {shape} values of {dtype.name}, {expected} bytes in all, "
                        f"but it has {len(raw)}. Fetch it again.")
    return np.frombuffer(raw, dtype, offset=start).reshape(shape)


def _read_npz(path: Path, name: str, split: str) -> Data:
    try:
        with np.load(path, allow_pickle=False) as file:
            pair = _npz_keys(file.files, path, split)
            images, labels = (file[key] if key in file.files else None for key in pair)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable .npz file ({error}). "
                        f"Write plain arrays with numpy.savez(path, x=..., y=...).") from error
    return _data(images, labels, name, split, str(path))


def _npz_keys(keys: list[str], path: Path, split: str) -> tuple[str, str]:
    if f"x_{split}" in keys:
        return f"x_{split}", f"y_{split}"
    for pair in (("x", "y"), ("images", "labels")):
        # One unnamed split is the training data, unless the file is called test.npz: never test on what was trained on.
        if pair[0] in keys and split in ("train", path.stem):
            return pair
    raise DataError(f"{path} has no {split} images: it holds {', '.join(keys) or 'no arrays'}; looked for x_{split}"
                    + (", x or images." if split == "train" else f" (or x or images in a file called {split}.npz)."))


def _data(images: np.ndarray, labels: np.ndarray | None, name: str, split: str, source: str) -> Data:
    """Checked arrays as `Data`: channels come first, and floating-point images become float32."""
    if images.ndim not in (3, 4) or 0 in images.shape or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        raise DataError(f"{source}: images must be uint8 or floating point, [N, H, W], [N, C, H, W] or [N, H, W, C] "
                        f"and not empty, given {images.dtype} {list(images.shape)}.")
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = np.moveaxis(images, 3, 1)
    x = torch.from_numpy(np.array(images, np.uint8 if images.dtype == np.uint8 else np.float32, order="C"))
    if labels is None:
        return Data(x, None, name, split, source)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{source}: labels must be integers [N] = [{len(images)}], one an image, "
                        f"given {labels.dtype} {list(labels.shape)}.")
    return Data(x, torch.from_numpy(labels.astype(np.int64)), name, split, source)

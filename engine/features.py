"""Images from tensors and folders, and their features under a network: Inception for FID, or any other.

A network for features is any callable from images `[B, C, H, W]`, float32 in [0, 1], to rows `[B, D]` (further axes are
flattened); an `nn.Module` is given them on its device and in evaluation mode.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn

from .data import Data, DataError
from .diagnostics import evaluating
from .extras import MissingExtraError, require

Features = Callable[[Tensor], Tensor]
Images = Tensor | list[Path]
IMAGE_SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files of a folder, sorted by name, without those of its subfolders.

    Raises:
        DataError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"The folder {folder} has no image; looked for {', '.join(IMAGE_SUFFIXES)}.")
    return files


def image_batches(images: Images, batch_size: int) -> Iterator[Tensor]:
    """Batches `[B, C, H, W]`, float32 in [0, 1], of a tensor (uint8 from 0 to 255, or float32 in [0, 1]) or of files.

    Files are read as RGB, whatever they hold; where their sizes change a batch ends early.

    Raises:
        DataError: values outside those ranges, or a file that is no image.
        MissingExtraError: files without Pillow.
    """
    if batch_size < 1:
        raise ValueError(f"image_batches: batch_size must be at least 1, given {batch_size}.")
    if isinstance(images, Tensor):
        for rows in images.split(batch_size):
            yield Data(rows, name="images").pixels("none").x
        return
    batch: list[Tensor] = []
    for image in map(_read_image, images):
        if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
            yield torch.stack(batch).float() / 255
            batch = []
        batch.append(image)
    yield torch.stack(batch).float() / 255


def _read_image(path: Path) -> Tensor:
    """uint8 `[3, H, W]`."""
    pillow = require("PIL.Image", "plot", "Reading image files")
    try:
        with pillow.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).movedim(2, 0)
    except (OSError, SyntaxError) as error:  # Pillow raises the second for broken PNG files
        raise DataError(f"{path} cannot be read as an image ({error}).") from error


@torch.no_grad()
def extract(features: Features, images: Images, batch_size: int) -> Iterator[Tensor]:
    """Feature rows `[B, D]` of batches of images.

    Raises:
        ValueError: `features` gives something else than a tensor with one row an image.
    """
    module = features if isinstance(features, nn.Module) else None
    parameter = next(module.parameters(), None) if module else None
    with evaluating(module) if module else nullcontext():
        for batch in image_batches(images, batch_size):
            rows = features(batch if parameter is None else batch.to(parameter.device))
            if not isinstance(rows, Tensor) or rows.dim() < 2 or len(rows) != len(batch):
                given = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise ValueError(f"features must give a tensor [B, D] for images {list(batch.shape)}, given {given}.")
            yield rows.flatten(1)


class Inception(nn.Module):
    """The network of FID, as pytorch-fid has it: its 2,048 features after the last average pooling.

    Images of one channel become gray RGB; all are resized to 299×299 (bilinear, without antialiasing), as there.

    Args:
        weights: file of its weights; left out, that in PyTorch's cache, where it is downloaded to once.

    Raises:
        MissingExtraError: pytorch-fid or torchvision is not installed, or does not import beside this PyTorch.
        FileNotFoundError: no weights, and no network to download them.
        ValueError: the file holds something else.
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        loader = _pytorch_fid()
        cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(loader.FID_WEIGHTS_URL).name
        file = cache if weights is None else Path(weights)
        if weights is not None and not file.is_file():
            raise FileNotFoundError(f"There is no file {file} with the weights of Inception.")
        download = loader.load_state_dict_from_url
        if weights is not None:  # its constructor takes no file, only what this function returns
            loader.load_state_dict_from_url = lambda *_, **__: torch.load(file, map_location="cpu", weights_only=True)
        try:
            self.net = loader.InceptionV3()
        except URLError as error:
            raise FileNotFoundError(f"The weights of Inception are not in {cache} and cannot be downloaded ({error.reason}). "
                                    f"Put {loader.FID_WEIGHTS_URL} there, or give Inception(weights=PATH).") from error
        except (EOFError, RuntimeError, TypeError, UnpicklingError) as error:
            raise ValueError(f"{file} does not hold the weights of pytorch-fid's Inception ({error}). "
                             f"They are at {loader.FID_WEIGHTS_URL}.") from error
        finally:
            loader.load_state_dict_from_url = download
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"Inception: images must have shape [N, 3, H, W] or [N, 1, H, W], given {list(x.shape)}.")
        return self.net(x.expand(-1, 3, -1, -1))[0].flatten(1)


def _pytorch_fid() -> ModuleType:
    purpose = "Inception, the network of FID,"
    try:
        require("torchvision", "fid", purpose)  # pytorch-fid takes its blocks
        return require("pytorch_fid.inception", "fid", purpose)
    except (OSError, RuntimeError) as error:  # torchvision's operators are compiled for one build of PyTorch
        raise MissingExtraError(f"{purpose} needs torchvision (extra fid), which does not import beside PyTorch "
                                f"{torch.__version__}: {error}. Install both from one "
                                "package index, for the same device.") from error

"""One self-contained HTML page to look around in a representation space, without network or framework.

The pointer finds the nearest training image, and the decoder answers for the place under it. A browser does not run the
decoder: it is evaluated here on a grid, and the page shows the nearest of those pictures, and says so.
"""

import base64
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import write_file
from .data import ASSETS
from .extras import require
from .figures import COLORS, plane

# COLORS for a dark ground: at least 28 apart (CIELAB) in the same four kinds of vision.
DARK_COLORS = ("#5d4bff", "#ff9c00", "#21714c", "#b9490c", "#8d35b3",
               "#38d7ff", "#c799a1", "#a5bc6a", "#ffffff", "#625a80")
_WEBP_SIDE = 16383  # pixels, the format's limit


@torch.no_grad()
def write_explorer(path: str | os.PathLike[str], z: Tensor, images: Tensor, decode: Callable[[Tensor], Tensor],
                   y: Tensor | None = None, means: Tensor | None = None, *, grid: int = 48,
                   title: str = "Latent explorer") -> Path:
    """Writes the page and returns its path. About 2 MB for 5,000 digits. Needs pillow (extra `plot`).

    Args:
        z: representations `[N, D]`; with D > 2 the page shows the plane of the first two principal components.
        images: their images `[N, C, H, W]` in [0, 1], C = 1 or 3.
        decode: `[M, D]` -> images `[M, C, H, W]` in [0, 1].
        y: labels `[N]`, by which points are coloured and shown or hidden.
        means: component means `[K, D]`.
        grid: places in each direction at which the decoder is evaluated.
    """
    z = z.detach().cpu().float()
    origin, directions = plane(z)
    points = (z - origin) @ directions.T
    centers = torch.empty(0, 2) if means is None else (means.detach().cpu().float() - origin) @ directions.T
    left, right, bottom, top = _frame(torch.cat([points, centers]))
    # Places are cell centers, from the top left as in a picture.
    step = (torch.arange(grid) + 0.5) / grid
    places = torch.cartesian_prod(top + (bottom - top) * step, left + (right - left) * step).flip(1)
    decodes = torch.cat([decode(part) for part in (origin + places @ directions).split(256)])
    classes, codes = (y.cpu() if y is not None else torch.zeros(len(z), dtype=torch.int64)).unique(return_inverse=True)
    content = {
        "title": title,
        "plane": f"the {z.shape[1]}-dimensional representation space" if z.shape[1] == 2 else
                 f"the plane of the first two principal components of a {z.shape[1]}-dimensional representation space",
        "extent": [left, right, bottom, top],
        "points": [[round(v, 4) for v in row] for row in points.tolist()],
        "means": centers.tolist(),
        "codes": codes.tolist(),
        "classes": [str(c) for c in classes.tolist()],
        "labelled": y is not None,
        "light": COLORS, "dark": DARK_COLORS,
        "ink": images.shape[1] == 1,
        "images": _sprites(images, math.ceil(math.sqrt(len(images)))),
        "decodes": _sprites(decodes, grid),
    }
    # "</" could end the script element that holds the text.
    text = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    path = Path(path)
    write_file(path, (ASSETS / "explorer.html").read_text("utf-8").replace("__DATA__", text).encode())
    return path


def _frame(points: Tensor) -> tuple[float, float, float, float]:
    """A square around all points with a margin: left, right, bottom, top."""
    low, high = points.min(0).values, points.max(0).values
    half = max(float((high - low).max()) * 0.53, 1e-3)
    x, y = ((low + high) / 2).tolist()
    return x - half, x + half, y - half, y + half


def _sprites(images: Tensor, columns: int) -> dict[str, object]:
    """Images `[N, C, H, W]` side by side in one WebP picture, as a data URL, and how to cut them out."""
    pillow = require("PIL.Image", "plot", "latent_engine.explorer")
    images = (images.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    if max(columns * width, rows * height) > _WEBP_SIDE:
        raise ValueError(f"{n} images of {height}×{width} do not fit one picture of {_WEBP_SIDE} pixels a side; "
                        f"give fewer rows of z and images.")
    sheet = images.new_zeros(rows * columns, channels, height, width)
    sheet[:n] = images
    sheet = sheet.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels).squeeze(2)
    file = io.BytesIO()
    pillow.fromarray(sheet.numpy()).save(file, "WEBP", quality=80)
    url = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return {"sheet": url, "columns": columns, "width": width, "height": height}

"""Writes engine/assets/mnist5k.npz, the digits embedded in the package, from a folder with MNIST's IDX files.

    python scripts/make_mnist5k.py path/to/mnist

The first 500 training images and the first 100 test images of each digit, in MNIST's own order.
"""

import sys

import numpy as np

from latent_engine.data import ASSETS, load


def main(folder: str) -> None:
    arrays = {}
    for split, per_class in (("train", 500), ("test", 100)):
        data = load(folder, split)
        rows = np.sort(np.concatenate([np.flatnonzero(data.y.numpy() == digit)[:per_class] for digit in range(10)]))
        arrays[f"x_{split}"] = data.x[rows, 0].numpy()
        arrays[f"y_{split}"] = data.y[rows].numpy().astype(np.uint8)
    target = ASSETS / "mnist5k.npz"
    np.savez_compressed(target, **arrays)
    print(f"{target}: {', '.join(f'{k} {list(v.shape)}' for k, v in arrays.items())}, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

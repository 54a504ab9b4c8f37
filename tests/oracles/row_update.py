"""Dense SGD and Adam in 80-bit arithmetic, one step after the other on every row that has one."""

import numpy as np

from . import longdouble


class Table:
    """z `[N, D]` with its optimizer's state; each step takes the rows of a batch."""

    def __init__(self, z) -> None:
        self.z = longdouble(z)
        self.velocity, self.mean, self.square = (np.zeros_like(self.z) for _ in range(3))
        self.step = np.zeros(len(self.z), np.int64)

    def gradient(self, index, grad) -> np.ndarray:
        """The dense gradient of a batch."""
        dense = np.zeros_like(self.z)
        np.add.at(dense, np.asarray(index), longdouble(grad))
        return dense

    def sgd(self, index, grad, lr, momentum=0.0, weight_decay=0.0, decoupled=False) -> None:
        rows = np.unique(np.asarray(index))
        z, g = self.z[rows], self.gradient(index, grad)[rows]
        z, g = (z * (1 - np.longdouble(lr) * weight_decay), g) if decoupled else (z, g + np.longdouble(weight_decay) * z)
        self.velocity[rows] = np.longdouble(momentum) * self.velocity[rows] - np.longdouble(lr) * g
        self.z[rows] = z + self.velocity[rows]

    def adam(self, index, grad, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False, dense=False) -> None:
        """`dense` steps the rows outside the batch too, whose gradient is zero."""
        rows = np.arange(len(self.z)) if dense else np.unique(np.asarray(index))
        self._adam(rows, self.gradient(index, grad)[rows], lr, betas, eps, weight_decay, decoupled)

    def rest(self, rows, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> None:
        """A step of dense Adam without a gradient on `rows`."""
        self._adam(rows, np.longdouble(0), lr, betas, eps, weight_decay, True)

    def _adam(self, rows, g, lr, betas, eps, weight_decay, decoupled) -> None:
        lr, eps, (beta1, beta2) = np.longdouble(lr), np.longdouble(eps), (np.longdouble(b) for b in betas)
        z = self.z[rows]
        z, g = (z * (1 - lr * weight_decay), g) if decoupled else (z, g + np.longdouble(weight_decay) * z)
        self.step[rows] += 1
        t = self.step[rows, None].astype(np.longdouble)
        self.mean[rows] = beta1 * self.mean[rows] + (1 - beta1) * g
        self.square[rows] = beta2 * self.square[rows] + (1 - beta2) * g**2
        self.z[rows] = z - lr * self.mean[rows] / (1 - beta1**t) / (np.sqrt(self.square[rows] / (1 - beta2**t)) + eps)

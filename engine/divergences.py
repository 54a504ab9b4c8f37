"""Regularisers of the posteriors of a batch by their divergences from each other: mutual posterior-divergence (MAE).

A model with posteriors q(z | x) = N(μ, diag σ²) minimises, with KL_d(i‖j) between those of rows i and j in dimension d, a
mean over the ordered pairs i ≠ j of a batch and a weight for each regulariser (Ma, Zhou & Hovy 2019, Eq. 7),

    −ELBO + η L_diverse + γ L_smooth
    L_diverse = Σ_d mean_ij log(1 + exp(−KL_d(i‖j)))               Eq. 5 and 8: falls as every dimension tells rows apart
    L_smooth  = unbiased deviation over ij of Σ_d KL_d(i‖j)        Eq. 6: small if no rows form groups of their own
    MPD       = mean_ij Σ_d KL_d(i‖j)                              Eq. 4, which neither contains; to look at

Both are added, and neither is ever negative. The paper's weights are η of 0.5, 1 and 2, γ of 0.1, 0.5 and 1, batches of 100.

Traps. The authors' code has another L_diverse, Σ_d log(1 + exp(−mean_ij KL_d)), which is next to nothing once a few pairs
are far apart: the form "code". Statistics of pairs belong to a batch: those of small ones are noisy, and one row has none. The
paper says that free bits are for its baseline only (§4.1) and that all experiments have 0.01 nats of them for each pixel
(B.1.1); the code clamps the mean KL of a batch, 7.84 nats for 784 pixels. The last three rows of its Table 4 repeat a label:
they are of η = 0.5, 1 and 2.
"""

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from .bounds import Posterior
from .kernels import pairwise_kl, pairwise_kl_diversity

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def mutual_divergence(posterior: Posterior, diversity: float, smoothness: float, *, form: str = "paper",
                      group: "ProcessGroup | None" = None) -> tuple[Tensor, dict[str, Tensor]]:
    """η L_diverse + γ L_smooth of the posteriors of a batch, in nats.

    Args:
        posterior: of N ≥ 2 rows.
        diversity: η. What has weight 0 costs no gradient.
        smoothness: γ.
        form: of L_diverse, "paper" or "code".
        group: the batch is the concatenation of those of the ranks of this process group. The values are of the whole, on
            every rank; the gradients with respect to a rank's own rows are times the number of ranks, so that the mean over
            ranks, which data-parallel training takes, is the gradient of the whole.

    Returns:
        The weighted sum `[]`, and its parts without weights or gradients: "diversity" L_diverse, "smoothness" L_smooth, and
        "mpd".

    Time O(N²·D); with "code" O(N·min(D², N·D)).

    Raises:
        ValueError: fewer than two rows, or an unknown form.
    """
    fixed = Posterior(*(t.detach() for t in posterior))
    statistics = pairwise_kl(*(posterior if smoothness else fixed), group=group)
    diverse = pairwise_kl_diversity(*(posterior if diversity else fixed), form=form, group=group)
    penalty = diversity * diverse + smoothness * statistics.std
    if group is not None:
        penalty = group.size() * penalty - (group.size() - 1) * penalty.detach()
    return penalty, {"diversity": diverse.detach(), "smoothness": statistics.std.detach(), "mpd": statistics.mpd.detach()}


def data_parallel() -> "ProcessGroup | None":
    """The ranks that train together, each on rows of its own: the default process group; None for a single process."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if together else None

"""Ops on torch tensors, each with a PyTorch reference and native kernels behind one signature.

Usable without the model layer: `from latent_engine.kernels import gmm_log_prob`.

Second derivatives go through the reference and take its time and memory, of which a matrix of pairs may be part; so do first
derivatives taken with `create_graph=True` and by `torch.func`, which always asks for it.
"""

from .backends import BackendError, backend_matrix, explain, set_backend, use_backend
from .gmm import gmm_log_prob, gmm_log_prob_and_grad, gmm_moments
from .gmm_full import gmm_full_log_prob, gmm_full_moments
from .importance import importance_bound, importance_log_weights, importance_objective
from .importance_statistics import ImportanceAccumulator, effective_sample_size, importance_weights, pareto_k
from .likelihood import (
    bernoulli_log_prob,
    discretized_logistic_log_prob,
    gaussian_log_prob,
    gaussian_variance,
    negative_binomial_log_prob,
)
from .logistic_mixture import logistic_mixture_log_prob
from .mmd import kernel_sums, mmd2
from .mmd_normal import mmd2_to_normal
from .mmd_two_sample import median_heuristic, mmd_witness, two_sample_test
from .pairwise_kl import pairwise_kl, pairwise_kl_diversity
from .reparametrize import noise_keys, reparametrize
from .row_update import adam_history, row_adam_, row_catch_up_, row_sgd_

__all__ = [
    "BackendError",
    "ImportanceAccumulator",
    "adam_history",
    "backend_matrix",
    "bernoulli_log_prob",
    "discretized_logistic_log_prob",
    "effective_sample_size",
    "explain",
    "gaussian_log_prob",
    "gaussian_variance",
    "gmm_full_log_prob",
    "gmm_full_moments",
    "gmm_log_prob",
    "gmm_log_prob_and_grad",
    "gmm_moments",
    "importance_bound",
    "importance_log_weights",
    "importance_objective",
    "importance_weights",
    "kernel_sums",
    "logistic_mixture_log_prob",
    "median_heuristic",
    "mmd2",
    "mmd2_to_normal",
    "mmd_witness",
    "negative_binomial_log_prob",
    "noise_keys",
    "pairwise_kl",
    "pairwise_kl_diversity",
    "pareto_k",
    "reparametrize",
    "row_adam_",
    "row_catch_up_",
    "row_sgd_",
    "set_backend",
    "two_sample_test",
    "use_backend",
]

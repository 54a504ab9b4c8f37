"""Latent Engine: fast, exact kernels for latent-variable generative models, and a thin model layer on top."""

__version__ = "0.1.0"

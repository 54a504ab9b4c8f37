"""A latent-variable model of which everything is known in closed form: z ~ N(0, I), x = W z + b + √γ ε.

Columns of W are orthogonal, so that the posterior is a diagonal Gaussian:

    p(x) = N(b, W Wᵀ + γ I)    p(z | x) = N(S Wᵀ (x − b) / γ, S), S = (I + Wᵀ W / γ)⁻¹    I(x; z) = −½ log det S
"""

from types import SimpleNamespace

import torch

from latent_engine.bounds import Posterior
from latent_engine.kernels import gaussian_log_prob, importance_log_weights
from latent_engine.priors import StandardNormal
from latent_engine.system import System


class LinearGaussian(System):
    """float64; `shift` and `log_scale` move the encoder away from the exact posterior, by deviations and factors of them.

    `scales` `[D]` are the lengths of the columns of W.
    """

    name = "linear"

    def __init__(self, scales, shape=(1, 2, 3), variance=0.25, shift=0.0, log_scale=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.shape, self.variance, self.shift, self.log_scale = tuple(shape), variance, shift, log_scale
        features, self.scales = torch.Size(shape).numel(), torch.as_tensor(scales, dtype=torch.float64)
        random = torch.randn(features, len(self.scales), generator=generator, dtype=torch.float64)
        self.weight = torch.nn.Parameter(torch.linalg.qr(random).Q * self.scales)
        self.bias = torch.randn(features, generator=generator, dtype=torch.float64)
        self.prior = StandardNormal(len(self.scales)).double()
        self.likelihood = SimpleNamespace(variance=variance)
        self.decoded = []  # rows of each call of the decoder

    @property
    def posterior_variance(self):
        return 1 / (1 + self.scales.square() / self.variance)

    @property
    def mutual_information(self):
        return -0.5 * self.posterior_variance.log().sum().item()

    def marginal(self):
        cov = self.weight.detach() @ self.weight.detach().T + self.variance * torch.eye(len(self.bias), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.bias, cov)

    def encode(self, x):
        var = self.posterior_variance
        mean = var * ((x.flatten(1) - self.bias) @ self.weight / self.variance)
        log_var = (var.log() + 2 * self.log_scale).expand_as(mean)
        return Posterior(mean + self.shift * var.sqrt(), log_var)

    def represent(self, x):
        return self.encode(x).mean.detach()

    def decode(self, z):
        self.decoded.append(z.shape[:-1].numel())
        return (z @ self.weight.T + self.bias).unflatten(-1, self.shape)

    def reconstruct(self, x):
        return self.decode(self.represent(x)).detach()

    def log_weights(self, posterior, x, samples, generator=None):
        mean, log_var = posterior
        noise = torch.randn(samples, *mean.shape, generator=generator, dtype=mean.dtype)
        z = mean + (0.5 * log_var).exp() * noise
        variance = torch.tensor(self.variance, dtype=mean.dtype).log()
        log_px_z = gaussian_log_prob(x, self.decode(z), variance, event_dims=len(self.shape))
        return importance_log_weights(z, mean, log_var, log_px_z, self.prior(z))

    @torch.no_grad()
    def sample(self, n, generator=None, *, noise=True):
        x = self.decode(self.prior.sample(n, generator).double())
        return x + self.variance**0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype) if noise else x

"""Optional packages, imported where they are used."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A function was called whose optional package is not installed, or does not import."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports `module`, or says which extra of the package brings it and what it was wanted for."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(f"{purpose} needs the package {package}, which is not installed. "
                                f"Run: pip install 'latent-engine[{extra}]'") from None

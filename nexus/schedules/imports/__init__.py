"""Moving over: schedules of other packages' scheduler objects and functions, each proved at every step."""

from nexus.schedules.imports.optax import from_optax
from nexus.schedules.imports.proof import ImportMismatch, NotImportable
from nexus.schedules.imports.timm import from_timm
from nexus.schedules.imports.torch_momenta import betas_from_torch
from nexus.schedules.imports.torch_schedulers import from_torch
from nexus.schedules.imports.transformers import from_transformers

__all__ = [
    "ImportMismatch",
    "NotImportable",
    "betas_from_torch",
    "from_optax",
    "from_timm",
    "from_torch",
    "from_transformers",
]

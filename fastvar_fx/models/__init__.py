"""The image generators on which the pass is demonstrated and tested.

VAR is imported here; Infinity and HART are in the modules `infinity` and `hart`.
"""

from fastvar_fx.models.checkpoints import load
from fastvar_fx.models.demo_weights import held_out
from fastvar_fx.models.var import CONFIGS, VAR, VARConfig, build
from fastvar_fx.models.vqvae import VQVAE, VQVAEDecoder
from fastvar_fx.schedule import VAR_256, VAR_512

__all__ = [
    "CONFIGS",
    "VAR",
    "VAR_256",
    "VAR_512",
    "VQVAE",
    "VARConfig",
    "VQVAEDecoder",
    "build",
    "held_out",
    "load",
]

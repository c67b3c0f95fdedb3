"""The image generators that the pass is shown and tested on.

VAR is here; Infinity and HART are in the modules `infinity` and `hart`.
"""

from fastvar_fx.models.packaged import held_out
from fastvar_fx.models.var import CONFIGS, VAR, VAR_256, VAR_512, VARConfig, build, load
from fastvar_fx.models.vqvae import VQVAE, VQVAEDecoder

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

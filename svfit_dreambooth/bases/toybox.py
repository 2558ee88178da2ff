"""The embedded base: built as Stable Diffusion is, for pictures of 64 pixels."""

from svfit_dreambooth.bases.names import TOYBOX
from svfit_dreambooth.bases.stable_diffusion import StableDiffusion


class Toybox(StableDiffusion):
    """Recognised by its name, as its pipeline is an ordinary one."""

    guidance_scale = 4.0
    guidance_rescale = 0.85  # without it colours are too strong, and patterns rare: docs/toybox.md

    @property
    def architecture(self) -> str:
        return TOYBOX

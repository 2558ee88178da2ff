"""The licences that base models are under, which bind what is made from them."""

from dataclasses import dataclass

OF_THE_BASE = "as the base model's"  # how the licence begins that files get by themselves


@dataclass(frozen=True)
class Licence:
    """One licence, as people and as the Hugging Face Hub call it."""

    name: str
    hub: str


APACHE = Licence("Apache-2.0", "apache-2.0")
OPENRAIL = Licence("CreativeML OpenRAIL-M", "creativeml-openrail-m")
OPENRAIL_2 = Licence("CreativeML OpenRAIL++-M", "openrail++")

OF_A_FAMILY = {  # beginning of modelspec's architecture -> the licence of the family's original weights
    "toybox": APACHE,
    "stable-diffusion-v1": OPENRAIL,
    "stable-diffusion-v2": OPENRAIL_2,
    "stable-diffusion-xl": OPENRAIL_2,
    "Flux.2-klein-4b": APACHE,
    "Z-Image": APACHE,
    "Qwen-Image": APACHE,
    "chroma": APACHE,
    "lumina-2": APACHE,
    "pixart-sigma": OPENRAIL_2,
}
OF_A_BASE = {  # name of a base -> its licence; fine-tunes of these have their own
    "toybox": APACHE,
    "toybox 2": APACHE,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPENRAIL,
    "CompVis/stable-diffusion-v1-4": OPENRAIL,
    "stabilityai/stable-diffusion-2-1": OPENRAIL_2,
    "stabilityai/stable-diffusion-2-1-base": OPENRAIL_2,
    "stabilityai/stable-diffusion-xl-base-1.0": OPENRAIL_2,
}


def of_family(architecture: str) -> Licence | None:
    """The licence of the original weights of modelspec's `architecture`, None where it is not known."""
    return next((licence for start, licence in OF_A_FAMILY.items() if architecture.startswith(start)), None)


def of_base(base_model: str) -> Licence | None:
    """The licence of the base that files call `base_model`, None where it is not known."""
    return OF_A_BASE.get(base_model.partition("@")[0])

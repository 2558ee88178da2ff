"""The families that can be adapted, and which of them a pipeline or a network belongs to."""

from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from svfit_dreambooth.bases.chroma import Chroma
from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.flux1 import Flux1
from svfit_dreambooth.bases.flux2 import Flux2Klein
from svfit_dreambooth.bases.krea2 import Krea2
from svfit_dreambooth.bases.lumina2 import Lumina2
from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.bases.pixart_sigma import PixArtSigma
from svfit_dreambooth.bases.qwen_image import QwenImage
from svfit_dreambooth.bases.sana import Sana
from svfit_dreambooth.bases.sdxl import SDXL
from svfit_dreambooth.bases.stable_diffusion import StableDiffusion
from svfit_dreambooth.bases.stable_diffusion_3 import StableDiffusion3
from svfit_dreambooth.bases.toybox import Toybox
from svfit_dreambooth.bases.z_image import ZImage
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method import targets
from svfit_dreambooth.method.decomposition import Rank

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    SDXL,
    Flux2Klein,
    ZImage,
    QwenImage,
    Flux1,
    StableDiffusion3,
    Chroma,
    Krea2,
    Lumina2,
    Sana,
    PixArtSigma,
)
EMBEDDED: dict[str, type[Family]] = {DEFAULT_BASE: Toybox}  # known by the base's name, not by its pipeline


def family_named(pipeline_class: str, name: str) -> type[Family]:
    """The family of the base `name`, a pipeline of `pipeline_class`.  Raises SVFitError where there is none."""
    for family in FAMILIES:
        if family.pipeline_class.__name__ == pipeline_class:
            return family
    raise SVFitError(f"{name} is a {pipeline_class}, and only {_known()} models can be adapted.")


def family_of(pipeline: DiffusionPipeline, name: str | None = None) -> Family:
    """What is known of `pipeline`, whose base is called `name`.

    Its class need not be the one that the family is trained with: image to image works on the same networks.
    Raises SVFitError for a pipeline of other networks.
    """
    if name in EMBEDDED:
        return EMBEDDED[name](pipeline)
    for family in FAMILIES:
        if family.fits(pipeline):
            return family(pipeline)
    raise SVFitError(f"a {type(pipeline).__name__} cannot be adapted, only the networks of {_known()}.")


def _known() -> str:
    names = [family.pipeline_class.__name__ for family in FAMILIES]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def pipeline_components(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks of `pipeline` that adapters may change, by name."""
    return family_of(pipeline).components


def known_layer_names() -> targets.LayerNames:
    """What the networks of all families call their layers."""
    everything = [names for family in FAMILIES for names in family.layer_names.values()]
    return targets.LayerNames(
        tuple(dict.fromkeys(group for names in everything for group in names.attention)),
        tuple(dict.fromkeys(name for names in everything for name in names.feed_forward)),
    )


def find_projections(model: nn.Module, target_modules: Sequence[str] | None = None) -> targets.Projections:
    """`method.targets.find_projections` on any module, by the names of every kind of network known here."""
    return targets.find_projections(model, target_modules, known_layer_names())


def apply_svfit(
    model: nn.Module,
    rank: Rank = "full",
    target_modules: Sequence[str] | None = None,
    *,
    energy: float | None = None,
    basis: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, nn.Parameter]:
    """`method.targets.apply_svfit` on any module, by the names of every kind of network known here."""
    return targets.apply_svfit(model, rank, target_modules, names=known_layer_names(), energy=energy, basis=basis)

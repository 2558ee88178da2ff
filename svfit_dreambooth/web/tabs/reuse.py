"""The settings in a picture, back in the form that paints."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from svfit_dreambooth.bases.names import DEFAULT_BASE, spoken
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.orders import AS_TRAINED
from svfit_dreambooth.web.rooms.workspace import Visitor
from svfit_dreambooth.web.tabs.form import BITS

# of samplers.SAMPLERS, which would bring torch before the page is open; a test holds them together
SAMPLERS = ("ddim", "euler", "euler_a", "heun", "dpm++_2m", "dpm++_2m_karras", "unipc", "pndm")
OWN_SAMPLER = "the base's own"
LARGEST_SEED = 2**53 - 1  # that a browser tells from its neighbours
ONCE = "just paint"  # what the form says where nothing is to be compared


def take_up(app: App, visitor: Visitor, settings: dict[str, Any]) -> tuple[Any, ...]:
    """The form for `settings`; then the adapters' strengths, which the sliders take when they appear.

    A picture to begin with stays in the form only for a picture that began with one.  What is not at hand any more, such as
    adapters or base, is named in a warning.
    """
    choices, bases = app.adapter_choices(visitor), app.studio.bases
    offered = {Path(value).name: value for _, value in choices[::-1]}
    found = {offered[name]: strength for name, strength in settings["adapters"].items() if name in offered}
    missing = [f"the adapter {name}" for name in settings["adapters"] if name not in offered]
    own, base = _own_base(app, visitor, found), settings["base_model"]
    shown = AS_TRAINED
    if base != own and bases.is_here(base):
        shown = base
    elif base != own:
        missing.append(f"the base {spoken(base)}")
    if "strength" in settings:
        missing.append("the picture that it began with, which no file keeps")
    if "prompt_weights" in settings:
        missing.append("weights of words in a prompt, which the page does not read")
    if not (fits := 0 <= settings["seed"] <= LARGEST_SEED):
        missing.append(f"the seed {settings['seed']}, which no browser can hold: paint it by the command line")
    places: dict[str, str] = {}
    for name, autoencoder, what in (("vae", True, "the autoencoder"), ("trained_on", False, "the base trained on,")):
        places[name] = settings.get(name, "")
        if places[name] and not bases.is_here(places[name], autoencoder=autoencoder):
            missing.append(f"{what} {spoken(places[name])}")
            places[name] = ""
    if missing:
        gr.Warning(html.escape(f"not here any more: {', '.join(missing)}. The rest was filled in."))
    return (
        settings["prompt"],
        settings["negative_prompt"],
        gr.Dropdown([AS_TRAINED, *bases.names()], value=shown),
        gr.Dropdown(choices, value=list(found)),
        str(settings["num_inference_steps"]),
        f"{settings['guidance_scale']:g}",
        settings["seed"] if fits else gr.skip(),
        False,  # no new seed
        str(settings["width"]),
        str(settings["height"]),
        ONCE,
        1,  # one picture: the seed is this one's
        settings["scheduler"] if settings.get("scheduler") in SAMPLERS else OWN_SAMPLER,
        str(settings.get("clip_skip", "")),
        f"{settings.get('guidance_rescale', 0):g}",
        places["vae"],
        next((offered for offered, bits in BITS.items() if bits == settings.get("quantize")), next(iter(BITS))),
        places["trained_on"],
        gr.skip() if "strength" in settings else None,
        settings.get("strength", gr.skip()),
        found,
    )


def _own_base(app: App, visitor: Visitor, choices: dict[str, float]) -> str:
    """What AS_TRAINED stands for, with these adapters."""
    for choice in choices:
        file = app.adapter_file(visitor, choice)
        return library.entry(file.parent, file.stem).base_model
    return DEFAULT_BASE

"""`inspect` without an adapter: what carries a base, in words, as JSON, or drawn."""

import argparse
import json
from typing import Any

from svfit_dreambooth.commands.base import base_options
from svfit_dreambooth.commands.wording import printable
from svfit_dreambooth.errors import SVFitError


def inspect_base(options: argparse.Namespace) -> None:
    """Measures the sensitivity of the base that the options name, or finds it, and shows it."""
    from svfit_dreambooth.bases.devices import default_device
    from svfit_dreambooth.bases.opening import open_base_model
    from svfit_dreambooth.files import check_output
    from svfit_dreambooth.training.sensitivity import asked_prompts, base_sensitivity
    from svfit_dreambooth.training.sensitivity_report import describe_sensitivity, plot_sensitivity

    name = options.pretrained_model_name_or_path
    if name is None:
        raise SVFitError(
            "there is nothing to inspect: name an adapter, or a base with pretrained_model_name_or_path.",
            "pretrained_model_name_or_path",
        )
    if options.plot is not None:
        check_output(options.plot, ".png", [name], options.overwrite)
    base = open_base_model(name, content_filter=False, **base_options(options))
    family, device = base.family, default_device()
    if base.stored is not None:  # its text encoders are let go before the denoiser is opened
        with base.opened(*family.text_encoders, device=device):
            family.answers = {
                text: family.conditions([text]) for text in (*asked_prompts(base.name), "", family.no_prompt)
            }
        base.let_go(*family.text_encoders)
    layers = family.adapted_layers(options.target_modules, options.train_text_encoder)
    targets = {component: list(own) for component, own in layers.items()}
    found = base_sensitivity(base, targets, base.weights(layers), device=device, cache_dir=options.basis_cache_dir)
    described = describe_sensitivity(found)
    if options.plot is not None:
        path = plot_sensitivity(found, base.name, options.plot)
        if not options.json:
            print(printable(f"drawn: {path}"))
    if options.json:
        print(printable(json.dumps({"base_model": base.name, **described}, indent=2), keep="\n"))
        return
    print(
        printable(
            f"{base.name}: where a shift changes its answers (share of all F), and how few values carry half of it"
        )
    )
    print(
        f"a relative standard error of {described['error']:.0%} a value; all values moved by 1 at random change the "
        f"answers by {described['change']:.3g} of their size"
    )
    print(f"{'':64}{'layers':>7}{'values':>9}{'share':>9}{'half in':>9}")
    for name, row in {**described["blocks"], "total": described["total"], **described["layers"]}.items():
        _print_row(name, row)


def _print_row(name: str, row: dict[str, Any]) -> None:
    print(printable(f"{name:64}{row['layers']:>7}{row['values']:>9,}{row['share']:>9.2%}{row['half']:>9,}"))

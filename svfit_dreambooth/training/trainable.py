"""What a run trains: SVFit layers, put into its base."""

from collections.abc import Mapping

from torch import Tensor, nn

from svfit_dreambooth.method.basis import model_basis
from svfit_dreambooth.method.targets import apply_svfit, set_shifts
from svfit_dreambooth.training.plan import Run


def patch_run(run: Run, positions: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, nn.Parameter]]:
    """Puts SVFit layers in; returns the shifts by component and name.  `positions`: see `choose_positions`."""
    config, components = run.config, run.base.family.components
    bases = model_basis(
        run.weights,
        config.rank_value if positions is None else positions,
        energy=config.energy,
        cache_dir=config.basis_cache_dir,
        hashes=run.hashes,
    )
    shifts: dict[str, dict[str, nn.Parameter]] = {}
    for component in run.targets:
        module = components[component]
        own_bases = {name: bases[f"{component}.{name}"] for name in run.targets[component]}
        shifts[component] = apply_svfit(module, target_modules=run.targets[component], basis=own_bases)
        if run.initial is not None:
            set_shifts(module, run.initial.component_shifts(component))
    for frozen in (run.base.pipeline.vae, *components.values()):
        frozen.requires_grad_(False)
    for group in shifts.values():
        for shift in group.values():
            shift.requires_grad_(True)
    return shifts

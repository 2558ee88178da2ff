"""What a run trains: SVFit layers, put into its base."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from svfit_dreambooth.adapter import Adapter, read_adapter
from svfit_dreambooth.attention import apply_svfit, set_shifts
from svfit_dreambooth.base_model import pipeline_components
from svfit_dreambooth.basis import model_basis, same_base
from svfit_dreambooth.config import TrainConfig
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.learned_word import word_rows
from svfit_dreambooth.training.preparation import Run


def patch_run(run: Run, positions: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, nn.Parameter]]:
    """Puts SVFit layers in; returns the shifts by component and name.  `positions`: see `choose_positions`.

    Raises SVFitError for an `init_adapter` that does not fit what the run trains.
    """
    config, weights, pipeline = run.config, run.weights, run.base.pipeline
    initial = initial_adapter(config)
    if initial is not None:
        _check_initial(initial, weights | word_rows(pipeline, config.learned_word), config, run.hashes)
    bases = model_basis(
        weights,
        config.rank_value if positions is None else positions,
        energy=config.energy,
        cache_dir=None if config.basis_cache_dir is None else Path(config.basis_cache_dir),
        hashes=run.hashes,
    )
    shifts: dict[str, dict[str, nn.Parameter]] = {}
    for component in run.targets:
        module = getattr(pipeline, component)
        own_bases = {name: bases[f"{component}.{name}"] for name in run.targets[component]}
        shifts[component] = apply_svfit(module, target_modules=run.targets[component], basis=own_bases)
        if initial is not None:
            set_shifts(module, initial.component_shifts(component))
    for frozen in (pipeline.vae, *pipeline_components(pipeline).values()):
        frozen.requires_grad_(False)
    for group in shifts.values():
        for shift in group.values():
            shift.requires_grad_(True)
    return shifts


def initial_adapter(config: TrainConfig) -> Adapter | None:
    """The adapter that the run starts from, if any."""
    return None if config.init_adapter is None else read_adapter(config.init_adapter)


def _check_initial(initial: Adapter, weights: dict[str, Tensor], config: TrainConfig, hashes: dict[str, str]) -> None:
    path = config.init_adapter
    for word in initial.learned_words:
        if word.word != config.learned_word:
            raise SVFitError(f"--init_adapter {path} learned a word: add --learned_word {word.word}.")
    missing = sorted(set(initial.shifts) - set(weights))
    if missing:
        raise SVFitError(
            f"--init_adapter {path} adapts {missing[0]}, which this run does not train: "
            "use the same --target_modules and --train_text_encoder as its run."
        )
    names = {*initial.shifts, *initial.word_deltas()}
    own = {name: weight for name, weight in weights.items() if name in names}
    if same_base(initial.base_fingerprint, own, hashes) == "different":
        raise SVFitError(f"--init_adapter {path} was trained on another base model, {initial.base_model}.")

"""A budget of singular values for the whole model, given to those that help most.

Before the first step the model is patched at full rank, and the loss of a few of the run's own examples is
differentiated.  With g_i the gradient of the loss with respect to singular value i, at the base model, a first step
of AdamW moves each value by its step (see optimizer.py) against the sign of its mean gradient, however large that is,
and so lowers the loss by

    score_i = rate * scale_i * |mean of g_i over the examples|

Averaging before taking the size, not after, leaves out values whose gradients are large but point elsewhere with
every example.  The values with the highest scores share the budget, wherever they are: leading or not, many in one
layer and none in another.  `benchmarks/budget.py` compares that with ranks chosen by layer and with one rank for all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svfit_dreambooth.bases.devices import MIXED_PRECISION
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.examples import Examples
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.optimizer import plan_steps
from svfit_dreambooth.training.plan import Plan
from svfit_dreambooth.training.probing import gradient, probed
from svfit_dreambooth.training.sensitivity import Sensitivity

SCORING_BATCHES = 16  # of the run's own size
FLOAT16_LOSS_SCALE = 2.0**12  # keeps gradients within float16's range; a common factor changes no order


def allocate(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """The positions of the `budget` highest scores: name -> ascending positions, without layers that get none.

    `scores`: "<component>.<layer>" -> (k,), what each of a layer's values promises.  Every component gets at least
    one value; a budget beyond what there is takes all.
    Raises SVFitError for a budget smaller than the number of components.
    """
    components = {name.partition(".")[0] for name in scores}
    if budget < len(components):
        raise SVFitError(f"a budget of {budget} singular values is too small: give {len(components)} or more.")
    names = list(scores)
    flat = torch.cat([scores[name].double().cpu() for name in names])
    layer = torch.cat([torch.full((len(scores[name]),), i) for i, name in enumerate(names)])
    position = torch.cat([torch.arange(len(scores[name])) for name in names])
    for component in components:
        own = torch.tensor([name.partition(".")[0] == component for name in names])[layer].nonzero()[:, 0]
        flat[own[flat[own].argmax()]] = torch.inf
    taken = torch.argsort(flat, descending=True, stable=True)[:budget]
    chosen = {name: position[taken[layer[taken] == i]].sort().values for i, name in enumerate(names)}
    return {name: positions for name, positions in chosen.items() if len(positions)}


def choose_positions(
    plan: Plan,
    examples: Examples,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
    hashes: Mapping[str, str] | None = None,
    sensitivity: Sensitivity | None = None,
) -> dict[str, Tensor]:
    """The singular values that `plan.config.budget` pays for: "<component>.<layer>" -> positions, as `allocate`.

    Follows from the run's options and the base alone.  Costs about as much as `SCORING_BATCHES` training steps at
    full rank, in time and in memory; moves the adapted networks to `device`, in the precision of the run, and leaves
    them unpatched and frozen.  `weights`, `hashes`: of the layers as they are stored; None: as the base has them now.
    `sensitivity`: of all their values, where the steps of the run follow from it.
    Raises SVFitError where gradients are not finite, and as `allocate` does.
    """
    budget = plan.config.budget
    if budget is None:
        raise SVFitError("there is no budget to share out: set budget.", "budget")
    return allocate(score_values(plan, examples, device, weights, hashes, sensitivity), budget)


def score_values(
    plan: Plan,
    examples: Examples,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
    hashes: Mapping[str, str] | None = None,
    sensitivity: Sensitivity | None = None,
) -> dict[str, Tensor]:
    """step * |mean gradient| of every singular value, at the base: "<component>.<layer>" -> (k,), float32."""
    config, family = plan.config, plan.base.family
    steps = plan_steps({name: family.role(name) for name in plan.shapes}, config, sensitivity)
    dtype = MIXED_PRECISION[config.mixed_precision]
    scale = FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0
    for component in set(plan.trained) - set(plan.targets):  # text encoders that learn a word and nothing else
        family.components[component].to(device).requires_grad_(False)
    with probed(
        family, plan.targets, plan.weights() if weights is None else weights, hashes, device, dtype,
        checkpointing=config.gradient_checkpointing, cache_dir=config.basis_cache_dir,
    ) as shifts:  # fmt: skip
        objective = Objective(plan, examples, family.components, device)
        for number in tqdm(range(SCORING_BATCHES), desc="sharing out the budget", unit="batch", leave=False):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = objective.loss(number, 0, 1).total
            (loss * scale).backward()  # gradients add up
    scores = {}
    for name, shift in shifts.items():
        own = steps.rates[name] * gradient(shift).abs().float().cpu()
        scores[name] = own * steps.scales[name] if name in steps.scales else own
        if not torch.isfinite(scores[name]).all():
            raise SVFitError(f"the gradients of {name} are not finite: use mixed_precision bf16 or no.")
    return scores


def spread(shifts: Mapping[str, Tensor], positions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shifts of chosen values as vectors of the leading ones: name -> (highest position + 1,), zero elsewhere."""
    wide = {name: shift.new_zeros(int(positions[name][-1]) + 1) for name, shift in shifts.items()}
    return {name: vector.index_copy(0, positions[name], shifts[name]) for name, vector in wide.items()}

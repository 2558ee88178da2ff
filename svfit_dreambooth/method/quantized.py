"""Frozen layers whose weight is held in fewer bits than it is stored in.

Directions are those of the weight as it is stored, which such a layer no longer holds: who quantised it leaves a
function `stored` on it that reads it again.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from svfit_dreambooth.errors import SVFitError

KINDS = {
    "Int8Tensor": "int8",
    "Float8Tensor": "fp8",
    "Params4bit": "nf4",
}  # class of the weight, of torchao, bitsandbytes


def kind_of(layer: nn.Module) -> str:
    """How the weight of `layer` is held: "float", or one of the values of `KINDS`; "unknown" for other formats."""
    weight: Any = layer.weight
    kind = KINDS.get(type(weight).__name__)
    if kind is not None:
        return kind if kind != "nf4" or weight.quant_type == "nf4" else "unknown"
    return "float" if weight.is_floating_point() and not is_traceable_wrapper_subclass(weight) else "unknown"


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of `layer` is held in another way than as floating-point numbers."""
    return kind_of(layer) != "float"


def stored_weight(name: str, layer: nn.Module) -> Tensor:
    """The weight of the plain `layer` as it is stored.  Raises SVFitError where only its quantised copy is known."""
    if not is_quantized(layer):
        return layer.weight.detach()  # type: ignore[operator, union-attr, return-value]
    check_stored(name, layer)
    return vars(layer)["stored"]()


def check_stored(name: str, layer: nn.Module) -> None:
    """Raises SVFitError for a quantised layer that does not tell what its weight was before."""
    if "stored" not in vars(layer):
        raise SVFitError(
            f"{name} is quantised, and directions are those of the weight as it was before: open the base unquantised, "
            "and quantise it by quantize.",
            "quantize",
        )

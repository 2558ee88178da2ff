"""SVFit DreamBooth: your dog, mug or toy in generated pictures, in an adapter of a few hundred kilobytes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svfit_dreambooth import remarks as remarks  # filters must be in place before diffusers is imported
from svfit_dreambooth.peft_import import register_with_peft

if TYPE_CHECKING:
    from svfit_dreambooth.adapter import Adapter, read_adapter, save_adapter
    from svfit_dreambooth.attention import apply_svfit, remove_svfit
    from svfit_dreambooth.config import TrainConfig
    from svfit_dreambooth.errors import SVFitError
    from svfit_dreambooth.generation import generate
    from svfit_dreambooth.peft_method import SVFitConfig, adapter_from_peft
    from svfit_dreambooth.pipeline import load_adapter, merge_adapters, set_adapters, unload_adapter
    from svfit_dreambooth.svfit import SVFitLinear, decompose
    from svfit_dreambooth.training.train import train

__version__ = "0.1.0"

# Where each public name lives.  They are imported when first used: `--help` should not wait for torch.
_HOME = {
    "Adapter": "adapter",
    "read_adapter": "adapter",
    "save_adapter": "adapter",
    "apply_svfit": "attention",
    "remove_svfit": "attention",
    "TrainConfig": "config",
    "SVFitError": "errors",
    "generate": "generation",
    "SVFitConfig": "peft_method",
    "adapter_from_peft": "peft_method",
    "load_adapter": "pipeline",
    "merge_adapters": "pipeline",
    "set_adapters": "pipeline",
    "unload_adapter": "pipeline",
    "SVFitLinear": "svfit",
    "decompose": "svfit",
    "train": "training.train",
}

__all__ = [
    "Adapter",
    "SVFitConfig",
    "SVFitError",
    "SVFitLinear",
    "TrainConfig",
    "adapter_from_peft",
    "apply_svfit",
    "decompose",
    "generate",
    "load_adapter",
    "merge_adapters",
    "read_adapter",
    "remove_svfit",
    "save_adapter",
    "set_adapters",
    "train",
    "unload_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


register_with_peft()

"""SVFit DreamBooth: your dog, mug or toy in generated pictures, in an adapter of a few hundred kilobytes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svfit_dreambooth import remarks as remarks  # filters must be in place before diffusers is imported

if TYPE_CHECKING:
    from svfit_dreambooth.adapter.file import Adapter, read_adapter, save_adapter
    from svfit_dreambooth.bases.families import apply_svfit
    from svfit_dreambooth.errors import SVFitError
    from svfit_dreambooth.method.decomposition import decompose
    from svfit_dreambooth.method.layer import SVFitLinear
    from svfit_dreambooth.method.targets import remove_svfit
    from svfit_dreambooth.painting.generate import generate
    from svfit_dreambooth.painting.loading import load_adapter, merge_adapters, set_adapters, unload_adapter
    from svfit_dreambooth.painting.mixes import adapter_mixes
    from svfit_dreambooth.peft.method import SVFitConfig, adapter_from_peft
    from svfit_dreambooth.training.config import TrainConfig
    from svfit_dreambooth.training.run import train

__version__ = "0.1.0"

# Where each public name lives.  They are imported when first used: `--help` should not wait for torch.
_HOME = {
    "Adapter": "adapter.file",
    "read_adapter": "adapter.file",
    "save_adapter": "adapter.file",
    "apply_svfit": "bases.families",
    "remove_svfit": "method.targets",
    "TrainConfig": "training.config",
    "SVFitError": "errors",
    "generate": "painting.generate",
    "SVFitConfig": "peft.method",
    "adapter_from_peft": "peft.method",
    "adapter_mixes": "painting.mixes",
    "load_adapter": "painting.loading",
    "merge_adapters": "painting.loading",
    "set_adapters": "painting.loading",
    "unload_adapter": "painting.loading",
    "SVFitLinear": "method.layer",
    "decompose": "method.decomposition",
    "train": "training.run",
}

__all__ = [
    "Adapter",
    "SVFitConfig",
    "SVFitError",
    "SVFitLinear",
    "TrainConfig",
    "adapter_from_peft",
    "adapter_mixes",
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

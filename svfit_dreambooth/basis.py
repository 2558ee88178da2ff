"""Where copies of comfyui/svfit_loader.py that people have look for what is in `method/basis.py`."""

from svfit_dreambooth.method.basis import model_basis, same_base

__all__ = ["model_basis", "same_base"]

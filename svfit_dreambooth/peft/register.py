"""Makes SVFit known to PEFT as soon as both are imported, in whichever order, without importing PEFT.

An adapter that was saved with `SVFitConfig` names its method, and PEFT looks that name up in its own registry.  A
script that merely loads one need not mention `SVFitConfig` at all, so the registration may not wait for somebody
to import it; and importing PEFT here would cost everybody seconds.  Hence a finder that Python asks about every
import: it waits for "peft" and has `peft_method` imported right after.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)

METHOD = "svfit_dreambooth.peft.method"


class AfterPeft:
    """Finds the module `peft` as Python would, and adds our registration to what its loading does."""

    def __init__(self) -> None:
        self.looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft" or self.looking:
            return None
        self.looking = True  # the others on sys.meta_path are asked now, and not this one again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Registers SVFit with PEFT now if it is imported already, else when it will be."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterPeft())


def _register() -> None:
    try:
        importlib.import_module(METHOD)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        # somebody else's `import peft` must not fail on our account
        logger.warning(
            "SVFit could not be registered with this version of PEFT (%s): peft>=0.21 is known to work.", error
        )

"""SVFit as one of PEFT's methods."""


def register() -> None:
    """Makes SVFit known to PEFT, which looks the method of a saved adapter up in its own registry.

    `from svfit_dreambooth import SVFitConfig` does the same; a script that merely loads an adapter calls this, or
    PEFT answers `KeyError: 'SVFIT'`.  Imports PEFT, which takes seconds.  May be called again.
    """
    import svfit_dreambooth.peft.method  # noqa: F401  registers as it is imported

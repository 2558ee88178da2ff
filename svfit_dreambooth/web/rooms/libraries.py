"""The libraries that painting and training rest on, which take seconds to import."""

import threading

_importing = threading.Lock()


def libraries() -> None:
    """Imports them, one thread at a time; call it before anything of theirs is imported in a handler.

    diffusers and transformers put another module in their place at the end of their import: a thread that comes
    meanwhile would be left with the unfinished one, "cannot import name".
    """
    with _importing:
        import svfit_dreambooth.painting.generate  # noqa: F401

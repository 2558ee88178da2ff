"""The one exception that people meet."""


class SVFitError(ValueError):
    """A mistake of input, told in one plain sentence; commands print it without a traceback."""

"""The one exception that people meet."""


class SVFitError(ValueError):
    """A mistake of input, told in one plain sentence; commands print it without a traceback.

    The sentence names parameters as Python does, `learning_rate`; command lines turn these names into flags.
    `parameters`: those that the sentence names by a word that might also be an ordinary one, such as "rank".
    """

    def __init__(self, message: str, *parameters: str) -> None:
        super().__init__(message)
        self.parameters = parameters

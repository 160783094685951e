"""The one error of `largebatch env`."""


class EnvError(ValueError):
    """It cannot be done as asked; the message is one sentence for the user."""

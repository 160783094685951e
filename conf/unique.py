"""`${unique:}` in a folder's name: of runs that begin in the same second, each has its own."""

import secrets

from omegaconf import OmegaConf


def register() -> None:
    """Teach OmegaConf `${unique:}`: eight letters, the same all through one configuration."""
    OmegaConf.register_new_resolver(
        "unique", lambda: secrets.token_hex(4), use_cache=True, replace=True
    )


register()

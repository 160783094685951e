"""Resolvers of the configuration's own: `${unique:}` in names of folders, `${exit_codes:}` in help.

Of runs that begin in the same second, each has its own folder.
"""

import secrets

from omegaconf import OmegaConf

from largebatch.records.outcomes import exit_code_help


def register() -> None:
    """Register them; `${unique:}` is eight letters, the same all through one configuration."""
    OmegaConf.register_new_resolver(
        "unique", lambda: secrets.token_hex(4), use_cache=True, replace=True
    )
    OmegaConf.register_new_resolver("exit_codes", exit_code_help, replace=True)


register()

"""Configurations as YAML, as OmegaConf writes them, by libyaml where PyYAML has it."""

from typing import Any, Final

import yaml

_Base: Any = getattr(yaml, "CDumper", yaml.Dumper)

# Strings without quotes that a reader of YAML 1.1 takes for truth values.
_TRUTHS: Final = {
    form for word in ("y", "n", "yes", "no", "true", "false", "on", "off")
    for form in (word, word.capitalize(), word.upper())
}  # fmt: skip


class _Dumper(_Base):  # type: ignore[misc] # either of two bases
    """Writes in quotes what OmegaConf would not read as a string."""


def _write_string(dumper: Any, text: str) -> Any:
    style = "'" if text in _TRUTHS or _is_number(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_Dumper.add_representer(str, _write_string)


def to_yaml(values: Any) -> str:
    """Return what `OmegaConf.to_yaml` writes of a configuration with these values, a tenth of its
    time; characters beyond the basic plane are escaped.

    Args:
        values: plain ones, as `OmegaConf.to_container` makes them.

    >>> print(to_yaml({"lr": 0.1, "name": "1e5", "betas": [0.9, None]}), end="")
    lr: 0.1
    name: '1e5'
    betas:
    - 0.9
    - null
    """
    text: str = yaml.dump(
        values, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=_Dumper
    )
    return text

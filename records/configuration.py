"""The YAML that Hydra leaves in a run's folder: read as data, within bounds."""

from pathlib import Path
from typing import Any, Final

from largebatch.common.text import printable
from largebatch.records.fields import RecordError
from largebatch.records.reading import read_bytes

MOST_BYTES: Final = 1 << 20  # Hydra writes some thousand
MOST_LEVELS: Final = 40  # and five; parsers take 10^5 levels to minutes, or to the stack's end


def read_yaml(path: Path) -> Any:
    """Read a configuration as OmegaConf has it; nothing in it is resolved, imported or called.

    Raises:
        FileNotFoundError: there is none.
        RecordError: it cannot be read. Nor is one read in which a value stands for another
            (`*name`): Hydra writes none, and nine lines of them stand for 10^9 values.
    """
    data = read_bytes(path, MOST_BYTES)
    import yaml
    from omegaconf import OmegaConf

    try:
        text = data.decode()
        if not text.strip():
            raise ValueError("it is empty")
        depth = 0
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has an alias, which no record has")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_LEVELS:
                raise ValueError("it is nested too deeply")
        return OmegaConf.create(text)
    except Exception as error:  # parsers raise whatever the text makes them
        why = " ".join(printable(line.strip()) for line in str(error).splitlines())
        raise RecordError(f"{printable(path)} is damaged ({why})") from None

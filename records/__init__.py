"""The format of a run's folder: names of its files, and typed readers of what they hold.

A folder may come from anywhere, whole or damaged. The readers wait for no file, run nothing that is
in one, and say what is wrong in one sentence with the file and the field. Imports no torch.
"""

from largebatch.common.text import printable
from largebatch.records.fields import Fields, RecordError
from largebatch.records.reading import find_fields, last_fields, read_fields, read_lines

__all__ = [
    "Fields",
    "RecordError",
    "find_fields",
    "last_fields",
    "printable",
    "read_fields",
    "read_lines",
]

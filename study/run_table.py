"""Runs as rows, for whatever takes tables."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


class RunTable(list[dict[str, Any]]):
    """A row a run, each with the same columns: a list that pandas and polars take as it is."""

    def to_pandas(self) -> "pandas.DataFrame":
        """The rows as a `pandas.DataFrame`.

        Raises:
            ModuleNotFoundError: pandas is not installed; no other part of this package needs it.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_pandas needs pandas, which is not installed: pip install pandas, or take the "
                "rows as they are, a list of dictionaries",
                name=error.name,
            ) from error
        return pandas.DataFrame(self)

"""Results as files that other programs read."""

from pathlib import Path

from ..result import Labelled
from .extras import need
from .files import check_file, replacing


def export(result: Labelled, path: str | Path, *axes: str, overwrite: bool = False) -> int:
    """Write `result.to_pandas(*axes)` as .csv, or as .parquet (extra `parquet`), and return the number of rows.

    One query is held at a time; numbers in .csv are written so that they read back the same.

    Args:
        result: any of attrib's.
        path: of the file, in a folder that is there.
        axes: some of "step", "example", "group", as for `result.by`.
        overwrite: replace the file that is there.

    Raises:
        ValueError: another ending. KeptAxesError: the axes were not kept. MissingExtraError: no pyarrow. StoreExistsError:
        something is there and overwrite is False.

    Example:
        >>> attrib.report.export(result, "contributions.csv", "example")
        48
        >>> import pandas
        >>> pandas.read_csv("contributions.csv").columns.tolist()
        ['query', 'example', 'contribution']
    """
    path = Path(path)
    check_file(path, overwrite)
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"the format is not known: got {path.name!r}, expected a name that ends in .csv or .parquet.")
    with replacing(path) as beside:
        return (_csv if path.suffix == ".csv" else _parquet)(result, beside, axes)


def _csv(result: Labelled, path: Path, axes: tuple[str, ...]) -> int:
    rows = 0
    for q in range(len(result.names)):
        table = result.select([q]).to_pandas(*axes)
        table.to_csv(path, mode="a" if q else "w", header=q == 0, index=False)
        rows += len(table)
    return rows


def _parquet(result: Labelled, path: Path, axes: tuple[str, ...]) -> int:
    arrow, parquet = need("pyarrow", "parquet"), need("pyarrow.parquet", "parquet")
    rows, writer = 0, None
    try:
        for q in range(len(result.names)):
            table = arrow.Table.from_pandas(result.select([q]).to_pandas(*axes), preserve_index=False)
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            rows += len(table)
    finally:
        if writer is not None:
            writer.close()
    return rows

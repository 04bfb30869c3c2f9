"""Records of a data set of the hub."""

from collections.abc import Iterator
from pathlib import Path

from spectune.data.reading.file_source import near
from spectune.data.reading.object_source import dataset_records
from spectune.data.reading.raw_records import Record
from spectune.errors import DataError, first_line


def hub_records(name: str) -> Iterator[Record]:
    """The rows of `owner/name`, `owner/name:split` or `owner/name@config:split`; the split is `train` if none is named.
    Raises DataError: it cannot be had."""
    import datasets

    path, _, split = name.removeprefix("hub:").partition(":")
    path, _, config = path.partition("@")
    try:
        found = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:
        raise DataError(
            f"{name!r} is no file here{near(Path(name))}, and as a data set of the hub it cannot be had "
            f"({first_line(error)}). Give a file (.jsonl, .json, .csv, .parquet, .txt), or a hub name that can be "
            "reached (`name:split`, `name@config:split`)."
        ) from error
    return dataset_records(found, name)

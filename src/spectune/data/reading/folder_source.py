"""Records of a folder: one that `datasets` saved, or one of data files that belong together."""

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from spectune.data.reading.file_source import KNOWN, file_records, kind_of, suffix_of
from spectune.data.reading.limits import FILES, check_regular
from spectune.data.reading.object_source import dataset_records
from spectune.data.reading.raw_records import SPLITS, Record
from spectune.errors import DataError, first_line, some

_SAVED = ("dataset_dict.json", "state.json")
#: files that stand beside data and are none: descriptions of it, and marks that a writer leaves
_BESIDE = re.compile(r"[._].*|(readme|licen[cs]e|changelog|citation)\b.*|dataset_infos?\.json", re.IGNORECASE)
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?:sets?|data|split)?(?![a-z])")
_INNER_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def folder_records(
    folder: Path, *, delimiter: str | None = None, encoding: str | None = None, known: Collection[str] = ()
) -> Iterator[Record]:
    """The records of all files, which are of one kind, by name. Raises DataError: not one data set is in the folder."""
    try:
        entries = sorted(itertools.islice(folder.iterdir(), FILES + 1))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error}") from error
    if len(entries) > FILES:
        raise DataError(f"{folder}: more than {FILES:,} files in one folder; name the file that is meant")
    if any(entry.name in _SAVED for entry in entries):
        yield from _saved(folder)
        return
    for path in _data_files(folder, entries):
        yield from file_records(path, delimiter=delimiter, encoding=encoding, known=known)


def _saved(folder: Path) -> Iterator[Record]:
    import datasets

    for path in itertools.islice(itertools.chain(folder.glob("*"), folder.glob("*/*")), FILES):
        check_regular(path)
    try:
        found = datasets.load_from_disk(str(folder))
        for part in found.values() if isinstance(found, Mapping) else [found]:
            part.data.table.validate(full=True)  # a damaged one would end the process
    except Exception as error:
        raise DataError(f"{folder}: no readable folder of datasets' save_to_disk: {first_line(error)}") from error
    yield from dataset_records(found, str(folder))


def _data_files(folder: Path, entries: list[Path]) -> list[Path]:
    """The files to read. Raises DataError: none, of several kinds or splits, or with something else beside them."""
    seen = [entry for entry in entries if not _BESIDE.fullmatch(entry.name)]
    files = [entry for entry in seen if entry.is_file() and kind_of(entry) is not None]
    notes = [entry for entry in files if suffix_of(entry) == ".md"]
    if len(notes) < len(files):  # notes beside the data
        files, seen = ([entry for entry in part if entry not in notes] for part in (files, seen))
    holds = f"It holds: {some([entry.name for entry in entries])}." if entries else "It is empty."
    if not files:
        raise DataError(f"{folder} is a folder without data files. {holds} Expected files of one kind ({KNOWN})")
    if other := [entry.name for entry in seen if entry not in files]:
        raise DataError(
            f"{folder} is a folder that holds more than data files ({some(other)}). {holds} Name the file that is "
            f"meant, such as {files[0]}"
        )
    kinds = sorted({kind_of(path) or "" for path in files})
    if len(kinds) > 1:
        raise DataError(
            f"{folder} is a folder with files of several kinds ({', '.join(kinds)}). {holds} Name the file that is "
            f"meant, such as {files[0]}"
        )
    _check_parts(folder, files)
    return files


def _check_parts(folder: Path, files: list[Path]) -> None:
    """Raises DataError: the files are no parts of one whole: several splits, or one file twice."""
    splits = {_split(path.name): path for path in reversed(files)}
    if len(splits) > 1:
        raise DataError(
            f"{folder} is a folder with several splits in it ({some([path.name for path in files])}); name one file, "
            f"such as {splits.get('train', files[0])}"
        )
    twins: dict[str, list[str]] = defaultdict(list)
    for path in files:
        twins[path.name.removesuffix(path.suffix) if suffix_of(path).count(".") == 2 else path.name].append(path.name)
    if twice := [name for names in twins.values() if len(names) > 1 for name in names]:
        raise DataError(f"{folder} is a folder with a file both packed and not ({some(twice)}); name the one to read")


def _split(name: str) -> str | None:
    """`train` of `train-00001.jsonl`, `my_trainset.jsonl` and `TrainData.jsonl`; None where no split is named."""
    found = _SPLIT.search(_INNER_CAPITAL.sub("_", name).lower())
    return found[1] if found else None

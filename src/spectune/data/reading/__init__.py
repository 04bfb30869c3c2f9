"""Records out of anything that holds rows: files, folders, hub names, objects."""

from spectune.data.reading.raw_records import Bad, Record
from spectune.data.reading.sources import missing, records

__all__ = ["Bad", "Record", "missing", "records"]

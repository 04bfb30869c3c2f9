"""TensorBoard's files of a run that goes on from a checkpoint."""

from pathlib import Path

from spectune.files.atomic import atomic_file


def drop_events_after(folder: Path, step: int) -> None:
    """Take the events of later steps out of the event files in a folder, which the run will write again.

    What is left is written anew, so that every reader has each step once, and not only TensorBoard, which can be told
    to overlook events. A file that a kill cut short loses the event that was being written.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in sorted(folder.glob("*tfevents*")):
        kept = [record for record in RawEventFileLoader(str(path)).Load() if Event.FromString(record).step <= step]
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            writer = RecordWriter(file)
            for record in kept:
                writer.write(record)

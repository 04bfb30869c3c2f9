"""What is wrong with one row."""

#: characters that are kept: what a problem quotes of its row may be long, and there may be many
_LONGEST = 1500


class RowProblem(Exception):  # noqa: N818 - it is told to the user as a line of a DataError
    """What is wrong with one row, and what was expected; who reads the rows adds where it stands."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...")

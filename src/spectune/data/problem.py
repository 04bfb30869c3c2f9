"""What is wrong with one row."""


class RowProblem(Exception):  # noqa: N818 - it is told to the user as a line of a DataError
    """What is wrong with one row, and what was expected; who reads the rows adds where it stands."""

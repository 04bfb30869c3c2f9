"""CSV, strictly (RFC 4180), with cells of any size.

Not Python's `csv`: its limit to a cell's size belongs to the whole process, and it takes a quote that is never closed
for a cell that ends with the file.
"""

import re
from collections.abc import Iterator

from spectune.data.reading.limits import COLUMNS, ROW
from spectune.data.reading.raw_records import Bad

#: what stands in quotes, quotes written twice among it
_INSIDE = re.compile(r'[^"]*+(?:""[^"]*+)*+')


class UnclosedQuoteError(Exception):
    """A quote that is never closed; `line` is the number of the line in which it opened."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


class RowTooLongError(Exception):
    """A row of more characters than are read, or of more cells; `line` is the number of the line in which it, or the
    quote that makes it so long, opened."""

    def __init__(self, line: int, *, quoted: bool = False) -> None:
        super().__init__(line)
        self.line, self.quoted = line, quoted


class CsvRows:
    """`(line, cells)` for each row that is not blank, `line` being the number of its first line. Cells that Python's
    `csv` would read, but no standard allows, make the row bad; a row ends where `csv` would end it.

    Raises UnclosedQuoteError: what follows would be swallowed by one cell; RowTooLongError.
    """

    def __init__(self, lines: Iterator[str], delimiter: str, *, longest: int = ROW) -> None:
        self._longest = longest
        self._lines = lines
        self._delimiter = delimiter
        self._number = 0
        #: the line that is being read, and where in it
        self._line = ""
        self._position = 0

    def __iter__(self) -> Iterator[tuple[int, list[str] | Bad]]:
        for line in self._lines:
            self._number += 1
            start = self._number
            if '"' in line:
                self._line, self._position = line, 0
                yield start, self._quoted_row()
            elif line := line.removesuffix("\r"):
                yield start, line.split(self._delimiter)

    def _quoted_row(self) -> list[str] | Bad:
        cells: list[str] = []
        size, start = 0, self._number
        wrong: Bad | None = None
        while True:
            opened = self._number
            quoted = self._line.startswith('"', self._position)
            cell = self._quoted_cell() if quoted else ""
            stop = self._line.find(self._delimiter, self._position)
            plain = self._line[self._position : None if stop < 0 else stop]
            if stop < 0:
                plain = plain.removesuffix("\r")
            cells.append(cell + plain)
            if len(cells) > COLUMNS or (size := size + len(cell) + len(plain)) > self._longest:
                raise RowTooLongError(start, quoted=len(cells) <= COLUMNS)
            if quoted and plain:
                where = "" if opened == self._number else f" of the cell that opens in line {opened}"
                wrong = wrong or Bad(
                    f"malformed CSV: {plain[:20]!r} in line {self._number} stands behind the closing quote{where}; "
                    'expected a quote inside a cell to be written twice ("")'
                )
            elif '"' in plain:
                wrong = wrong or Bad(
                    f"malformed CSV: a quote inside the cell {plain[:20]!r}, which does not begin with one; expected "
                    'the cell in quotes, and a quote inside it written twice ("")'
                )
            if stop < 0:
                return wrong or cells
            self._position = stop + len(self._delimiter)

    def _quoted_cell(self) -> str:
        """The cell whose opening quote stands at the position; it ends behind the closing one."""
        opened, pieces, length = self._number, list[str](), 0
        self._position += 1
        while True:
            inside = _INSIDE.match(self._line, self._position)
            assert inside is not None
            pieces.append(inside[0].replace('""', '"'))
            if (end := inside.end()) < len(self._line):
                self._position = end + 1
                return "".join(pieces)
            pieces.append("\n")
            length += len(inside[0]) + 1
            if length > self._longest:
                raise RowTooLongError(opened, quoted=True)
            line = next(self._lines, None)
            if line is None:
                raise UnclosedQuoteError(opened)
            self._line, self._position = line, 0
            self._number += 1

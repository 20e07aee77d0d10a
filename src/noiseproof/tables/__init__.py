"""Tables in and out: CSV, TSV, JSON lines, Parquet, saved `datasets` folders and hub names.

Also NumPy archives, whose arrays of more than one dimension are columns beside the frame, and
folders of images, one folder per class.

Whatever is wrong with a file becomes one line that names the file, the row and the remedy; nothing
that pandas, pyarrow or datasets raise gets through. Files are read and written in pieces of `PIECE`
rows. Texts are kept by Arrow, and where they are many, in a temporary file that is mapped into
memory: a million short texts would take 250 MB as Python objects, and take next to none so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from noiseproof.tables.reading import has_splits, is_missing, load_table, read_table, read_utf8
from noiseproof.tables.strings import PIECE, Strings, let_go, map_table
from noiseproof.tables.table import Table, array_column, nearest, shorten
from noiseproof.tables.writing import WRITABLE, check_writable, write_archive, write_table

if TYPE_CHECKING:
    from noiseproof.tables.table import DataFrame as DataFrame
    from noiseproof.tables.table import Source as Source

__all__ = [
    "PIECE",
    "WRITABLE",
    "Strings",
    "Table",
    "array_column",
    "check_writable",
    "has_splits",
    "is_missing",
    "let_go",
    "load_table",
    "map_table",
    "nearest",
    "read_table",
    "read_utf8",
    "shorten",
    "write_archive",
    "write_table",
]

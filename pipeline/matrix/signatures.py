"""Files that hold more than plain numbers, recognised by their first bytes, and how to get at their arrays.

Numbers may begin with any bytes. So two kinds are told apart: formats that are recognised by four bytes or more, which
numbers begin with once in four thousand million files, are refused in any case; the others only where the caller
does not say that the file is raw binary, by its dtype and the shape of a row.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import IO

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
NPY_MAGIC = b"\x93NUMPY"
_HEAD_NBYTES = 512
_SMALLEST_USER_BLOCK = 512
"""Bytes before the superblock of HDF5: none, or this many times a power of two."""


class Format(NamedTuple):
    """A format that cannot be read here."""

    name: str
    way_out: str
    is_sure: bool
    """Recognised by four bytes or more."""


_UNPACK = "unpack it"
_SAVE = "read it with {}, and save the array with numpy.save"
_TABLE: list[tuple[bytes, str, str]] = [
    (rb"PK(\x03\x04|\x05\x06)", "a ZIP archive, as .npz is", "unpack it; an .npz holds one .npy for each array"),
    (rb"\x1f\x8b\x08[\0-\x1f].{4}[\0\x02\x04][\0-\x0d\xff]", "compressed by gzip", _UNPACK),
    (rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)", "compressed by bzip2", _UNPACK),
    (rb"\xfd7zXZ\0", "compressed by xz", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "compressed by Zstandard", _UNPACK),
    (rb"\x04\x22\x4d\x18", "compressed by LZ4", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb".{257}ustar", "a tar archive", _UNPACK),
    (rb"CDF[\x01\x02\x05]", "netCDF-3", "convert it to netCDF-4 with: nccopy -k nc4 SOURCE DEST"),
    (rb"\x0e\x03\x13\x01", "HDF4", "convert it to HDF5 with: h4toh5 SOURCE DEST"),
    (
        rb"MATLAB 5\.0 MAT-file",
        "a MATLAB file before version 7.3",
        "save it with -v7.3, or " + _SAVE.format("scipy.io"),
    ),
    (rb"PAR1", "Parquet", _SAVE.format("pandas or pyarrow")),
    (rb"ARROW1|FEA1", "Arrow or Feather", _SAVE.format("pandas or pyarrow")),
    (rb"Obj\x01", "Avro", _SAVE.format("fastavro")),
    (rb"SQLite format 3\0", "an SQLite database", _SAVE.format("sqlite3")),
    (rb"II[*+]\0|MM\0[*+]", "TIFF", _SAVE.format("tifffile")),
    (rb"\x89PNG\r\n\x1a\n|GIF8[79]a", "an image", _SAVE.format("Pillow")),
    (rb"SIMPLE  =", "FITS", _SAVE.format("astropy.io.fits")),
    (rb"GRIB.{3}[\x01\x02]", "GRIB", _SAVE.format("cfgrib or eccodes")),
    (rb"RIFF.{4}WAVE", "WAV", _SAVE.format("scipy.io.wavfile")),
    (rb"0 {7}|\xffBIOSEMI", "EDF or BDF", _SAVE.format("mne or pyedflib")),
    (rb".{344}n[+i]1\0", "NIfTI", _SAVE.format("nibabel")),
    (rb".{128}DICM", "DICOM", _SAVE.format("pydicom")),
]
_UNSURE: list[tuple[bytes, str, str]] = [
    (rb"\x80[\x04\x05]\x95|\x80[\x02\x03][c}\](]", "a pickle", "it is never unpickled; save its array with numpy.save"),
    (rb"\xff\xd8\xff", "an image", _SAVE.format("Pillow")),
    (rb"[\t\n\r -~]+\Z", "text", _SAVE.format("numpy.loadtxt or pandas")),
]


def recognize(file: IO[bytes]) -> Format | None:
    r"""Recognise a format that is neither `.npy` nor HDF5; None where the bytes may be plain numbers.

    Examples
    --------
    >>> import io
    >>> recognize(io.BytesIO(b"CDF\x02...")).name
    'netCDF-3'
    """
    file.seek(0)
    head = file.read(_HEAD_NBYTES)
    for is_sure, table in ((True, _TABLE), (False, _UNSURE)):
        for pattern, name, way_out in table:
            if re.match(pattern, head, re.DOTALL):
                return Format(name, way_out, is_sure)
    return None


def is_npy(file: IO[bytes]) -> bool:
    """Whether an `.npy` begins here."""
    file.seek(0)
    return file.read(len(NPY_MAGIC)) == NPY_MAGIC


def find_hdf5(file: IO[bytes]) -> int | None:
    """Return the size of HDF5's user block, as those of MATLAB 7.3 have one; None where the file is no HDF5."""
    size = file.seek(0, 2)
    offset = 0
    while offset < size:
        file.seek(offset)
        if file.read(len(HDF5_MAGIC)) == HDF5_MAGIC:
            return offset
        offset = max(_SMALLEST_USER_BLOCK, 2 * offset)
    return None

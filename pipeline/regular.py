"""Files of the local disk that are read whole: only those that have an end."""

from __future__ import annotations

import stat
from pathlib import Path

_HANDED_OVER = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # by whoever starts us: a shell's `|` and `<(command)`


def check_regular(path: str | Path) -> None:
    """Refuse what may have no end, before it is opened: a device, a socket, or a pipe that lies in a folder.

    A pipe that is handed over open, as `/dev/stdin`, ends with the command that writes it.

    Raises:
        ValueError: naming it. OSError: if it is not there.
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # of a folder, whoever opens it says so
        return
    if not (stat.S_ISFIFO(mode) and str(path).startswith(_HANDED_OVER)):
        raise ValueError(f"{path} is a device, a pipe or a socket, which may have no end; give a file")

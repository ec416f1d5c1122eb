"""Who could have written what is found beside the data: only what is the user's own is used without being named."""

from __future__ import annotations

import os
import stat
from contextlib import suppress


def find_stranger(status: os.stat_result) -> str | None:
    """Say how somebody else could have written a file or folder.

    Parameters
    ----------
    status
        Of the file or folder, as `os.fstat` gives it.

    Returns
    -------
    str or None
        Such as ``"belongs to user 1000"``; None where only the user and root can write it.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "cluster.yaml"
    >>> path.touch(0o600)
    >>> find_stranger(path.stat())
    >>> path.chmod(0o666)
    >>> find_stranger(path.stat())
    'can be written by other users'
    """
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)):
        return "can be written by other users"
    return None


def _is_private(group: int) -> bool:
    """Whether a group is the user's own, without other members: Linux distributions make one for each user."""
    import grp
    import pwd

    with suppress(KeyError):
        found, name = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
        return found.gr_name == name and not {*found.gr_mem} - {name}
    return False

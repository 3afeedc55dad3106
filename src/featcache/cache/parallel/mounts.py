"""Whether a folder is on a disk that several machines can write to."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

# Their clients cache pages: two that write different bytes of one page undo each other's work.
_SHARED = {
    *("nfs", "nfs4", "lustre", "beegfs", "cifs", "smb3", "smbfs", "gpfs", "ceph", "9p", "afs"),
    *("glusterfs", "pvfs2", "ocfs2", "gfs2", "panfs", "wekafs", "virtiofs"),
}
MOUNTS = Path("/proc/mounts")


def shared_disk(folder: Path, mounts: Path = MOUNTS) -> str | None:
    """The type of the network or shared file system that a folder is on; None for a local disk.

    Where the system does not say, the disk counts as local.

    Args:
        folder: It need not exist.
        mounts: Lines of device, mount point, type, and more.
    """
    place, best = folder.resolve(), (Path(), "")
    with contextlib.suppress(OSError):
        for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            fields = line.split(" ")
            if len(fields) < 3:
                continue
            point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[1]))
            # Of two mounts at one point the later one is seen.
            if place.is_relative_to(point) and len(point.parts) >= len(best[0].parts):
                best = point, fields[2]
    kind = best[1]
    return kind if kind in _SHARED or kind.startswith("fuse.") else None

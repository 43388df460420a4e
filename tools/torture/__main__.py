#!/usr/bin/env python3
"""Files under attack: `make torture`, or  python -m tools.torture [--events 1000] [--seed 0] [--out FOLDER]

Each event saves, reads or tunes in processes of its own while something goes wrong, and then looks at what is left:

    kill         a process that saves without end is killed (SIGKILL) at a random moment
    call         ... or at each system call in turn that writes (`faults.c`)
    error        ... or such a call fails, with EIO, ENOSPC, EROFS, EACCES or EMFILE
    read error   a system call of a process that reads fails with EIO, each one in turn
    writers      two or six processes save into one folder, a reader beside them
    full         a real file system of 4 MB is full
    read-only    a real file system is read-only
    damage       a byte of a file is changed, or the file is cut off there: at every thousandth place
    header       a header with a hostile value
    tune         `ctkernels tune` is killed or ended by SIGTERM, finds its folder in use or its disk full; and resumed

What may happen: the old file or the new one, whole; an error of one sentence that names the file. What may not: `lost`
(neither is there, or an older one than what had been saved), `unreadable`, `traceback` (any other exception),
`leftover` (a temporary file that stays when the next process has written).
"""

from __future__ import annotations

import sys

from tools.torture.preload import loaded_first

if __name__ == "__main__":
    loaded = loaded_first()  # before anything large is imported
    from tools.torture.campaign import main

    sys.exit(main(loaded))

"""The scripts beside checkpoints with which users make whole weights of them, without a program."""

from __future__ import annotations

import os
import stat

from ds_core.checkpoint.remote import RemotePath, as_place

_NAMES = ("zero_to_fp32", "zero_to_torch")
_TEXT = """\
#!/usr/bin/env python
\"\"\"Writes the whole weights of a checkpoint: `python {name}.py . OUTPUT`; see --help.\"\"\"

from deepspeed.utils.{name} import *
from deepspeed.utils.{name} import main

if __name__ == "__main__":
    main()
"""


def write_recovery_scripts(save_dir: str | os.PathLike[str]) -> None:
    """Put `zero_to_fp32.py` and `zero_to_torch.py` into a folder of checkpoints, executable."""
    folder = as_place(save_dir)
    for name in _NAMES:
        script, text = folder / f"{name}.py", _TEXT.format(name=name)
        if isinstance(script, RemotePath):
            script.put(text.encode())
            continue
        script.write_text(text, encoding="utf-8")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

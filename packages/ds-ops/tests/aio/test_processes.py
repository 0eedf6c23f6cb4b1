"""What happens to files when a process is restricted, forks, ends or is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# A seccomp filter under which io_uring_setup fails with EPERM, as Docker's default does.
_SECCOMP = """
import ctypes, struct
def forbid_io_uring():
    libc = ctypes.CDLL(None, use_errno=True)
    program = b"".join(struct.pack("HBBI", *line) for line in [
        (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)])
    text = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HxxxxxxP", 4, ctypes.addressof(text))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.c_char_p(filter_), 0, 0) == 0
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_restricted_process_uses_threads_and_says_why(tmp_path: Path) -> None:
    done = run(
        _SECCOMP
        + """
import os, resource, sys, torch
from ds_core.errors import OpError
from ds_ops.aio import AsyncFile, AsyncIO, engines
path = sys.argv[1]
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]))
with AsyncFile(path, "rw") as file:   # no locked memory: works with either engine
    file.write_sync(torch.arange(100_000))
child = os.fork()
if child == 0:  # as an ordinary user, whom the limit binds
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    engine = AsyncIO()
    os._exit(0 if engine.reason is None or "ulimit -l" in engine.reason else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
forbid_io_uring()
with AsyncFile(path, "rw") as file:
    found = torch.zeros(100_000, dtype=torch.int64)
    file.read_sync(found)
    assert torch.equal(found, torch.arange(100_000))
    assert file.engine.name == "threads" and "EPERM" in file.engine.reason, file.engine
assert "EPERM" in engines()["io_uring"]
try:
    AsyncIO("io_uring")
except OpError as error:
    print(error)
""",
        tmp_path / "file.bin",
    )
    assert done.returncode == 0, done.stderr
    assert 'engine "io_uring" cannot run here: Operation not permitted (EPERM)' in done.stdout
    assert "file I/O runs on threads: no io_uring here: Operation not permitted" in done.stderr


def test_process_that_ends_or_forks_with_requests_in_flight(tmp_path: Path) -> None:
    done = run(
        """
import os, sys, torch, ds_ops
from ds_core.errors import OpError
files = [ds_ops.AsyncFile(f"{sys.argv[1]}/{name}.bin", "rw", engine=name)
         for name in ("io_uring", "threads")]
data = torch.full((12_000_000,), 9, dtype=torch.uint8)
for file in files:
    file.write(data, 13)
child = os.fork()
if child == 0:
    for file in files:
        try:
            file.write(data)
        except OpError as error:
            assert "forked child" in str(error)
        else:
            os._exit(3)
    sys.exit(5)  # runs every finalizer
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 5, status
for file in files:
    file.read(torch.zeros(10), 10**9)  # fails, and nobody waits
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("lost an error") == 2
    for name in ("io_uring", "threads"):
        found = (tmp_path / f"{name}.bin").read_bytes()
        assert found == bytes(13) + b"\x09" * 12_000_000


def test_kill_during_writes_damages_nothing_else(tmp_path: Path) -> None:
    path, begin, size = tmp_path / "file.bin", 10_001, 40_000_003
    path.write_bytes(b"\xaa" * (begin + size + 50_000))
    program = """
import sys, torch, ds_ops
begin, size = int(sys.argv[2]), int(sys.argv[3])
data = torch.full((size,), 0x55, dtype=torch.uint8)
engines = [ds_ops.AsyncFile(sys.argv[1], "rw", engine=name) for name in ("io_uring", "threads")]
print("ready", flush=True)
while True:
    for file in engines:
        file.write_sync(data, begin)
"""
    command = [sys.executable, "-c", program, str(path), str(begin), str(size)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    found = path.read_bytes()
    assert len(found) == begin + size + 50_000
    assert found[:begin] == b"\xaa" * begin
    assert found[begin + size :] == b"\xaa" * 50_000
    assert set(found[begin : begin + size]) <= {0xAA, 0x55}


def test_ring_that_is_closed_behind_our_back_is_an_error(tmp_path: Path) -> None:
    done = run(
        """
import os, sys, torch
from ds_ops.aio import AsyncFile, AsyncFileError, engines
if engines()["io_uring"] is not None:
    sys.exit()
file = AsyncFile(sys.argv[1], "rw", engine="io_uring")
file.write_sync(torch.ones(1000))
for name in os.listdir("/proc/self/fd"):
    link = f"/proc/self/fd/{name}"
    if os.path.islink(link) and "io_uring" in os.readlink(link):
        os.close(int(name))
errors = 0
for _ in range(4):
    try:
        file.write_sync(torch.ones(1000))
    except AsyncFileError as error:
        assert "EBADF" in str(error)
        errors += 1
assert errors >= 3, errors
file.close()
""",
        tmp_path / "file.bin",
    )
    assert done.returncode == 0, done.stderr

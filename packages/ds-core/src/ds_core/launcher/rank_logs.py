"""Where the output of each rank goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest

if TYPE_CHECKING:
    from ds_core.launcher.plan import Show


class RankLogs(LogsSpecs):
    """One file per rank and stream in one folder: `rank<N>.stdout.log`, `rank<N>.stderr.log`.

    After restart K they are in its subfolder `restart<K>`. `stdout`, `stderr` and `error_file`
    give the paths of the latest attempt, `rank` the job's rank, each by local rank.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(log_dir=str(folder))
        self._folder = folder
        #: Attempts of agents before the present one, which counts from 0 again.
        self.earlier_attempts = 0
        #: What processes are told of the attempts that may follow; None: as the agent counts them.
        self.max_restarts: int | None = None
        self.stdout: dict[int, Path] = {}
        self.stderr: dict[int, Path] = {}
        self.error_file: dict[int, Path] = {}
        self.rank: dict[int, int] = {}

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def is_shown(self, local_rank: int, show: Show) -> bool:
        """Whether the output of a local rank appears on the terminal."""
        if show == "all":
            return True
        return local_rank == 0 and (show == "node" or self.rank.get(0) == 0)

    def begin_next_attempt(self) -> None:
        """Forget the files of an attempt that has ended; the next may have fewer processes."""
        self.earlier_attempts += 1
        for paths in (self.stdout, self.stderr, self.error_file, self.rank):
            paths.clear()

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files of one attempt; called by the agent before it starts processes."""
        for local_rank, env in envs.items():
            attempt = self.earlier_attempts + int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
            env["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
            if self.max_restarts is not None:
                env["TORCHELASTIC_MAX_RESTARTS"] = str(self.max_restarts)
            folder = self._folder / f"restart{attempt}" if attempt else self._folder
            folder.mkdir(parents=True, exist_ok=True)
            self.rank[local_rank] = int(env["RANK"])
            stem = f"rank{env['RANK']}"
            self.error_file[local_rank] = folder / f"{stem}.error.json"
            self.error_file[local_rank].unlink(missing_ok=True)
            env["TORCHELASTIC_ERROR_FILE"] = str(self.error_file[local_rank])
            for files, name in ((self.stdout, "stdout"), (self.stderr, "stderr")):
                path = folder / f"{stem}.{name}.log"
                path.write_bytes(b"")  # before anybody is told of it
                files[local_rank] = path
        return LogsDest(
            stdouts={rank: str(path) for rank, path in self.stdout.items()},
            stderrs={rank: str(path) for rank, path in self.stderr.items()},
            error_files={rank: str(path) for rank, path in self.error_file.items()},
        )

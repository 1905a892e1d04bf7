"""A real PostgreSQL server on loopback, which can be stopped, started and frozen."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path

from servers import Missing, Process, free_port

PACKAGE = "postgresql"


class PostgreSQL(Process):
    """A server with one user, `jevons`, and a new database for whoever asks.

    Args:
        folder: its own; others must be able to enter the folders above it, as the server refuses to run as root.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._programs = _programs()
        self._as = _somebody()
        self._databases = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "password").write_text("secret")
        for path in (folder, folder / "password"):
            shutil.chown(path, self._as, None)
        options = ["--auth=scram-sha-256", "--username=jevons", f"--pwfile={folder / 'password'}", "--no-sync"]
        subprocess.run(
            [self._programs / "initdb", *options, "-D", folder / "data"],
            check=True,
            capture_output=True,
            user=self._as,
            cwd=folder,
        )
        self.start()

    def start(self) -> None:
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        command = [str(self._programs / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port), *options]
        super().__init__(command, self.folder / "postgres.log", user=self._as)
        self.wait(self._answers, "PostgreSQL")

    def url(self) -> str:
        """Of a new, empty database."""
        import psycopg

        self._databases += 1
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE d{self._databases}")
        return f"postgresql://jevons:secret@127.0.0.1:{self.port}/d{self._databases}"

    def stop(self) -> None:
        """At once, as a crash ends it; `start` recovers what was committed."""
        if self.process.poll() is None:
            self.thaw()
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(30)

    def freeze(self) -> None:
        """It keeps its connections and answers nothing."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self._pids():
            os.kill(pid, signal.SIGCONT)

    @property
    def _dsn(self) -> str:
        return f"postgresql://jevons:secret@127.0.0.1:{self.port}/postgres"

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _pids(self) -> list[int]:
        own = self.process.pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return [own, *(int(pid) for pid in children)]


def _programs() -> Path:
    """Where Debian keeps them, else where `postgres` is found."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    path = found[-1] if found else shutil.which("initdb")
    if path is None:
        raise Missing(f"PostgreSQL is not installed: apt-get install -y --no-install-recommends {PACKAGE}")
    return Path(path).parent


def _somebody() -> str:
    """Who runs the server: this user, or in the place of root one without rights."""
    return "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name

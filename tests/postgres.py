"""A real PostgreSQL server of the tests' own, from the system's package: started, stopped and started again."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PASSWORD = "se/cr@t{1}"  # what URLs and Optuna's own formatting of them trip over
READY_S = 60


def find_binaries() -> Path | None:
    """The folder of `initdb` and `postgres`: Debian's newest, else what is on the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    found = str(debian[-1]) if debian else shutil.which("initdb")
    return None if found is None else Path(found).parent


def missing() -> str | None:
    """Why no server can be started here; None where one can."""
    if find_binaries() is None:
        return "PostgreSQL's server is not installed (Debian: apt install postgresql)"
    if os.geteuid() == 0 and "postgres" not in {u.pw_name for u in pwd.getpwall()}:
        return "PostgreSQL refuses to run as root, and there is no user postgres"
    return None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """On a free port of 127.0.0.1, its data in a folder of its own; `close` removes everything."""

    def __init__(self) -> None:
        binaries = find_binaries()
        assert binaries is not None
        self._binaries, self.port = binaries, free_port()
        self._user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        self._folder = Path(tempfile.mkdtemp(prefix="autoprune-postgres-"))
        password = self._folder / "password"
        password.write_text(PASSWORD)
        if self._user:
            for path in (self._folder, password):
                shutil.chown(path, **self._user)
        options = ["-U", "tester", "-A", "scram-sha-256", f"--pwfile={password}", "--no-sync", "--locale=C"]
        command = [binaries / "initdb", "-D", self._folder / "data", *options]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._user)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def url(self, password: str = "${TEST_PGPASSWORD}", driver: str = "postgresql") -> str:
        return f"{driver}://tester:{password}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = ["-p", str(self.port), "-k", str(self._folder), "-c", "listen_addresses=127.0.0.1", "-F"]
        command = [self._binaries / "postgres", "-D", self._folder / "data", *options]
        log = (self._folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **self._user)
        until = time.monotonic() + READY_S
        ready = [self._binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode != 0:
            alive = self._process.poll() is None and time.monotonic() < until
            assert alive, (self._folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Fast shutdown: open connections are cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=READY_S)
        self._process = None

    def count(self, study: str) -> int:
        """Trials of a study, asked for past Optuna."""
        import psycopg2

        sql = "SELECT count(*) FROM trials JOIN studies USING (study_id) WHERE study_name = %s"
        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, user="tester", password=PASSWORD, dbname="postgres"
        )
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT to_regclass('trials') IS NOT NULL")
                if not cursor.fetchone()[0]:
                    return 0
                cursor.execute(sql, (study,))
                return int(cursor.fetchone()[0])
        finally:
            connection.close()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)

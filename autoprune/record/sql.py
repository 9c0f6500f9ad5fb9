"""A study in a database in place of a file: the URL, errors in plain words, retries, and one writer at a time."""

from __future__ import annotations

import os
import re
import socket
import time
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.parse import quote

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from autoprune.errors import AutopruneError, InputError, RunError, did_you_mean

T = TypeVar("T")
CONNECT_S = 10
RETRY_S = 60.0
"""How long a run waits for a database that went away; a failover of a managed one takes a minute or so."""
LOOKS_LIKE = "postgresql://USER:${PGPASSWORD}@HOST/DATABASE or sqlite:////FOLDER/FILE.db"
DATABASES = ("postgresql", "mysql", "mariadb", "sqlite", "oracle", "mssql")
LOCK_CLASS = zlib.crc32(b"autoprune") >> 1  # PostgreSQL's advisory locks are pairs of signed 32-bit numbers
TAKE = sqlalchemy.text("SELECT pg_try_advisory_lock(:a, :b)")
HOLDER = sqlalchemy.text(
    "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND classid::bigint = :a AND objid::bigint = :b"
)
WATCH = sqlalchemy.text(
    "SELECT set_config('tcp_keepalives_idle', '30', false), set_config('tcp_keepalives_interval', '10', false), "
    "set_config('tcp_keepalives_count', '3', false)"
)


class Database:
    """The study called `study_name` in the database at the URL `address`.

    `${NAME}` in the URL is filled from the environment, so that no password need stand in a job file;
    `shown` is the URL without password and options, for messages; `storage` is Optuna's.

    Raises:
        InputError: the URL is none, its driver is not installed, or the database cannot be used; one line.
    """

    def __init__(self, address: str, study_name: str) -> None:
        url = _with_driver(_parsed(address))
        self.study_name = study_name
        self.shown = url.set(query={}).render_as_string(hide_password=True)
        options = [value for key, value in url.query.items() if "pass" in key]
        self._secrets = [s for s in (url.password, *options) if isinstance(s, str) and s]
        self._guard: sqlalchemy.Connection | None = None
        self.storage: RDBStorage = self._open(url)
        self._guards = _guard_engine(url)

    def hold(self) -> None:
        """Keep other processes from the study until `close`, in PostgreSQL: elsewhere nothing keeps them apart.

        Raises:
            InUseError: another process has it.
        """
        if self._guards is None or self._is_held():
            return
        keys = {"a": LOCK_CLASS, "b": zlib.crc32(self.study_name.encode()) >> 1}
        guard = self._guards.connect()
        guard.execute(WATCH)  # the lock of a machine that vanished is gone within a minute
        if not guard.scalar(TAKE, keys):
            holder = guard.scalar(HOLDER, keys) or "another process"
            guard.close()
            raise InUseError(
                f"the study {self.study_name} in {self.shown} is in use by {holder}; wait for it or choose another "
                f"--out (the lock of a machine that was lost goes within a minute)"
            )
        self._guard = guard

    def read(self, action: Callable[[], T]) -> T:
        """Do `action` before anything was computed; InputError where the database does not play along."""
        try:
            return action()
        except (SQLAlchemyError, StorageInternalError) as error:
            raise InputError(f"cannot use the storage {self.shown}: {self._reason(error)}") from None

    def write(self, action: Callable[[], T]) -> T:
        """Do `action` in the middle of a run, again and again for RETRY_S where the database went away.

        A commit whose answer was lost is repeated: the second trial of the same ask then says the same as the first.

        Raises:
            RunError: the database is lost, or the study in it.
        """
        until = time.monotonic() + RETRY_S
        kept = "everything finished before is kept, and the same command goes on"
        while True:
            try:
                self.hold()
                return action()
            except KeyError:  # Optuna's answer for a study that is not there
                raise RunError(f"the study {self.study_name} was deleted from {self.shown} while in use") from None
            except (SQLAlchemyError, StorageInternalError, InUseError) as error:
                if time.monotonic() >= until:
                    raise RunError(f"lost the storage {self.shown}: {self._reason(error)}; {kept}") from None
            time.sleep(min(1.0, RETRY_S))

    def close(self) -> None:
        """Let the study and all connections go."""
        self._release()
        self.storage.remove_session()
        self.storage.engine.dispose()

    def _is_held(self) -> bool:
        if self._guard is not None:
            try:
                self._guard.execute(sqlalchemy.text("SELECT 1"))
                return True
            except SQLAlchemyError:  # a lost connection has lost its lock
                self._release()
        return False

    def _release(self) -> None:
        if self._guard is not None:
            self._guard.close()
        self._guard = None

    def _open(self, url: sqlalchemy.URL) -> RDBStorage:
        text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # Optuna formats it
        try:
            try:
                return RDBStorage(text, _engine_options(url))
            except (IntegrityError, ProgrammingError):  # two first runs made the tables at the same moment
                return RDBStorage(text, _engine_options(url))
        except NoSuchModuleError:
            hint = did_you_mean(url.get_backend_name(), DATABASES)
            raise InputError(f"storage: {self.shown} is no database that can keep a study; {hint}") from None
        except ImportError:
            raise InputError(f"storage: {_missing(url)}") from None
        except (SQLAlchemyError, StorageInternalError, RuntimeError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"cannot open the storage {self.shown}: {self._reason(error)}") from None

    def _reason(self, error: BaseException) -> str:
        """The database's own words in one line, without the password."""
        found = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        text = " ".join(str(getattr(found, "orig", None) or found).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text[:300] or type(found).__name__


class InUseError(InputError):
    """Another process holds the study."""


def masked(storage: str) -> str:
    """A storage URL for messages: nothing of what stands before its host, and no options."""
    head, at, tail = storage.rpartition("@")
    scheme = head.partition("://")[0] + "://" if "://" in head else ""
    return (f"{scheme}***@{tail}" if at else storage).partition("?")[0]


def _parsed(address: str) -> sqlalchemy.URL:
    try:
        url = sqlalchemy.make_url(_filled(address))
    except AutopruneError:
        raise
    except (SQLAlchemyError, ValueError):
        raise InputError(f"storage: {masked(address)} is no URL of a database such as {LOOKS_LIKE}") from None
    if "@" in (url.host or ""):
        raise InputError("storage: an @ in the password must be written %40, or come from a variable: ${PGPASSWORD}")
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise InputError("storage: an SQLite database in memory keeps nothing; name a file: sqlite:////FOLDER/FILE.db")
    return url


def _filled(address: str) -> str:
    """`${NAME}` replaced from the environment; a user name, password or option is quoted as URLs want it."""

    def value(found: re.Match[str]) -> str:
        head, tail = address[: found.start()], address[found.end() :]
        if found[1] not in os.environ:
            raise InputError(f"storage: the environment variable {found[1]} is not set")
        quoted = "://" in head and ("@" in tail or "?" in head)
        return quote(os.environ[found[1]], safe="") if quoted else os.environ[found[1]]

    return re.sub(r"\$\{(\w+)\}", value, address)


def _with_driver(url: sqlalchemy.URL) -> sqlalchemy.URL:
    """What is installed for PostgreSQL: SQLAlchemy's own choice differs between its versions."""
    if url.drivername not in ("postgresql", "postgres"):
        return url
    newer = find_spec("psycopg2") is None and find_spec("psycopg") is not None
    return url.set(drivername="postgresql+psycopg" if newer else "postgresql+psycopg2")


def _engine_options(url: sqlalchemy.URL) -> dict[str, Any]:
    """Waits that end, a name for the server's list of sessions, and no connection used that has died meanwhile."""
    name, _, driver = url.drivername.partition("+")
    if name == "sqlite":
        return {"poolclass": sqlalchemy.NullPool, "connect_args": {"timeout": 30}}
    arguments: dict[str, object] = {}
    if driver in ("psycopg2", "psycopg"):
        arguments |= {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
        arguments |= {"tcp_user_timeout": 30_000, "connect_timeout": CONNECT_S}
        arguments |= {"application_name": f"autoprune process {os.getpid()} on {socket.gethostname()}"}
    elif name in ("mysql", "mariadb"):
        arguments |= {"connect_timeout": CONNECT_S}
    given = {key: value for key, value in arguments.items() if key not in url.query}
    return {"pool_pre_ping": True, "connect_args": given}


def _guard_engine(url: sqlalchemy.URL) -> sqlalchemy.Engine | None:
    """For PostgreSQL: connections that keep their locks until they are closed, and ask a dead server for nothing."""
    if url.get_backend_name() != "postgresql":
        return None
    options = {**_engine_options(url), "poolclass": sqlalchemy.NullPool, "pool_reset_on_return": None}
    return sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", **options)


def _missing(url: sqlalchemy.URL) -> str:
    name, _, driver = url.drivername.partition("+")
    if name == "postgresql":
        return f"the driver {driver} for PostgreSQL is not installed: pip install 'autoprune[postgres]'"
    return f"the Python driver of {url.drivername} is not installed; install it, or use PostgreSQL or SQLite"

"""The run folder's mirror at an fsspec URL (`sync_to`): another machine goes on from it after this one is lost."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from autoprune.errors import AutopruneError, InputError, one_line
from autoprune.files.whole import whole, whole_lines
from autoprune.record.folder import write_event
from autoprune.record.storage import JOURNAL

EVERY_S = 30.0
ANSWER_S = 30.0
"""A URL that has not taken a first small file by then is unusable."""
LAST_S = 600.0
"""How long the end of a run waits for the last mirror."""
JOB_FILE, PROBE = "job.yaml", "autoprune-probe"
APPENDED = (JOURNAL, "log.jsonl")
"""Files that grow while they are read: they are sent up to their last newline."""
DATABASE, DATABASE_ENDINGS = "database/", (".safetensors", ".json")
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"))
"""Where a put is whole or not at all and folders are not made; elsewhere a draft takes a file's place."""
S3 = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2, "mode": "standard"}}}
OPTIONS: Mapping[str, Mapping[str, Any]] = {"s3": S3, "s3a": S3, "sftp": {"timeout": 10}, "ssh": {"timeout": 10}}
"""Short timeouts and few retries: the next turn is the retry."""
SIGNATURE_LENGTH = 8


class Mirror:
    """The files of a run in `folder`, kept at `url` too: fetched before the run, sent every `every_s` while inside.

    `names` are the run's files beside its database. A turn sends what changed, in an order that leaves the mirror
    resumable wherever it breaks off: job and database, then the journal, then what is made from it. A turn that fails
    stops nothing: it is an event in log.jsonl, `news` says it, and the next turn tries again.

    Raises:
        InputError: the URL cannot be used, in one line without credentials.
    """

    def __init__(self, folder: Path, url: str, names: Collection[str], every_s: float | None = None) -> None:
        self._secrets = _secrets(url)
        self.folder, self.url = folder, _without(self._secrets, url)
        self._names, self._every_s = frozenset(names), EVERY_S if every_s is None else every_s
        self.behind = ""
        """Why the last turn failed; empty where it did not."""
        self._news: deque[str] = deque()
        self._sent: dict[str, tuple[int, ...]] = {}  # what each file looked like here when the mirror got it
        self._held = 0  # bytes of the mirror's journal, as far as we know
        self._stop, self._thread = threading.Event(), threading.Thread()
        with self._usable():
            self._store = _within(ANSWER_S, lambda: _Store(url))
        if self._store.is_folder(folder):
            raise InputError(f"sync_to {self.url} is the run folder itself; mirror it to another place")

    def job(self) -> str | None:
        """The text of the mirror's job.yaml; None where it holds none."""
        with self._usable():
            text = self._store.read(JOB_FILE)
        return None if text is None else text.decode("utf-8", errors="replace")

    def fetch(self) -> None:
        """Bring here what the mirror holds beyond the folder; the caller holds the folder's lock.

        Raises:
            InputError: neither journal continues the other, or the mirror cannot be read.
        """
        with self._usable():
            held = {name: size for name, size in self._store.sizes().items() if self._is_ours(name)}
            raw = self._store.read(JOURNAL) or b""
            here, there = self._journal(), whole_lines(raw)
            if not (here.startswith(there) or there.startswith(here)):
                raise InputError(
                    f"{self.folder} and its mirror {self.url} have gone separate ways: each holds trials that the "
                    f"other lacks; choose another --out to go on from the mirror, another sync_to to go on from the "
                    f"folder, or start anew with --fresh"
                )
            self._held = len(raw)
            for name, size in held.items():  # a level database's name says what is in it: as long is the same
                path = self.folder / name
                if path.suffix == ".safetensors" and path.exists() and path.stat().st_size == size:
                    self._sent[name] = _stamp(path)
            if len(there) >= len(here):
                self._bring(held.keys() - self._sent.keys(), there, ahead=len(there) > len(here))

    def forget(self) -> None:
        """Remove the run's files from the mirror, and nothing else."""
        with self._usable():
            for name in sorted(filter(self._is_ours, self._store.sizes()), key=lambda n: (-_rank(n), n)):
                self._store.remove(name)
        self._sent, self._held = {}, 0

    def news(self) -> str:
        """What there is to say since the last call."""
        said = []
        while self._news:
            said.append(self._news.popleft())
        return "; ".join(said)

    def __enter__(self) -> Mirror:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._turns, args=(self._stop,), name="mirror", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """One more turn, however the run ended."""
        self._stop.set()
        self._thread.join(LAST_S)
        if self._thread.is_alive():
            self.behind = f"no answer within {LAST_S:.0f} s"
        if self.behind:
            self._news.clear()
            self._say("behind", f"the mirror {self.url} is behind {self.folder}, which is whole: {self.behind}")

    def _turns(self, stop: threading.Event) -> None:
        while True:
            last = stop.is_set()
            self._try()
            if last:
                return
            stop.wait(self._every_s)

    def _try(self) -> None:
        """One turn; what a file system raises is as varied as file systems, and none of it may end a search."""
        try:
            self._turn()
        except Exception as error:
            before, self.behind = self.behind, self._reason(error)
            if self.behind != before:
                again = f"the search goes on, the mirror is tried again every {self._every_s:g} s"
                self._say("failed", f"cannot mirror to {self.url}: {self.behind}; {again}")
        else:
            if self.behind:
                self.behind = ""
                self._say("recovered", f"the mirror {self.url} works again and has caught up")

    def _turn(self) -> None:
        """Send what changed since the last turn."""
        changed = [name for name in self._files() if self._sent.get(name) != _stamp(self.folder / name)]
        if changed:
            self._check_alone()
        for name in self._files():
            path = self.folder / name
            stamp = _stamp(path)
            if self._sent.get(name) == stamp:
                continue
            if name in APPENDED:
                content = self._journal() if name == JOURNAL else whole_lines(path.read_bytes())
                self._store.put(name, content)
                self._held = len(content) if name == JOURNAL else self._held
            else:
                self._store.put(name, path)
            self._sent[name] = stamp

    def _check_alone(self) -> None:
        """Refuse to write over another run's trials; send everything again where the mirror was emptied."""
        held = self._store.size(JOURNAL)
        if held == self._held:
            return
        theirs = self._store.read(JOURNAL) or b""
        if not self._journal().startswith(whole_lines(theirs)):
            raise RuntimeError("another run writes there too, and its trials are not written over")
        if not theirs:
            self._sent.clear()
        self._held = held

    def _bring(self, names: Collection[str], journal: bytes, ahead: bool) -> None:
        """Fetch the files; those that are here stay unless the mirror is ahead. The journal comes last: it decides."""
        wanted = [n for n in names if n not in (JOB_FILE, JOURNAL) and (ahead or not (self.folder / n).exists())]
        for name in sorted(wanted):
            self._store.get(name, self.folder / name)
            self._sent[name] = _stamp(self.folder / name)
        if ahead:
            with whole(self.folder / JOURNAL) as draft:
                draft.write_bytes(journal)
            self._sent[JOURNAL] = _stamp(self.folder / JOURNAL)
            self._say("fetched", f"{self.folder} goes on from its mirror {self.url}")

    def _files(self) -> list[str]:
        """The run's files that are here, in the order of sending."""
        paths = [*self.folder.iterdir(), *self.folder.glob(f"{DATABASE}*")]
        names = [p.relative_to(self.folder).as_posix() for p in paths if p.is_file()]
        return sorted(filter(self._is_ours, names), key=lambda n: (_rank(n), n))

    def _is_ours(self, name: str) -> bool:
        return name in self._names or (name.startswith(DATABASE) and name.endswith(DATABASE_ENDINGS))

    def _journal(self) -> bytes:
        path = self.folder / JOURNAL
        return whole_lines(path.read_bytes()) if path.exists() else b""

    def _say(self, what: str, text: str) -> None:
        self._news.append(text)
        write_event(self.folder, "mirror", {"what": what, "note": text})

    def _reason(self, error: Exception) -> str:
        """Why it failed, in one line; some libraries repeat the URL, with all that is in it."""
        return _without(self._secrets, _reason(error))

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """What goes wrong before the run is the user's to put right."""
        try:
            yield
        except AutopruneError:
            raise
        except Exception as error:
            raise InputError(f"sync_to {self.url} cannot be used: {self._reason(error)}") from None


class _Store:
    """The few things that a mirror needs of a file system, at a URL that has proved to take files."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # here, because s3fs and its like take seconds to import

        protocol = url.partition("://")[0] if "://" in url else "file"
        options = OPTIONS.get(protocol, {})
        self._fs, root = url_to_fs(url, skip_instance_cache=True, **options)
        self._root, self._is_disk = root.rstrip("/"), protocol not in OBJECT_STORES
        if not (self._root or self._is_disk or protocol == "memory"):
            raise InputError(f"sync_to {url} names no bucket; give one, as in s3://bucket/run")
        if self._is_disk:
            self._fs.makedirs(self._at(DATABASE), exist_ok=True)
        self.put(PROBE, b"autoprune can write here\n")
        self.remove(PROBE)

    def is_folder(self, folder: Path) -> bool:
        """Whether this is `folder`, on this machine's disk."""
        protocol = self._fs.protocol
        return "file" in ((protocol,) if isinstance(protocol, str) else protocol) and (
            Path(self._root).resolve() == folder.resolve()
        )

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by its name, those in the database's folder included."""
        found: dict[str, int] = {}
        for folder in ("", DATABASE):
            self._fs.invalidate_cache()
            try:
                items = self._fs.ls(self._at(folder), detail=True)
            except FileNotFoundError:
                continue
            files = [item for item in items if item["type"] == "file"]
            found |= {folder + str(item["name"]).rpartition("/")[2]: int(item["size"]) for item in files}
        return found

    def size(self, name: str) -> int:
        """Bytes of the file; 0 where there is none."""
        self._fs.invalidate_cache()
        try:
            return int(self._fs.info(self._at(name))["size"])
        except FileNotFoundError:
            return 0

    def read(self, name: str) -> bytes | None:
        """The file's content; None where there is none."""
        try:
            return bytes(self._fs.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def get(self, name: str, path: Path) -> None:
        """Fetch a file, whole or not at all."""
        with whole(path) as draft:
            self._fs.get_file(self._at(name), str(draft))

    def put(self, name: str, content: bytes | Path) -> None:
        """Send a file, whole or not at all."""
        target = self._at(name)
        draft = f"{target}.part" if self._is_disk else target
        if isinstance(content, Path):
            self._fs.put_file(str(content), draft)
        else:
            self._fs.pipe_file(draft, content)
        if self._is_disk:
            self._fs.mv(draft, target)

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")


def _rank(name: str) -> int:
    """When a file is sent: what a resumed run starts from, its journal, what is made from it."""
    return 0 if name == JOB_FILE or name.startswith(DATABASE) else 1 if name == JOURNAL else 2


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file does."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _within(seconds: float, make: Callable[[], _Store]) -> _Store:
    """What `make` returns, unless it takes too long: not every file system knows a timeout."""
    done: list[_Store | Exception] = []

    def run() -> None:
        try:
            done.append(make())
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=run, name="mirror-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    found = done[0] if done else TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(found, Exception):
        raise found
    return found


def _reason(error: Exception) -> str:
    """What is wrong, with what to do where we know it; file systems word it for programmers."""
    if isinstance(error, ModuleNotFoundError) and error.name == "fsspec":
        return "it needs fsspec: pip install 'autoprune[cluster]'"
    if isinstance(error, ImportError):
        return f"{error}: pip install 'autoprune[s3]'" if "s3fs" in str(error) else one_line(error)
    if isinstance(error, TimeoutError) or "ConnectTimeout" in type(error).__name__:
        return f"nothing answers ({one_line(error)})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if "NoCredentials" in type(error).__name__:
        return "no credentials were found; set them as for any other program, as in AWS_ACCESS_KEY_ID or AWS_PROFILE"
    return one_line(error)


def _secrets(url: str) -> tuple[str, ...]:
    """What must not be shown of a URL: user with password before the host, and long values of a query (signatures)."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ()
    found = [value for pair in parts.query.split("&") if len(value := pair.partition("=")[2]) >= SIGNATURE_LENGTH]
    if parts.password:
        found += [parts.netloc.rpartition("@")[0], parts.password, unquote(parts.password)]
    return tuple(sorted(set(found), key=len, reverse=True))


def _without(secrets: Collection[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text

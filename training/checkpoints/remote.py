"""A bucket that checkpoints are copied to, by a thread beside training. Training goes on when the bucket fails.

The copying is done by Composer's object store.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from composer.utils import S3ObjectStore, parse_uri

from pipeline.storage import Storage

log = logging.getLogger(__name__)

Chosen = Callable[[Sequence[str]], set[str]]  # names of folders -> some of them
LONGEST_PAUSE_S = 60.0  # between two attempts while the bucket fails


class Remote:
    """Copies files of checkpoint folders to `<url>/<folder name>/`, one folder after another, in a thread.

    An upload that fails is tried again for as long as the process lives; when a newer checkpoint comes meanwhile, the
    older one is dropped. Keys and endpoint come from the environment, as everywhere.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        _, bucket, prefix = parse_uri(self.url)
        self._store = S3ObjectStore(bucket, prefix, client_config={"retries": {"mode": "standard", "max_attempts": 3}})
        self._files = Storage(self.url)  # Composer's object store removes nothing
        self._prefix = PurePosixPath(prefix)
        self._waiting: tuple[Path, list[str], Callable[[], None]] | None = None  # what `upload` was given last
        self._current: Path | None = None  # the folder that is being copied
        self._error: Exception | None = None
        self._change = threading.Condition()  # guards all of the above
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether everything that `upload` was given is there, or was overtaken by something newer."""
        with self._change:
            return self._waiting is None and self._current is None

    def needs(self, folder: Path) -> bool:
        """Whether files of `folder` are still to be copied."""
        with self._change:
            return folder == self._current or (self._waiting is not None and folder == self._waiting[0])

    def upload(self, folder: Path, names: list[str], then: Callable[[], None] = lambda: None) -> None:
        """Copy these files of `folder`, soon; `then` is called when they are there."""
        with self._change:
            self._waiting = (folder, names, then)
            self._change.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint upload", daemon=True)
                self._thread.start()

    def wait(self, patience_s: float) -> None:
        """Until all is copied.

        Raises:
            OSError: if it is not after `patience_s` seconds, with the last reason.
        """
        with self._change:
            if not self._change.wait_for(lambda: self._waiting is None and self._current is None, patience_s):
                raise OSError(
                    f"{self.url} did not take the last checkpoint within {patience_s:g} s: {self._error}; it is whole "
                    "on the local disk: look at the bucket and start the same command again, or copy it yourself"
                )

    def _work(self) -> None:
        """The thread: copy what waits, one folder after another, for as long as the process lives."""
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None)
                assert self._waiting is not None
                (self._current, names, then), self._waiting = self._waiting, None
            if self._copy(self._current, names):
                then()
            with self._change:
                self._current = None
                self._change.notify_all()

    def _copy(self, folder: Path, names: list[str]) -> bool:
        """Copy, with growing pauses after failures. False if something newer came meanwhile: then some are missing."""
        pause = 1.0
        for name in names:
            while True:
                try:
                    self._store.upload_object(f"{folder.name}/{name}", str(folder / name))
                    break
                except Exception as error:  # boto3 raises several families; none of them may end training
                    self._error = error
                    log.warning("%s/%s/%s is not uploaded yet: %s", self.url, folder.name, name, error)
                if self._overtaken():
                    return False
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        return True

    def drop_old(self, folders: re.Pattern[str], mark: str, keep: int, also: Chosen = lambda _: set()) -> None:
        """Remove every folder of such a name but for the `keep` newest with the file `mark`, and newer ones than those.

        `also` says which others stay, of those with a mark.

        Names sort by age. A folder without a mark that is older than one with it was overtaken, and never gets one: it
        goes whatever `keep` is, which -1 lets all others stay. Marks go first: a folder that is half removed must not
        look whole. What the bucket refuses to remove stays, with a warning: it is in nobody's way.
        """
        try:
            names = [name for name in self._files.list() if folders.fullmatch(PurePosixPath(name).parts[0])]
            whole = sorted(PurePosixPath(name).parts[0] for name in names if PurePosixPath(name).name == mark)
            kept = {*(whole if keep < 0 else whole[-max(1, keep) :]), *also(whole)}
            old = [
                name
                for name in names
                if whole and (top := PurePosixPath(name).parts[0]) <= whole[-1] and top not in kept
            ]
            marks_first = sorted(old, key=lambda name: PurePosixPath(name).name != mark)
            for name in marks_first:
                self._files.delete(name)
        except Exception as error:  # s3fs and botocore raise several families
            log.warning("%s: old checkpoints stay in the bucket: %s", self.url, error)

    def _overtaken(self) -> bool:
        """Whether a newer folder waits."""
        with self._change:
            return self._waiting is not None

    def marked(self, mark: str) -> list[str]:
        """Names of the folders that have the file `mark`.

        Raises:
            OSError: if the bucket cannot be read.
        """
        keys: list[str] = self._tried(self._store.list_objects)
        paths = [PurePosixPath(key).relative_to(self._prefix) for key in keys]
        return [path.parts[0] for path in paths if len(path.parts) == 2 and path.name == mark]

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            OSError: if it cannot be read.
        """
        data: bytes = self._tried(self._files.read, name)
        return data

    def download(self, name: str, files: list[str], target: Path) -> None:
        """Fetch files of the folder `name`; what the bucket does not have stays away.

        Raises:
            OSError: if the bucket cannot be read.
        """
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                self._tried(self._store.download_object, f"{name}/{file}", str(target / file), overwrite=True)

    def _tried(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """The result of `call`; what it raises becomes an OSError with the bucket's address, but for a missing file."""
        try:
            return call(*arguments, **options)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise OSError(f"{self.url}: {error}; look at the address, the keys and AWS_ENDPOINT_URL") from error

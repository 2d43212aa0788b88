"""Files in a bucket: addresses such as `gs://bucket/run`, over fsspec.

An object is replaced whole or not at all, and can be neither renamed nor appended to. So a file is
one object, a file that grows is an object and parts after it, a folder is loaded only once the
marker of its writing is gone (`core.folders`), and a lock is an object that only one process can
make. Google Cloud Storage and S3 show every write to every later read. gcsfs and s3fs repeat
requests that the server refuses for now (429, 5xx), each time after a longer wait.

Only `core.files` imports this module, and only where a path is an address.
"""

import concurrent.futures
import contextlib
import functools
import io
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import fsspec
import upath.extensions

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
"""The extra that installs what a scheme needs."""

LOST_LOCK_EXIT_CODE = 75
"""Exit code of a process whose lock another one has taken (EX_TEMPFAIL)."""

HEARTBEAT_S = 10.0
"""How often the owner of a lock renews it, in seconds."""

DEAD_AFTER_S = 60.0
"""After how long without a renewal a lock is taken over, in seconds."""

_WHOLE_BYTES = 32 * 2**20  # Read or written in one request; more is streamed.
_PART_BYTES = 2**20
_REMOVED_AT_ONCE = 16
_MOST_SMALL_PARTS = 32
# Packages of which an error is that of a server, a network or a login.
_OF_SERVERS = {"aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "s3fs"}
_reached: set[tuple[str, str]] = set()  # Protocols and buckets.


class Address(upath.extensions.ProxyUPath):
    """An address with the methods of `pathlib.Path`; as text it keeps its `//`."""

    def __fspath__(self) -> str:
        """Returns the address as text."""
        return str(self)

    def exists(self, **_: Any) -> bool:
        """Tells whether there is an object or a folder; raises where the server does not say."""
        return self._kind() is not None

    def is_file(self, **_: Any) -> bool:
        """Tells whether there is an object."""
        return self._kind() == "file"

    def is_dir(self, **_: Any) -> bool:
        """Tells whether there are objects below it."""
        return self._kind() == "directory"

    def write_bytes(self, data: bytes) -> int:
        """Writes an object in one request."""
        self.fs.pipe_file(self.path, data)
        return len(data)

    def write_text(self, data: str, encoding: str = "utf-8", errors: str = "strict") -> int:
        """Writes an object of text in one request."""
        return self.write_bytes(data.encode(encoding, errors))

    def unlink(self, missing_ok: bool = True) -> None:
        """Removes the object; there may be none."""
        _remove(self.fs, self.path)

    def resolve(self, strict: bool = False) -> "Address":
        """Returns the address: there are no links."""
        return self

    def _kind(self) -> str | None:
        try:
            return str(self.fs.info(self.path)["type"])
        except FileNotFoundError:
            return None


def open_address(text: str) -> Address:
    """Returns the path of an address; no request is sent.

    Raises:
        ValueError: nothing installed knows the scheme; names the extra that would.
    """
    scheme, _, rest = text.partition("://")
    # gcsfs would ask for the kind of each bucket, with another library and another right.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Lists of objects are never kept: other processes and TensorStore write there too.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    if not rest.strip("/"):
        raise ValueError(f"{text} names no bucket: it should be {scheme}://BUCKET/PATH")
    try:
        fsspec.get_filesystem_class(scheme)
        address = Address(text.rstrip("/"))
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        advice = f"pip install 'huatuo_jax[{extra}]'" if extra else str(error)
        raise ValueError(f"{text} needs a package that is not installed: {advice}") from error
    except ValueError as error:
        raise ValueError(f"{text}: no scheme {scheme}:// is known ({error})") from error
    return address


def reach(address: Address) -> None:
    """Asks for an address, which need not exist yet, unless its bucket has answered before.

    Raises:
        ValueError: no such bucket, no right to read there, or no valid login.
    """
    bucket = address.path.partition("/")[0]
    if (address.protocol, bucket) in _reached:
        return
    try:
        if not address.exists() and address.protocol in EXTRAS:
            try:
                address.fs.ls(bucket)
            except FileNotFoundError:
                raise ValueError("there is no such bucket") from None
    except Exception as error:
        raise ValueError(f"{address}: {reason(error) or error}") from error
    _reached.add((address.protocol, bucket))


def reason(error: BaseException) -> str | None:
    """Returns a line for an error of a bucket's server or of the login; None for other errors."""
    kind, text = type(error), " ".join(str(error).split())
    if isinstance(error, PermissionError) or text.startswith("Forbidden"):
        return f"no right to do this there ({text[:300]})"
    package = kind.__module__
    if package.partition(".")[0] not in _OF_SERVERS or package.startswith("google.protobuf"):
        return None
    code = str(getattr(error, "code", ""))
    if code == "401" or kind.__name__ in (
        "DefaultCredentialsError",
        "NoCredentialsError",
        "RefreshError",
    ):
        return f"no valid login: log in again, or set the credentials ({text[:300]})"
    return f"the server does not answer as it should ({kind.__name__}: {text[:300]})"


def write_chunks(fs: Any, path: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes an object from its pieces: complete, or not at all."""
    begin, rest = bytearray(), _slices(chunks)
    for part in rest:
        begin += part
        if len(begin) >= _WHOLE_BYTES:
            break
    else:
        fs.pipe_file(path, bytes(begin))
        return
    file = fs.open(path, "wb", block_size=_WHOLE_BYTES)
    try:
        file.write(begin)
        for part in rest:
            file.write(part)
            del part  # Else its chunk would stay in memory until the next one is there.
    except BaseException:
        # Closed, also by Python's own clearing up, the file would be stored as far as it goes.
        file.discard()
        if isinstance(file, fsspec.spec.AbstractBufferedFile):
            file.closed = True
        else:
            fs.rm_file(path)
        raise
    file.close()


def _slices(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Yields the chunks in pieces: a file that is written keeps copies of what it is given."""
    for chunk in chunks:
        for begin in range(0, len(chunk), _WHOLE_BYTES):
            yield memoryview(chunk)[begin : begin + _WHOLE_BYTES]
        del chunk


def objects_below(address: Address) -> dict[pathlib.PurePosixPath, dict[str, Any]]:
    """Returns what the server tells of each object below an address, by its path from there."""
    found = address.fs.find(address.path, detail=True)
    folder = f"{address.path.rstrip('/')}/"
    return {
        pathlib.PurePosixPath(path.removeprefix(folder)): found[path]
        for path in found
        if path.startswith(folder)
    }


def remove_tree(address: Address) -> None:
    """Removes all objects below an address, many at once; there may be none."""
    with concurrent.futures.ThreadPoolExecutor(_REMOVED_AT_ONCE, "remove") as pool:
        for _ in pool.map(functools.partial(_remove, address.fs), address.fs.find(address.path)):
            pass  # Raises where one could not be removed.


def _remove(fs: Any, path: str) -> None:
    """Removes an object; it may be gone: a request that is repeated finds what it did before."""
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


class _Piece(NamedTuple):
    """An object that holds a range of a file."""

    begin: int
    size: int
    path: str


def _pieces(address: Address) -> tuple[list[_Piece], list[_Piece]]:
    """Returns the objects that make up a file, in order, and those that are left over."""
    folder, _, name = address.path.rpartition("/")
    objects = address.fs.find(folder, prefix=name, detail=True)  # One request for all of them.
    parts = f"{address.path}.parts/"
    found = [
        _Piece(int(path.removeprefix(parts)), info["size"], path)
        for path, info in sorted(objects.items())
        if path.startswith(parts)
    ]
    if address.path in objects:
        found.insert(0, _Piece(0, objects[address.path]["size"], address.path))
    if not found:
        raise FileNotFoundError(f"there is no file {address}")
    used: list[_Piece] = []
    end = 0
    for piece in found:
        if piece.begin == end and (piece.size or not used):
            used.append(piece)
            end += piece.size
    return used, [piece for piece in found if piece not in used]


class Reader(io.RawIOBase):
    """Reads a file in ranges, of all objects that it is made of; wrap it in a buffer."""

    def __init__(self, address: Address) -> None:
        """Asks for the file's size.

        Raises:
            FileNotFoundError: there is no such file.
        """
        self._fs, self._pieces = address.fs, _pieces(address)[0]
        self._size, self._place = sum(piece.size for piece in self._pieces), 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a byte; asks for nothing."""
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = begin + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Reads what one object has from here on, of one request, into the buffer's beginning."""
        view = memoryview(buffer).cast("B")
        for piece in self._pieces:
            begin = self._place - piece.begin
            if 0 <= begin < piece.size and len(view):
                end = min(begin + len(view), begin + _WHOLE_BYTES, piece.size)
                data = self._fs.cat_file(piece.path, start=begin, end=end)
                view[: len(data)] = data
                self._place += len(data)
                return len(data)
        return 0


class GrowingObject:
    """A file that grows in a bucket: an object, and parts after it named by where they begin.

    Written bytes are uploaded in the background, all that have come together in one part, so a kill
    loses what came in the last moments; `sync` waits for them. Small parts are joined now and then
    by writing the first of them anew with the bytes of all, which leaves the others covered: parts
    that do not begin where the one before ends are never read. Closing joins everything.
    """

    def __init__(self, address: Address) -> None:
        """Opens the file, or makes it."""
        self._address, self._fs = address, address.fs
        if not address.exists():
            self._fs.pipe_file(address.path, b"")
        self._used, left = _pieces(address)
        for piece in left:
            _remove(self._fs, piece.path)
        self._size = sum(piece.size for piece in self._used)
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "upload")
        self._upload: concurrent.futures.Future[None] | None = None
        self._is_uploading = False

    def size(self) -> int:
        """Returns the number of bytes, with those that still wait."""
        return self._size

    def write(self, data: bytes) -> None:
        """Adds bytes that end with a line.

        Raises:
            OSError: an upload before failed.
        """
        with self._lock:
            if not self._is_uploading:
                self._raise_failed()
            self._waiting += data
            self._size += len(data)
            if not self._is_uploading:
                self._is_uploading = True
                self._upload = self._pool.submit(self._upload_waiting)

    def sync(self) -> None:
        """Waits until all bytes are in the bucket.

        Raises:
            OSError: they could not be written.
        """
        if self._upload is not None:
            concurrent.futures.wait([self._upload])
            self._raise_failed()

    flush = sync

    def ends_a_line(self) -> bool:
        """Tells whether the last byte is a line end, or there is none."""
        self.sync()
        last = self._used[-1]
        return not last.size or self._fs.tail(last.path, 1) == b"\n"

    def cut(self, end: int) -> None:
        """Removes all bytes from `end` on."""
        self.sync()
        while len(self._used) > 1 and self._used[-1].begin >= end:
            _remove(self._fs, self._used.pop().path)
        last = self._used[-1]
        if last.begin + last.size > end:
            kept = last._replace(size=end - last.begin)
            write_chunks(self._fs, last.path, self._content([kept]))
            self._used[-1] = kept
        self._size = end

    def close(self) -> None:
        """Waits for all bytes and makes one object of them."""
        try:
            self.sync()
            if len(self._used) > 1:
                write_chunks(self._fs, self._address.path, self._content(self._used))
                for piece in reversed(self._used[1:]):
                    _remove(self._fs, piece.path)
        finally:
            self._pool.shutdown()

    def _content(self, pieces: Iterable[_Piece]) -> Iterator[bytes]:
        for piece in pieces:
            for begin in range(0, piece.size, _PART_BYTES):
                yield self._fs.cat_file(
                    piece.path, start=begin, end=min(begin + _PART_BYTES, piece.size)
                )

    def _raise_failed(self) -> None:
        if self._upload is not None and (error := self._upload.exception()) is not None:
            told = reason(error) or error
            raise OSError(f"{self._address} could not be written: {told}") from error

    def _upload_waiting(self) -> None:
        while True:
            with self._lock:
                data, self._waiting = bytes(self._waiting), bytearray()
                if not data:
                    self._is_uploading = False
                    return
            try:
                self._add_part(data)
            except BaseException:
                with self._lock:
                    self._is_uploading = False
                raise

    def _add_part(self, data: bytes) -> None:
        begin = self._used[-1].begin + self._used[-1].size
        piece = _Piece(begin, len(data), f"{self._address.path}.parts/{begin:015d}")
        self._fs.pipe_file(piece.path, data)
        self._used.append(piece)
        first = len(self._used)
        while first > 1 and self._used[first - 1].size < _PART_BYTES:
            first -= 1
        small = self._used[first:]
        if len(small) >= _MOST_SMALL_PARTS:
            whole = b"".join(self._content(small))
            self._fs.pipe_file(small[0].path, whole)
            self._used[first:] = [small[0]._replace(size=len(whole))]
            for one in reversed(small[1:]):
                _remove(self._fs, one.path)


class BucketLock:
    """A lock in a bucket, renewed by a thread until it is released.

    Locks are numbered objects, `NAME.lock/NUMBER`, and the highest number counts. To take a lock is
    to make the next number, which the server allows one process only (a precondition on the
    object's generation). Its owner renews it every `HEARTBEAT_S`. Without a renewal for
    `DEAD_AFTER_S` it is taken over; after two `HEARTBEAT_S` where the last renewal is older than
    that by this machine's clock, and at once where its owner was a process of this machine that has
    ended. An owner that finds its lock taken, because it stood still for so long, ends its process.
    """

    def __init__(self, address: Address, *, waits: bool = False) -> None:
        """Takes the lock of a file or folder, after waiting for a sign of life of its owner.

        Args:
            address: of the file or folder.
            waits: wait until the owner gives it back.

        Raises:
            ValueError: another process holds it, and shows that it lives.
            OSError: the bucket cannot be written.
        """
        self._fs, self._name = address.fs, str(address)
        self._folder = f"{address.path.rstrip('/')}.lock"
        self._owner = {
            "host": socket.gethostname(),
            "processes": _process_space(),
            "pid": os.getpid(),
            "token": secrets.token_hex(8),
        }
        self._number = self._take(waits)
        self._renewed = time.monotonic()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="bucket_lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back."""
        self._released.set()
        self._thread.join()
        self._fs.pipe_file(self._path(self._number), self._content(released=True))

    def _take(self, waits: bool) -> int:
        seen: dict[str, Any] | None = None
        since = time.monotonic()
        while True:
            numbers = self._numbers()
            held = self._read(numbers[-1]) if numbers else None
            if held is not None and not self._is_free(held):
                is_new = seen is None or held["token"] != seen["token"]
                if is_new:
                    told = f"{self._name} is held by {_named(held)}; waiting for a sign of life"
                    print(told, file=sys.stderr, flush=True)
                if is_new or (waits and held != seen):
                    seen, since = held, time.monotonic()
                elif held != seen:
                    raise ValueError(f"{self._name} is in use by another run: {_named(held)}")
                if time.monotonic() - since <= _patience_s(held):
                    time.sleep(HEARTBEAT_S / 10)
                    continue
            number = numbers[-1] + 1 if numbers else 1
            if self._make(number):
                for before in numbers:
                    _remove(self._fs, self._path(before))
                return number

    def _is_free(self, held: dict[str, Any]) -> bool:
        if held["released"]:
            return True
        ours = all(held[name] == self._owner[name] for name in ("host", "processes"))
        return ours and not os.path.exists(f"/proc/{held['pid']}")

    def _make(self, number: int) -> bool:
        path = self._path(number)
        try:
            self._fs.pipe_file(path, self._content(), mode="create")
        except FileExistsError:
            # Also where our own request was repeated because its answer was lost.
            if (self._read(number) or {}).get("token") != self._owner["token"]:
                return False
        if self._numbers()[-1:] != [number]:  # Made after others had passed this number.
            _remove(self._fs, path)
            return False
        return True

    def _keep(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            try:
                if self._numbers()[-1:] == [self._number]:
                    self._fs.pipe_file(self._path(self._number), self._content())
                    self._renewed = time.monotonic()
                    continue
                why = "another run has taken it over"
            except Exception as error:
                if time.monotonic() - self._renewed < DEAD_AFTER_S:
                    continue
                why = reason(error) or str(error)
            print(f"error: the lock of {self._name} is lost: {why}", file=sys.stderr, flush=True)
            os._exit(LOST_LOCK_EXIT_CODE)

    def _numbers(self) -> list[int]:
        return sorted(int(path.rpartition("/")[2]) for path in self._fs.find(self._folder))

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:08d}"

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self._fs.cat_file(self._path(number))))
        except FileNotFoundError:
            return None

    def _content(self, *, released: bool = False) -> bytes:
        return json.dumps({**self._owner, "time_s": time.time(), "released": released}).encode()


def _process_space() -> str:
    """Names the set of processes among which a process id means this process."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # Not Linux.
        return secrets.token_hex(8)


def _patience_s(held: dict[str, Any]) -> float:
    """The wait for a renewal, in seconds; shorter where this clock says that the last is old."""
    is_old = time.time() - held["time_s"] > DEAD_AFTER_S
    return 2 * HEARTBEAT_S if is_old else DEAD_AFTER_S


def _named(held: dict[str, Any]) -> str:
    renewed = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(held["time_s"]))
    return f"process {held['pid']} on {held['host']}, last seen {renewed}"

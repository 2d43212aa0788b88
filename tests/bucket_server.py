"""A small part of Google Cloud Storage's JSON API on loopback: objects with their generations.

`python -m tests.bucket_server COMMAND...` runs a command that finds the bucket `gs://bucket` there.
"""

import base64
import datetime
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import types
import typing
import urllib.parse

import google_crc32c

from huatuo_jax.core.files import as_path
from tests.local_server import Handler, LocalServer


class Stored(typing.NamedTuple):
    """An object; its hashes are taken once, as each list of objects holds them."""

    data: bytes
    generation: int
    md5: str
    crc32c: str


class Buckets:
    """The buckets of a server: names of objects and their content.

    `failing` is the share of requests that are answered with 503, of half of them after they were
    carried out. At most three follow each other.
    """

    def __init__(self, *names, failing=0.0, seed=0):
        self.lock = threading.RLock()
        self._names, self._seed = names, seed
        self._generations, self._uploads_begun = itertools.count(1), itertools.count(1)
        self.reset(failing=failing)

    def reset(self, *, failing=0.0):
        """Empties all buckets; without faults from now on, unless `failing`."""
        with self.lock:
            self.objects = {name: {} for name in self._names}
            self.failing, self.failures = failing, 0
            self.refuses = None  # Method and path of a request -> a status, or None.
            self.requests = []
            self._random, self._in_a_row = random.Random(self._seed), 0
            self._uploads = {}

    def files(self, bucket):
        """Name -> bytes."""
        with self.lock:
            return {name: found.data for name, found in sorted(self.objects[bucket].items())}

    def fault(self):
        """None, or whether the failing request is carried out."""
        with self.lock:
            if self._in_a_row < 3 and self._random.random() < self.failing:
                self._in_a_row += 1
                self.failures += 1
                return self._random.random() < 0.5
            self._in_a_row = 0
            return None

    def answer(self, method, url, headers, body):
        """Status, headers and body of the answer to a request."""
        with self.lock:
            path, _, query = url.partition("?")
            query = dict(urllib.parse.parse_qsl(query))
            self.requests.append((method, path, query))
            if self.refuses is not None and (status := self.refuses(method, path)):
                return _error(status, "refused by the test")
            if path.startswith("/batch/"):
                return self._batch(headers, body)
            form = r"(?:/(upload|download))?/storage/v1/b/([^/]+)(/o)?(?:/(.+))?"
            match = re.fullmatch(form, path)
            if match is None:
                return _error(404, f"no such path {path}")
            kind, bucket, _, name = match.groups()
            if bucket not in self.objects:
                return _error(404, "The specified bucket does not exist.")
            objects = self.objects[bucket]
            if kind == "upload":
                return self._upload(method, bucket, query, headers, body)
            if name is None:
                if match[3] is None:
                    return _json({"kind": "storage#bucket", "name": bucket, "location": "US"})
                return self._listed(bucket, query)
            name = urllib.parse.unquote(name)
            found = objects.get(name)
            wrong = self._precondition(found, query)
            if wrong is not None:
                return wrong
            if found is None:
                return _error(404, f"No such object: {bucket}/{name}")
            if method == "DELETE":
                del objects[name]
                return 204, {}, b""
            if kind == "download" or query.get("alt") == "media":
                return _ranged(found.data, found.generation, headers.get("Range"))
            return _json(_resource(bucket, name, found))

    def _precondition(self, found, query):
        generation = 0 if found is None else found.generation
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return _error(412, "conditionNotMet")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            return 304, {}, b""
        return None

    def _listed(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name, found in sorted(self.objects[bucket].items()):
            if not name.startswith(prefix):
                continue
            if name < query.get("startOffset", "") or name >= query.get("endOffset", "\U0010ffff"):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(_resource(bucket, name, found))
        # A page holds few, so that every reader has to ask for the next one.
        begin, most = int(query.get("pageToken", "0")), min(int(query.get("maxResults", "50")), 50)
        answer = {"kind": "storage#objects", "items": items[begin : begin + most]}
        answer["prefixes"] = sorted(prefixes) if begin == 0 else []
        if len(items) > begin + most:
            answer["nextPageToken"] = str(begin + most)
        return _json(answer)

    def _upload(self, method, bucket, query, headers, body):
        if query["uploadType"] == "media":
            return self._store(bucket, query["name"], body, query)
        if query["uploadType"] == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", headers["Content-Type"])[1].encode()
            _, meta, content, _ = body.split(b"--" + boundary, 3)
            name = json.loads(_payload(meta))["name"]
            return self._store(bucket, name, _payload(content), query)
        if "upload_id" not in query:
            key = f"{next(self._uploads_begun)}"
            name = query.get("name") or json.loads(body)["name"]
            self._uploads[key] = (name, bytearray(), query)
            url = f"http://{headers['Host']}/upload/storage/v1/b/{bucket}/o"
            return 200, {"Location": f"{url}?uploadType=resumable&upload_id={key}"}, b""
        if method == "DELETE":
            self._uploads.pop(query["upload_id"], None)
            return 499, {}, b""
        name, data, conditions = self._uploads[query["upload_id"]]
        begin, _, total = re.fullmatch(
            r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers["Content-Range"]
        ).groups()
        if begin is not None:
            data[int(begin) :] = body
        if total != "*" and len(data) == int(total):
            return self._store(bucket, name, bytes(data), conditions)
        held = {"Range": f"bytes=0-{len(data) - 1}"} if data else {}
        return 308, held, b""

    def _store(self, bucket, name, data, query):
        wrong = self._precondition(self.objects[bucket].get(name), query)
        if wrong is not None:
            return wrong
        hashes = hashlib.md5(data), google_crc32c.Checksum(data)
        texts = (base64.b64encode(one.digest()).decode() for one in hashes)
        self.objects[bucket][name] = found = Stored(bytes(data), next(self._generations), *texts)
        return _json(_resource(bucket, name, found))

    def _batch(self, headers, body):
        boundary = re.search(r"boundary=['\"]?([^'\";]+)", headers["Content-Type"])[1]
        parts = []
        for part in body.decode().split(f"--{boundary}")[1:-1]:
            method, url = re.search(r"^(DELETE) (\S+)", part, re.M).groups()
            url = urllib.parse.urlparse(url)
            status, _, _ = self.answer(method, f"{url.path}?{url.query}", {}, b"")
            parts.append(
                f"--answer\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} X\r\n\r\n\r\n"
            )
        text = "".join(parts) + "--answer--\r\n"
        return 200, {"Content-Type": "multipart/mixed; boundary=answer"}, text.encode()


def _payload(part):
    """The content of a part of a multipart body, whose lines end in CRLF or, of gcsfs, in LF."""
    end = b"\r\n" if part.startswith(b"\r\n") else b"\n"
    return part.partition(2 * end)[2].removesuffix(end)


def _resource(bucket, name, found):
    moment = datetime.datetime.fromtimestamp(1.7e9 + found.generation, datetime.UTC)
    time = f"{moment:%FT%T.%fZ}"
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{found.generation}",
        "bucket": bucket,
        "name": name,
        "size": str(len(found.data)),
        "generation": str(found.generation),
        "metageneration": "1",
        "md5Hash": found.md5,
        "crc32c": found.crc32c,
        "updated": time,
        "timeCreated": time,
        "mediaLink": "none",
    }


def _ranged(data, generation, wanted):
    headers = {
        "X-Goog-Generation": str(generation),
        "X-Goog-Stored-Content-Length": str(len(data)),
        "Content-Type": "application/octet-stream",
    }
    if wanted is None:
        return 200, headers, data
    begin, end = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted).groups()
    begin, end = (int(begin), end) if begin else (max(0, len(data) - int(end)), "")
    end = min(int(end) + 1, len(data)) if end else len(data)
    if begin >= len(data):
        return _error(416, "Requested range not satisfiable")
    headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
    return 206, headers, data[begin:end]


def _json(value):
    return 200, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(value).encode()


def _error(status, message):
    text = json.dumps({"error": {"code": status, "message": message}})
    return status, {"Content-Type": "application/json; charset=UTF-8"}, text.encode()


def serving(buckets):
    """A server of the buckets, as a context; its `address` is the endpoint."""

    class Answers(Handler):
        def do_GET(self):
            body = self._body()
            fault = buckets.fault()
            if fault is None or fault:
                status, headers, answer = buckets.answer(
                    self.command, self.path, self.headers, body
                )
            if fault is not None:
                status, headers, answer = _error(503, "try again")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            if self.command != "HEAD" and status not in (204, 304):
                self.wfile.write(answer)

        do_POST = do_PUT = do_DELETE = do_GET

        def _body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    return LocalServer(Answers)


def environment(address):
    """What tells the libraries of a process to ask this server, with no login."""
    place = address.rstrip("/")
    return {
        "STORAGE_EMULATOR_HOST": place,
        "TENSORSTORE_GCS_HTTP_URL": place,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "of the tests",
        "FSSPEC_GS": '{"token": "anon"}',
    }


async def _not_at_all(_):
    pass


def repeat_at_once(patch=setattr):
    """From now on this process waits a moment at most before it repeats a request."""
    as_path("gs://bucket")  # Which tells gcsfs what it has to know when it is imported.
    import gcsfs.retry
    from orbax.checkpoint._src.serialization import tensorstore_utils

    patch(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=_not_at_all))
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        soon = {"gcs_request_retries": {"initial_delay": "1ms", "max_delay": "10ms"}}
        patch(tensorstore_utils, name, getattr(tensorstore_utils, name) | soon)


if __name__ == "__main__":
    with serving(Buckets("bucket")) as server:
        asking = os.environ | environment(server.address)
        sys.exit(subprocess.run(sys.argv[1:], env=asking, check=False).returncode)

"""A stub of the Hugging Face Hub on the loopback: what huggingface_hub asks of it, in memory."""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import sys
import threading
import urllib.parse

import yaml

from tests import local_server

READ_TOKEN = "hf_" + "ReadOnlyTokenOfATest" * 2
WRITE_TOKEN = "hf_" + "SecretTokenOfThisTest" * 2
CHUNK_BYTES = 8192
WHOAMI = {
    "type": "user",
    "name": "doctor",
    "orgs": [{"name": "clinic", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}],
    "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}},
}
REGULAR = ("json", "md", "jinja", "py", "yaml", "gitattributes")


@dataclasses.dataclass
class Repo:
    private: bool
    branches: dict = dataclasses.field(default_factory=lambda: {"main": {".gitattributes": b"*"}})
    commits: dict = dataclasses.field(default_factory=dict)
    large: dict = dataclasses.field(default_factory=dict)
    requests: list = dataclasses.field(default_factory=list)

    def sha(self, revision):
        files = self.branches[revision]
        content = "".join(
            f"{name}{hashlib.sha1(files[name]).hexdigest()}" for name in sorted(files)
        )
        return hashlib.sha1(content.encode()).hexdigest()


def blob_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path):
    return path.rpartition(".")[2] not in REGULAR


class Refused(Exception):
    def __init__(self, status, message="", *, code=None, headers=(), body=None):
        self.status, self.body = status, {"error": message} if body is None else body
        self.headers = dict(headers) | ({"X-Error-Code": code} if code else {})
        if message:
            self.headers["X-Error-Message"] = message


class Hub:
    """The stub, running from construction to `close`.

    `requests` are method and path of all requests, `uploads` the hashes of all large files that
    were stored, once for each time. `faults` maps a pattern of "METHOD PATH" to what is raised.
    `hold_after` is how many large files are stored before further ones are kept waiting.
    """

    def __init__(self):
        self.repos, self.requests, self.uploads, self.faults = {}, [], [], {}
        self.accounts = {WRITE_TOKEN: WHOAMI}
        read_only = {"type": "access_token", "accessToken": {"displayName": "r", "role": "read"}}
        self.accounts[READ_TOKEN] = WHOAMI | {"auth": read_only}
        self.hold_after, self.released, self.held = None, threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.parts = {}
        hub = self

        class Handler(local_server.Handler):
            def answer(self):
                hub.handle(self)

            do_GET = do_POST = do_PUT = do_HEAD = answer

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_):
                """Nothing is said of clients that were killed; assertions are kept."""
                hub.errors.append(sys.exception())

        self.errors = []
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo, *, private=True, kind="model"):
        self.repos[kind, repo] = Repo(private)
        return self.repos[kind, repo]

    def files(self, repo, *, kind="model", revision="main"):
        """All files of a branch but the one that every repository begins with."""
        found = dict(self.repos[kind, repo].branches[revision])
        del found[".gitattributes"]
        return found

    def asked(self, pattern):
        return [one for one in self.requests if re.search(pattern, one)]

    def handle(self, request):
        length = int(request.headers.get("Content-Length") or 0)
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(lambda: read_chunk(request.rfile), b""))
        else:
            body = request.rfile.read(length)
        address = urllib.parse.urlsplit(request.path)
        path = address.path
        query = dict(urllib.parse.parse_qsl(address.query))
        asked = f"{request.command} {urllib.parse.unquote(path)}"
        self.requests.append(asked)
        try:
            for pattern, fault in self.faults.items():
                if re.search(pattern, asked):
                    raise fault
            answer = self.answer(request, path, query, body)
            status, headers, content = 200, {}, answer
            if isinstance(answer, tuple):
                status, headers, content = answer
        except Refused as refused:
            status, headers, content = refused.status, refused.headers, refused.body
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        try:
            request.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                request.send_header(name, value)
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(content)
        except OSError:
            pass  # The client was killed.

    def answer(self, request, path, query, body):
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if found := re.fullmatch(r"/storage/(\w+)(?:/(\d+))?", path):
            assert not token, "the token was sent to the storage"
            return self.store(*found.groups(), body)
        if path.startswith("/complete/"):
            return self.complete(json.loads(body))
        account = self.accounts.get(token)
        if account is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return account
        if path == "/api/validate-yaml":
            return validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(account, json.loads(body))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/(\w+)", path):
            kind = "dataset" if found[1] else "model"
            return self.large_files(self.find(kind, found[2], account), found[3], json.loads(body))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "dataset" if found[1] else "model"
            return self.download(self.find(kind, found[2], account), found[3], found[4])
        if found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(.+))?", path):
            repo = self.find(found[1], found[2], account)
            return self.of_repo(repo, found[1], found[2], found[3] or "", query, body, account)
        raise Refused(404, "no such page")

    def find(self, kind, name, account):
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and not self.is_owner(account, name.split("/")[0])):
            raise Refused(404, "Repository not found", code="RepoNotFound")
        return repo

    def is_owner(self, account, owner):
        roles = {one["name"]: one["roleInOrg"] for one in account["orgs"]}
        return owner == account["name"] or roles.get(owner) == "write"

    def create(self, account, told):
        owner = told["organization"] or account["name"]
        key = told.get("type", "model"), f"{owner}/{told['name']}"
        if not self.is_owner(account, owner):
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        address = f"{self.endpoint}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"
        if key in self.repos:
            raise Refused(409, body={"error": "You already created this repo", "url": address})
        self.add(key[1], private=told.get("visibility") == "private", kind=key[0])
        return {"url": address}

    def of_repo(self, repo, kind, name, rest, query, body, account):
        action, _, argument = rest.partition("/")
        argument = urllib.parse.unquote(argument)
        if action in ("", "revision"):
            revision = argument or "main"
            if revision not in repo.branches:
                raise Refused(404, "Invalid rev id", code="RevisionNotFound")
            return {"id": name, "sha": repo.sha(revision), "private": repo.private}
        if action == "tree":
            return tree(repo.commits.get(argument) or repo.branches[argument])
        if action == "refs":
            branches = [one for one in repo.branches if not one.startswith("refs/")]
            listed = [
                {"name": one, "ref": f"refs/heads/{one}", "targetCommit": repo.sha(one)}
                for one in branches
            ]
            tag = {"name": "v1", "ref": "refs/tags/v1", "targetCommit": "0" * 40}
            return {"branches": listed, "converts": [], "tags": [tag]}
        if action == "branch":
            repo.branches[argument] = dict(repo.branches["main"])
            return {}
        if action == "discussions":
            found = [one for one in repo.requests if one["author"]["name"] == query["author"]]
            return {"count": len(found), "start": 0, "discussions": found}
        revision = argument
        if revision not in repo.branches:
            raise Refused(404, "Invalid rev id", code="RevisionNotFound")
        if action == "preupload":
            return {"files": [upload_mode(repo.branches[revision], one) for one in rows(body)]}
        if action == "commit":
            return self.commit(repo, kind, name, revision, "create_pr" in query, body, account)
        raise Refused(404, "no such page")

    def commit(self, repo, kind, name, revision, create_pr, body, account):
        head, *operations = map(json.loads, body.decode().splitlines())
        files = dict(repo.branches[revision])
        for one in operations:
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert one["key"] == "lfsFile"
                files[value["path"]] = repo.large[value["oid"]]
        answer = {}
        address = f"{self.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if create_pr:
            number = len(repo.requests) + 1
            revision = f"refs/pr/{number}"
            repo.requests.append(
                {
                    "title": head["value"]["summary"],
                    "num": number,
                    "author": {"name": account["name"]},
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": "open",
                    "repo": {"name": name, "type": kind},
                    "isPullRequest": True,
                }
            )
            answer = {"pullRequestUrl": f"{address}/discussions/{number}"}
        repo.branches[revision] = files
        sha = repo.sha(revision)
        repo.commits[sha] = files
        return {"commitUrl": f"{address}/commit/{sha}", "commitOid": sha, **answer}

    def large_files(self, repo, action, told):
        if action == "verify":
            return {} if told["oid"] in repo.large else (404, {}, {})
        answers = []
        for one in told["objects"]:
            oid, size = one["oid"], one["size"]
            answer = {"oid": oid, "size": size}
            if oid not in repo.large:
                self.parts.setdefault(oid, {})["repo"] = repo
                upload = {"href": f"{self.endpoint}/storage/{oid}"}
                if size > CHUNK_BYTES:
                    count = -(-size // CHUNK_BYTES)
                    parts = {f"{n}": f"{upload['href']}/{n}" for n in range(1, count + 1)}
                    header = {"chunk_size": str(CHUNK_BYTES), **parts}
                    upload = {"href": f"{self.endpoint}/complete/{oid}", "header": header}
                repo_path = next(key for key, value in self.repos.items() if value is repo)
                prefix = "datasets/" if repo_path[0] == "dataset" else ""
                verify = f"{self.endpoint}/{prefix}{repo_path[1]}.git/info/lfs/objects/verify"
                answer["actions"] = {"upload": upload, "verify": {"href": verify}}
            answers.append(answer)
        return {"objects": answers, "transfer": "multipart"}

    def store(self, oid, part, body):
        if not self.may_store(oid):
            self.held.set()
            self.released.wait()
            raise Refused(503, "released")
        if part is None:
            self.finish(oid, body)
            return b""
        self.parts[oid][int(part)] = body
        return 200, {"ETag": f'"{part}"'}, b""

    def may_store(self, oid):
        """Whether a file is one of those that come before the hold."""
        with self.lock:
            chosen = self.parts.setdefault("chosen", [])
            if self.hold_after is None:
                return True
            if oid not in chosen and len(chosen) < self.hold_after:
                chosen.append(oid)
            return oid in chosen

    def complete(self, told):
        parts = self.parts[told["oid"]]
        numbers = [one["partNumber"] for one in told["parts"]]
        self.finish(told["oid"], b"".join(parts[number] for number in numbers))
        return {}

    def finish(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content has another hash")
        self.parts[oid]["repo"].large[oid] = content
        self.uploads.append(oid)

    def download(self, repo, revision, name):
        files = repo.commits.get(revision) or repo.branches.get(revision)
        if files is None or name not in files:
            raise Refused(404, "Entry not found", code="EntryNotFound")
        content = files[name]
        etag = hashlib.sha256(content).hexdigest() if is_large(name) else blob_oid(content)
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": revision}, content


def read_chunk(file):
    size = int(file.readline(), 16)
    content = file.read(size)
    file.readline()
    return content


def rows(body):
    return json.loads(body)["files"]


def upload_mode(files, told):
    path = told["path"]
    mode = "lfs" if is_large(path) else "regular"
    answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
    if path in files:
        content = files[path]
        oid = hashlib.sha256(content).hexdigest() if mode == "lfs" else blob_oid(content)
        answer["oid"] = oid
    return answer


def tree(files):
    listed = []
    for path, content in files.items():
        entry = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": blob_oid(content),
        }
        if is_large(path):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        listed.append(entry)
    return listed


def validate(content):
    """As the Hub: YAML at the head, some fields of it of the right form."""
    head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if head is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
    data = yaml.safe_load(head[1])
    errors = []
    if not isinstance(data.get("license", "mit"), str):
        errors.append({"message": '"license" must be one of [apache-2.0, mit, ...]'})
    if str(data.get("base_model", "a/b")).startswith(("/", ".")):
        errors.append({"message": '"base_model" with value "/..." is not valid. Use a model id'})
    if errors:
        raise Refused(400, body={"errors": errors, "warnings": []})
    return {"errors": [], "warnings": []}

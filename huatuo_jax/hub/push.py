"""Pushes a run's policy, reward model and data to the Hugging Face Hub.

All is checked first; then each part is one upload. Run again, it resumes: large files that the Hub
has already are not sent again, and a part that is unchanged makes no commit.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import BadRequestError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from huatuo_jax.core.files import make_folder
from huatuo_jax.hub.account import Account, Token, find_token, kept_secret, reason_of
from huatuo_jax.hub.uploads import (
    CARD_FILE,
    Part,
    PushConfig,
    Upload,
    check_without_token,
    find_uploads,
    left_in_run,
)

Tell = Callable[[str], object]
_MAIN = constants.DEFAULT_REVISION


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pushed:
    """One part as it lies on the Hub.

    Attributes:
        part: of the run.
        repo: its repository, OWNER/NAME.
        url: of the repository, or of the pull request.
        commit: that holds it.
        changed: False where all of it was there already.
    """

    part: Part
    repo: str
    url: str
    commit: str
    changed: bool


def push(cfg: PushConfig, tell: Tell = print) -> tuple[Pushed, ...]:
    """Pushes parts of a run to the Hugging Face Hub; run again, it resumes.

    Before anything is uploaded, all files, the token, every repository and every card are checked.

    Args:
        cfg: parts and repositories.
        tell: called with each line for the user; no line holds the token.

    Returns:
        The parts that were pushed; none for a dry run, which makes no connection.

    Raises:
        ValueError: a run without a finished export, an invalid file, token, repository or card, or
            a Hub that is unreachable or refuses; the message is one line, without the token.
        OSError: a file of the run cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="huatuo_push_") as name:
        made = pathlib.Path(name) / "data"
        make_folder(made)
        uploads = find_uploads(cfg, made)
        if cfg.dry_run:
            for line in _told_of(cfg, uploads):
                tell(line)
            return ()
        token = find_token(cfg.token)
        check_without_token(uploads, token)
        with kept_secret(token):
            return _Hub(cfg, token, tell).push(uploads, pathlib.Path(name))


class _Hub:
    """One run's dealings with the Hub; every failed call ends in one line without the token."""

    def __init__(self, cfg: PushConfig, token: Token, tell: Tell) -> None:
        self._cfg, self._token, self._tell = cfg, token, tell
        endpoint = (cfg.endpoint or constants.ENDPOINT).rstrip("/")
        self._api = HfApi(endpoint=endpoint, token=token.value)

    def push(self, uploads: Sequence[Upload], folder: pathlib.Path) -> tuple[Pushed, ...]:
        account = self._account()
        targets = [self._checked(upload, account) for upload in uploads]
        done: list[Pushed] = []
        for upload, target in zip(uploads, targets, strict=True):
            staged = folder / upload.part / "files"
            make_folder(staged)
            upload.stage(staged)
            try:
                done.append(self._push_one(upload, target, staged))
            except ValueError as error:
                before = ", ".join(f"{one.part} to {one.repo}" for one in done) or "nothing"
                raise ValueError(
                    f"{error}; pushed before that: {before}; run the same command again to resume"
                ) from None
        return tuple(done)

    def _account(self) -> Account:
        with self._asking(f"the token of {self._token.origin} cannot be checked"):
            told = self._api.whoami()
            try:
                return Account.from_whoami(told)
            except (KeyError, TypeError, AttributeError):
                raise _Refused(f"{self._api.endpoint} does not answer as a Hub does") from None

    def _checked(self, upload: Upload, account: Account) -> "_Target":
        """Returns the target of an upload; raises for an invalid target or card."""
        repo = upload.repo if "/" in upload.repo else f"{account.name}/{upload.repo}"
        with self._asking(f"{repo!r} is no name of a repository"):
            validate_repo_id(repo)
        account.check_may_write(repo, create_pr=self._cfg.create_pr)
        self._check_card(upload)
        is_there = self._check_repo(upload, repo, owned=account.owns(repo.partition("/")[0]))
        return _Target(repo, is_there, account.name)

    def _check_card(self, upload: Upload) -> None:
        """Has the Hub validate a card, as it does with every commit of one."""
        with self._asking(f"{upload.part}: the card cannot be validated"):
            response = get_session().post(
                f"{self._api.endpoint}/api/validate-yaml",
                json={"content": upload.card, "repoType": upload.repo_type},
                headers=build_hf_headers(token=self._token.value),
            )
            said = response.json()
            try:
                hf_raise_for_status(response)
            except BadRequestError:
                errors = "; ".join(str(one.get("message")) for one in said.get("errors", ()))
                raise _Refused(f"the Hub refuses {upload.files[CARD_FILE]}: {errors}") from None
            for warning in said.get("warnings", ()):
                line = " ".join(str(warning.get("message")).split())
                self._tell(self._token.masked(f"{upload.part}: the Hub says of the card: {line}"))

    def _check_repo(self, upload: Upload, repo: str, *, owned: bool) -> bool:
        """Tells whether a repository exists; refuses one of another visibility than asked for."""
        with self._asking(f"{upload.part}: {repo} cannot be looked at"):
            try:
                is_private = self._api.repo_info(repo, repo_type=upload.repo_type).private
            except RepositoryNotFoundError:
                if not owned:
                    raise _Refused(
                        f"repo={repo!r}: there is no such {upload.repo_type} repository, and it "
                        "cannot be made in somebody else's name"
                    ) from None
                return False
        if not is_private and not self._cfg.public:
            raise ValueError(
                f"repo={repo!r} is public already; give --public if everyone may see the "
                f"{upload.part}, or choose another repository"
            )
        if is_private and self._cfg.public:
            raise ValueError(
                f"repo={repo!r} is private already, and --public does not change that; make it "
                "public in its settings on the Hub, or leave --public out"
            )
        return True

    def _push_one(self, upload: Upload, target: "_Target", staged: pathlib.Path) -> Pushed:
        kind, repo = upload.repo_type, target.repo
        if not target.is_there:
            with self._asking(f"{upload.part}: {repo} cannot be made"):
                self._api.create_repo(
                    repo, repo_type=kind, private=not self._cfg.public, exist_ok=True
                )
            visible = "public" if self._cfg.public else "private"
            self._tell(f"{upload.part}: made the {visible} {kind} repository {repo}")
        revision, create_pr = self._cfg.revision, self._cfg.create_pr
        if create_pr and (going_on := self._open_request(upload, target)) is not None:
            revision, create_pr = going_on, False
        elif revision not in (None, _MAIN):
            assert revision is not None
            self._make_branch(upload, repo, revision)
        with self._asking(f"{upload.part}: the upload to {repo} did not end"):
            before = self._api.repo_info(repo, repo_type=kind, revision=revision).sha
            commit = self._api.upload_folder(
                repo_id=repo,
                repo_type=kind,
                folder_path=staged,
                commit_message=self._cfg.message_of(upload.part),
                revision=revision,
                create_pr=create_pr,
            )
        changed = commit.oid != before
        prefix = "datasets/" if kind == "dataset" else ""
        url = commit.pr_url or f"{self._api.endpoint}/{prefix}{repo}"
        said = f"pushed {len(upload.files)} files, {_size(upload.num_bytes)}"
        if not changed:
            said = "nothing to push, all of it is there"
        at = "" if revision in (None, _MAIN) else f", at {revision}"
        self._tell(self._token.masked(f"{upload.part}: {said}: {url}{at}"))
        return Pushed(part=upload.part, repo=repo, url=url, commit=commit.oid, changed=changed)

    def _open_request(self, upload: Upload, target: "_Target") -> str | None:
        """Returns the revision of this account's open pull request of the same title."""
        title, repo, author = self._cfg.message_of(upload.part), target.repo, target.author
        with self._asking(f"{upload.part}: the pull requests of {repo} cannot be listed"):
            for one in self._api.get_repo_discussions(
                repo,
                repo_type=upload.repo_type,
                author=author,
                discussion_type="pull_request",
            ):
                mine = one.author == author and one.is_pull_request
                if mine and one.status in ("open", "draft") and one.title == title:
                    self._tell(f"{upload.part}: pull request {one.num} of {repo} is open, going on")
                    return one.git_reference
        return None

    def _make_branch(self, upload: Upload, repo: str, revision: str) -> None:
        with self._asking(f"{upload.part}: the branch {revision!r} of {repo} cannot be made"):
            if revision.startswith("refs/"):
                try:
                    self._api.repo_info(repo, repo_type=upload.repo_type, revision=revision)
                except RevisionNotFoundError:
                    raise _Refused(f"{repo} has no {revision}") from None
                return
            refs = self._api.list_repo_refs(repo, repo_type=upload.repo_type)
            if revision in {tag.name for tag in refs.tags}:
                raise _Refused(f"revision={revision!r} is a tag of {repo}, which takes no commits")
            if revision in {branch.name for branch in refs.branches}:
                return
            self._api.create_branch(
                repo, branch=revision, repo_type=upload.repo_type, exist_ok=True
            )
        self._tell(f"{upload.part}: made the branch {revision} of {repo}, from {_MAIN}")

    @contextlib.contextmanager
    def _asking(self, failed: str) -> Iterator[None]:
        """Turns whatever a call of the library raises into one line, without the token.

        Nothing of the error is passed on: its requests hold the token.
        """
        try:
            yield
        except _Refused as error:
            reason = str(error)
        except Exception as error:
            reason = f"{failed}: {reason_of(error, endpoint=self._api.endpoint)}"
        else:
            return
        raise ValueError(self._token.masked(" ".join(reason.split()))) from None


class _Target(NamedTuple):
    """The target of an upload: OWNER/NAME, its existence, and the author of pull requests."""

    repo: str
    is_there: bool
    author: str


class _Refused(ValueError):
    """An error whose message replaces the library's."""


def _told_of(cfg: PushConfig, uploads: Sequence[Upload]) -> Iterator[str]:
    """Yields the lines of a dry run."""
    visible = "public" if cfg.public else "private"
    place = "a pull request" if cfg.create_pr else cfg.revision or _MAIN
    for upload in uploads:
        owner = "" if "/" in upload.repo else " of the token's owner"
        yield (
            f"{upload.part}: to the {visible} {upload.repo_type} repository {upload.repo}{owner}, "
            f"{place}: {len(upload.files)} files, {_size(upload.num_bytes)}"
        )
        width = max(map(len, upload.files))
        for name, path in upload.files.items():
            yield f"  {name:<{width}}  {_size(path.stat().st_size):>10}"
        yield "  card:"
        yield from (f"    {line}".rstrip() for line in upload.card.rstrip("\n").split("\n"))
        yield from (f"  left out: {name}: {reason}" for name, reason in upload.left_out.items())
        yield from (f"  note: {note}" for note in upload.notes)
    for name, reason in left_in_run(cfg).items():
        yield f"left in the run: {name}: {reason}"
    yield "dry run: nothing was sent"


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def main(flags: PushConfig) -> None:
    """Pushes, and prints the address of each part."""
    # Pushing needs no accelerator.
    jax.config.update("jax_platforms", "cpu")
    push(flags)

"""What of a run is pushed to the Hugging Face Hub, and where to."""

import dataclasses
import re
from typing import Literal, get_args

from huggingface_hub.utils import validate_repo_id

Part = Literal["policy", "reward", "data"]
PARTS: tuple[Part, ...] = get_args(Part)
RepoType = Literal["model", "dataset"]

_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
_NO_BRANCH = re.compile(r"\.\.|//|/\.|[./]$|\.lock(/|$)|^refs/(?!pr/\d+$)")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig:
    """What is pushed, and where to.

    Attributes:
        run: the run's folder, whose recipe has been through its export.
        repo: the policy's repository, as NAME (of the token's owner) or OWNER/NAME.
        what: which of `policy`, `reward` and `data`; data holds prompts, which may be patients'
            words, and is pushed only where it is named here.
        reward_repo: the reward model's repository; None for `repo` with `-reward-model` behind it.
        data_repo: the dataset's repository; None for `repo` with `-data` behind it.
        public: whether everyone may see the repositories; new ones are private otherwise, and one
            that is public already is refused.
        create_pr: open a pull request in place of a commit; one of the same title that this account
            has open is continued.
        revision: branch to commit to, made from `main` where it is missing; None for `main`.
        commit_message: title of the commit or pull request; None for one that names the part.
        data_license: licence of the dataset, by the Hub's identifier of it.
        dry_run: list files, sizes, cards and what is left out, and send nothing at all.
        token: access token with the right to write; None for `HF_TOKEN`, then the stored login.
        endpoint: the Hub's address; None for `HF_ENDPOINT`, then https://huggingface.co.
    """

    run: str
    repo: str
    what: tuple[Part, ...] = ("policy", "reward")
    reward_repo: str | None = None
    data_repo: str | None = None
    public: bool = False
    create_pr: bool = False
    revision: str | None = None
    commit_message: str | None = None
    data_license: str = "unknown"
    dry_run: bool = False
    token: str | None = dataclasses.field(default=None, repr=False)
    endpoint: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be."""
        unknown = [part for part in self.what if part not in PARTS]
        if unknown or not self.what or len(set(self.what)) < len(self.what):
            raise ValueError(
                f"what={','.join(self.what)!r} must be some of {', '.join(PARTS)}, each once"
            )
        for part in self.what:
            self._check_repo(part)
        if {"policy", "reward"} <= set(self.what) and self.repo_of("reward") == self.repo:
            raise ValueError(
                f"reward_repo={self.reward_repo!r} is repo too; the two models need a repository "
                "each"
            )
        if self.revision is not None:
            if not _BRANCH.fullmatch(self.revision) or _NO_BRANCH.search(self.revision):
                raise ValueError(f"revision={self.revision!r} is no name of a branch")
            if self.create_pr:
                raise ValueError(
                    f"revision={self.revision!r} and create_pr exclude each other: a pull request "
                    "goes against main; to continue one, give revision=refs/pr/NUMBER alone"
                )
        if self.commit_message is not None and not self.commit_message.strip():
            raise ValueError("commit_message is empty; leave it out or give a title")
        if not _LICENSE.fullmatch(self.data_license):
            raise ValueError(
                f"data_license={self.data_license!r} must be the Hub's identifier of a licence, "
                "such as cc-by-4.0, apache-2.0, other or unknown"
            )
        if self.endpoint is not None and not re.match(r"https?://[^/\s]", self.endpoint):
            raise ValueError("endpoint must be an address that begins with https:// or http://")

    def repo_of(self, part: Part) -> str:
        """The name of a part's repository, as it is given or derived."""
        if part == "reward":
            return self.reward_repo or f"{self.repo}-reward-model"
        return (self.data_repo or f"{self.repo}-data") if part == "data" else self.repo

    def message_of(self, part: Part) -> str:
        """The title of a part's commit or pull request."""
        of_part = {"policy": "the policy", "reward": "the reward model", "data": "the data"}
        return self.commit_message or f"Upload {of_part[part]} of a huatuo_jax run"

    def _check_repo(self, part: Part) -> None:
        name = self.repo_of(part)
        field = {"policy": "repo", "reward": "reward_repo", "data": "data_repo"}[part]
        given = self.repo if getattr(self, field) is None else name
        try:
            if not name.strip("/"):
                raise ValueError("it is empty")
            validate_repo_id(name)
        except ValueError as error:
            derived = "" if given == name else f" (repo={given!r})"
            raise ValueError(f"{field}={name!r}{derived} is no name: {error}") from error


def repo_type(part: Part) -> RepoType:
    """The kind of repository that a part goes to."""
    return "dataset" if part == "data" else "model"

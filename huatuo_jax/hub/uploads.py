"""Selects the files of a run that are pushed to each repository, by an allow-list."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import huggingface_hub
from huggingface_hub.utils import validate_repo_id

from huatuo_jax.core.config import Text
from huatuo_jax.core.files import check_local, make_folder
from huatuo_jax.hf.config import from_hugging_face, is_score_model, read_json
from huatuo_jax.hf.generation_config import CONFIG_FILE
from huatuo_jax.hf.tokenizer import SIDE_FILES, holds_tokenizer
from huatuo_jax.hf.weight_files import open_tensor_source
from huatuo_jax.hub.account import Token, holds_credential
from huatuo_jax.hub.dataset import DATA_FILES, write_dataset
from huatuo_jax.recipe.recipe import JOURNAL_FILE, Journal

Part = Literal["policy", "reward", "data"]
PARTS: tuple[Part, ...] = get_args(Part)
RepoType = Literal["model", "dataset"]

_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
_NO_BRANCH = re.compile(r"\.\.|//|/\.|[./]$|\.lock(/|$)|^refs/(?!pr/\d+$)")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
EXPORT_FOLDER = "export"
RELEASE_FILE = "release.json"
CARD_FILE = "README.md"
_INDEX = "model.safetensors.index.json"
# Beside the files that every model has. Evaluation results are read by the Hub from that folder.
_OF_MODELS = (*SIDE_FILES, CARD_FILE, "reward_normalization.json", ".eval_results/*.yaml")
_READ_FOR_SECRETS = (".md", ".json", ".jsonl", ".yaml", ".jinja", ".py")
_MOST_READ_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig:
    """The parts of a run that are pushed, and their repositories.

    Attributes:
        run: the run's folder, whose recipe has been through its export.
        repo: the policy's repository, as NAME (of the token's owner) or OWNER/NAME.
        what: parts, of `policy`, `reward` and `data`; data holds prompts, which may be patients'
            words, and is pushed only where it is named here.
        reward_repo: the reward model's repository; None for `repo` with `-reward-model` behind it.
        data_repo: the dataset's repository; None for `repo` with `-data` behind it.
        public: make the repositories visible to everyone; new ones are private otherwise, and one
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
    endpoint: Text | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
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
        """Returns the name of a part's repository, as it is given or derived."""
        if part == "reward":
            return self.reward_repo or f"{self.repo}-reward-model"
        return (self.data_repo or f"{self.repo}-data") if part == "data" else self.repo

    def message_of(self, part: Part) -> str:
        """Returns the title of a part's commit or pull request."""
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
    """Returns the kind of repository for a part."""
    return "dataset" if part == "data" else "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """The files of one repository.

    Attributes:
        part: of the run.
        repo: the repository as it was named, with its owner or without.
        files: by the name that each has in the repository.
        left_out: files of the same folder that are not uploaded, each with the reason.
        notes: on the files, for the user.
    """

    part: Part
    repo: str
    files: Mapping[str, pathlib.Path]
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def repo_type(self) -> RepoType:
        """Returns the kind of its repository."""
        return repo_type(self.part)

    @property
    def card(self) -> str:
        """Returns the text of its README.md."""
        return self.files[CARD_FILE].read_text(encoding="utf-8")

    @property
    def num_bytes(self) -> int:
        """Returns the size of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    def stage(self, folder: pathlib.Path) -> None:
        """Links the files, and no others, into a folder."""
        for name, path in self.files.items():
            place = folder / name
            make_folder(place.parent)
            place.symlink_to(path.resolve())


def find_uploads(cfg: PushConfig, made: pathlib.Path) -> tuple[Upload, ...]:
    """Returns the upload of each part in `cfg.what`, after checking every file.

    Args:
        cfg: parts and repositories.
        made: an empty folder, into which the dataset is written.

    Raises:
        ValueError: there is no finished export, a file of it is missing or damaged, a row of data
            does not parse, a card is not one, or a file holds what looks like a key.
        OSError: a file cannot be read or written.
    """
    check_local(cfg.run, name="run", why="copy the run to a disk, the Hub takes files from there")
    run = pathlib.Path(cfg.run)
    if not run.is_dir():
        raise ValueError(f"run={cfg.run!r} is no folder")
    journal = Journal(run)
    uploads = []
    for part in cfg.what:
        if part == "data":
            upload = _data(cfg, run, journal, made)
        else:
            _check_exported(run, journal)
            upload = _model(part, cfg.repo_of(part), run)
        _check_card(upload)
        _check_no_credentials(upload)
        uploads.append(upload)
    return tuple(uploads)


def left_in_run(cfg: PushConfig) -> dict[str, str]:
    """Lists files and folders of the run that are not pushed, each with the reason."""
    reasons = {
        "checkpoints": "checkpoints with optimizer state",
        "compiled": "compiled programs",
        JOURNAL_FILE: "the run's journal",
        "config.json": "the run's settings",
        "environment.json": "the run's machine",
        "report.html": "the run's report",
    } | {name: "data, which is pushed only where --what names it" for name in DATA_FILES}
    pushed = {EXPORT_FOLDER, *(DATA_FILES if "data" in cfg.what else ())}
    found = {}
    for path in sorted(pathlib.Path(cfg.run).iterdir()):
        if path.name not in pushed:
            name = "checkpoints" if (path / "checkpoints").is_dir() else path.name
            shown = f"{path.name}/" if path.is_dir() else path.name
            found[shown] = reasons[name] if name in reasons else "no file of a release"
    return found


def check_without_token(uploads: tuple[Upload, ...], token: Token) -> None:
    """Raises ValueError where a file holds the token that uploads it."""
    for upload in uploads:
        for name, text in _texts(upload):
            if token.value in text:
                raise ValueError(
                    f"{upload.part}: {name} holds the token of {token.origin}; remove it there, "
                    "and make the token void"
                )


def _check_exported(run: pathlib.Path, journal: Journal) -> None:
    """Checks that the export is finished: its stage in the journal, and `release.json`."""
    folder = run / EXPORT_FOLDER
    again = "run the recipe again (launch/train.py), it resumes there"
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; it is made by the stage 'export' of the recipe "
            "(launch/train.py --config=configs/rlaif.py)"
        )
    # A stage that was begun again makes the export one of an earlier state; the report is made of
    # it, and not the other way round.
    open_stages = [
        name for name in journal.stages if name != "report" and not journal.is_finished(name)
    ]
    if open_stages:
        raise ValueError(f"{run}: the stage {open_stages[0]!r} is not finished; {again}")
    if not (folder / RELEASE_FILE).is_file():
        raise ValueError(f"{folder}: the export is not finished; {again}")
    read_json(folder / RELEASE_FILE)


def _model(part: Part, repo: str, run: pathlib.Path) -> Upload:
    folder = run / EXPORT_FOLDER / part
    again = "remove release.json beside it and run the recipe again, it exports anew"
    for name in (CONFIG_FILE, CARD_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: incomplete, there is no {name}; {again}")
    config = read_json(folder / CONFIG_FILE)
    from_hugging_face(config)
    if is_score_model(config) != (part == "reward"):
        head = "score" if part == "policy" else "token"
        raise ValueError(f"{folder}: not the {part}, it has a {head} head; {again}")
    if not holds_tokenizer(folder):
        raise ValueError(f"{folder}: incomplete, there is no tokenizer; {again}")
    try:
        tensors = open_tensor_source(folder).tensors.values()
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{folder}: incomplete ({error}); {again}") from error
    names = {tensor.path.name for tensor in tensors}
    if any(not name.endswith(".safetensors") for name in names):
        raise ValueError(f"{folder}: weights must be safetensors; {again}")
    if "model.safetensors" not in names:
        names.add(_INDEX)
    names |= {
        path.relative_to(folder).as_posix()
        for pattern in _OF_MODELS
        for path in folder.glob(pattern)
        if path.is_file()
    }
    there = {path.relative_to(folder).as_posix(): path for path in _files_in(folder)}
    files = {name: there[name] for name in sorted(names)}
    if part == "policy":
        files[RELEASE_FILE] = run / EXPORT_FOLDER / RELEASE_FILE
    left_out = {
        name: "no weights that the model's index names"
        if name.endswith((".safetensors", ".bin"))
        else "no file of a release"
        for name in there
        if name not in names
    }
    return Upload(part=part, repo=repo, files=files, left_out=left_out)


def _data(cfg: PushConfig, run: pathlib.Path, journal: Journal, made: pathlib.Path) -> Upload:
    stages = journal.stages
    for stage, files in (("answers", "labels.jsonl"), ("labels", "comparisons.jsonl")):
        if stage in stages and not journal.is_finished(stage) and (run / files).exists():
            raise ValueError(
                f"{run}: the stage {stage!r} is not finished, and {files} is made from it; run the "
                "recipe again (launch/train.py), it resumes there"
            )
    settings = stages["labels"]["settings"] if "labels" in stages else {}
    written = write_dataset(run, made, license_id=cfg.data_license, settings=settings)
    return Upload(
        part="data",
        repo=cfg.repo_of("data"),
        files={path.name: path for path in sorted(made.iterdir())},
        left_out={name: "the run does not have it" for name in written.missing},
        notes=written.notes,
    )


def _check_card(upload: Upload) -> None:
    """Checks that a card begins with fields in YAML; only the Hub can check their values."""
    path, fields = upload.files[CARD_FILE], None
    if upload.card.lstrip().startswith("---\n"):
        try:
            fields = huggingface_hub.RepoCard(upload.card).data.to_dict()
        except Exception as error:  # The YAML library's errors are of several kinds.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path}: what stands between its lines of --- is not valid: {reason}"
            ) from error
    if not fields:
        raise ValueError(f"{path}: must begin with fields in YAML between two lines of ---")


def _check_no_credentials(upload: Upload) -> None:
    for name, text in _texts(upload):
        for number, line in enumerate(text.split("\n"), start=1):
            if holds_credential(line):
                raise ValueError(
                    f"{upload.files[name]}:{number}: holds what looks like a key, or an address "
                    "with a password; nothing is uploaded with it"
                )


def _texts(upload: Upload) -> Iterator[tuple[str, str]]:
    """Yields the text files, but for the tokenizer's, which are large and hold no secret."""
    for name, path in upload.files.items():
        if name.endswith(_READ_FOR_SECRETS) and not name.startswith(("tokenizer", "vocab")):
            if path.stat().st_size <= _MOST_READ_BYTES or name.endswith(".jsonl"):
                yield name, path.read_text(encoding="utf-8", errors="replace")


def _files_in(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())

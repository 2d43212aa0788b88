"""Which files of a run go into which repository, and what is left out; an allow-list."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

import huggingface_hub

from huatuo_jax.checkpoint.generation_config import CONFIG_FILE
from huatuo_jax.checkpoint.hf_config import from_hugging_face, is_score_model, read_json
from huatuo_jax.checkpoint.side_files import SIDE_FILES
from huatuo_jax.checkpoint.tensor_files import open_tensor_source
from huatuo_jax.checkpoint.tokenizer import holds_tokenizer
from huatuo_jax.hub.config import Part, PushConfig, RepoType, repo_type
from huatuo_jax.hub.dataset import DATA_FILES, write_dataset
from huatuo_jax.hub.secrets import Token, holds_credential
from huatuo_jax.rlaif.journal import JOURNAL_FILE, Journal

EXPORT_FOLDER = "export"
RELEASE_FILE = "release.json"
CARD_FILE = "README.md"
_INDEX = "model.safetensors.index.json"
# Beside the files that every model has. Evaluation results are read by the Hub from that folder.
_OF_MODELS = (*SIDE_FILES, CARD_FILE, "reward_normalization.json", ".eval_results/*.yaml")
_READ_FOR_SECRETS = (".md", ".json", ".jsonl", ".yaml", ".jinja", ".py")
_MOST_READ_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """The files of one repository.

    Attributes:
        part: what it is.
        repo: the repository as it was named, with its owner or without.
        files: by the name that each has in the repository.
        left_out: files of the same folder that are not uploaded, each with the reason.
        notes: what else the user should know of the files.
    """

    part: Part
    repo: str
    files: Mapping[str, pathlib.Path]
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def repo_type(self) -> RepoType:
        """The kind of its repository."""
        return repo_type(self.part)

    @property
    def card(self) -> str:
        """The text of its README.md."""
        return self.files[CARD_FILE].read_text(encoding="utf-8")

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    def stage(self, folder: pathlib.Path) -> None:
        """Makes a folder that holds these files, as links, and no others."""
        for name, path in self.files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())


def find_uploads(cfg: PushConfig, made: pathlib.Path) -> tuple[Upload, ...]:
    """The uploads of each part that is wanted, every file looked at.

    Args:
        cfg: what is wanted.
        made: an empty folder for the files of the dataset, which are made here.

    Raises:
        ValueError: there is no finished export, a file of it is missing or damaged, a row of data
            does not parse, a card is not one, or a file holds what looks like a key.
        OSError: a file cannot be read or written.
    """
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
    """What lies in the run's folder beside what is pushed, each with the reason to leave it."""
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
    """Raises ValueError where a file holds the token that it is to be uploaded with."""
    for upload in uploads:
        for name, text in _texts(upload):
            if token.value in text:
                raise ValueError(
                    f"{upload.part}: {name} holds the token of {token.origin}; remove it there, "
                    "and make the token void"
                )


def _check_exported(run: pathlib.Path, journal: Journal) -> None:
    """An interrupted export leaves no `release.json`, and its stage unfinished in the journal."""
    folder = run / EXPORT_FOLDER
    again = "run the recipe again (launch/train.py), it goes on there"
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
                "recipe again (launch/train.py), it goes on there"
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
    """What can be told of a card without the Hub: it begins with fields in YAML."""
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
    """The texts among the files; a tokenizer's is no place for a secret, and large."""
    for name, path in upload.files.items():
        if name.endswith(_READ_FOR_SECRETS) and not name.startswith(("tokenizer", "vocab")):
            if path.stat().st_size <= _MOST_READ_BYTES or name.endswith(".jsonl"):
                yield name, path.read_text(encoding="utf-8", errors="replace")


def _files_in(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())

"""What lies beside the weights of a model and is passed on with them, and where it comes from."""

import dataclasses
import json
import pathlib
import shutil

import transformers

from huatuo_jax.checkpoint import tokenizer as tokenizers
from huatuo_jax.checkpoint.generation_config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    set_stop_token_ids,
)
from huatuo_jax.checkpoint.hf_config import read_json

# As patterns. A family with code of its own keeps it: it is carried along and never run.
_MODEL_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE, "*.py")
_TOKENIZER_FILES = (*tokenizers.TOKENIZER_FILES, tokenizers.TEMPLATE_FILES)
SIDE_FILES = (*_MODEL_FILES, *_TOKENIZER_FILES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Talk:
    """How a model is talked to and where its answers end, for the files beside its weights.

    Attributes:
        tokenizer: that takes the place of the folder's; None leaves that.
        chat_template: Jinja that takes the place of the tokenizer's own; None leaves that.
        stop_token_ids: what ends an answer, for the configs; at least one.
        vocab_size: of the model.
    """

    tokenizer: transformers.PreTrainedTokenizerBase | None
    chat_template: str | None
    stop_token_ids: tuple[int, ...]
    vocab_size: int

    def write(self, folder: pathlib.Path) -> None:
        """Writes it into a folder that holds the tokenizer.

        Raises:
            ValueError: transformers would read the changed tokenizer as another one.
            OSError: a file cannot be read or written.
        """
        if self.tokenizer is not None:
            tokenizers.save_loaded(self.tokenizer, folder)
            tokenizers.check_loads_as(self.tokenizer, folder, name=str(folder))
        if self.chat_template is not None:
            tokenizers.set_chat_template(folder, self.chat_template)
        set_stop_token_ids(
            folder,
            self.stop_token_ids,
            tokenizers.load_tokenizer(folder),
            vocab_size=self.vocab_size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideFiles:
    """The side files of a model, each from the place that it belongs to.

    Attributes:
        model_folder: where the weights came from: config, generation config and code are those of
            this folder and of no other. None for fresh weights, which have none.
        tokenizer_folder: where the tokenizer comes from, and nothing else; None for
            `model_folder`.
        ignored_fields: fields of `config.json` that are left out.
        talk: what takes the place of what they say of talking; None leaves that.
    """

    model_folder: pathlib.Path | None = None
    tokenizer_folder: pathlib.Path | None = None
    ignored_fields: tuple[str, ...] = ()
    talk: Talk | None = None

    def write(self, target: pathlib.Path) -> None:
        """Writes them into a folder, unchanged where nothing asks for a change.

        Raises:
            ValueError: a file is broken.
            OSError: a file cannot be read or written.
        """
        tokenizer_folder = self.tokenizer_folder or self.model_folder
        if self.model_folder is not None:
            copy_files(self.model_folder, target, _MODEL_FILES)
            drop_fields(target / CONFIG_FILE, self.ignored_fields)
        if tokenizer_folder is not None and tokenizer_folder == self.model_folder:
            copy_files(tokenizer_folder, target, _TOKENIZER_FILES)
        elif tokenizer_folder is not None:
            self._write_foreign_tokenizer(tokenizer_folder, target)
        if self.talk is not None:
            self.talk.write(target)

    def _write_foreign_tokenizer(self, folder: pathlib.Path, target: pathlib.Path) -> None:
        """Writes the tokenizer of another folder so that it loads as the same one here.

        What class a tokenizer has may stand in the config.json of its folder alone, which is not
        taken along.
        """
        tokenizers.save_tokenizer(folder, target)
        wanted = tokenizers.load_tokenizer(folder)
        if tokenizers.equals_files(wanted, target):
            return
        for pattern in _TOKENIZER_FILES:
            for path in target.glob(pattern):
                path.unlink()
        tokenizers.save_loaded(wanted, target)
        tokenizers.check_loads_as(wanted, target, name=str(folder))


def copy_files(folder: pathlib.Path, target: pathlib.Path, patterns: tuple[str, ...]) -> None:
    """Copies the files of these patterns that a folder has, byte for byte."""
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        place = target / path.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)


def drop_fields(path: pathlib.Path, names: tuple[str, ...]) -> None:
    """Leaves fields out of a JSON file, which stays as it is where it has none of them."""
    if not names or not path.is_file():
        return
    config = read_json(path)
    kept = {name: value for name, value in config.items() if name not in names}
    if kept != config:
        text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")

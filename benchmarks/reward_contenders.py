"""One contender of `benchmarks/reward.py`, in a process of its own.

    python benchmarks/reward_contenders.py NAME FOLDER THREADS

FOLDER holds `model/` (Hugging Face, with tokenizer), `batches.npz` (packed rows and pairs, `[steps,
B, ...]`), `pairs.json` (the same pairs as token ids, a list for each step) and `settings.json`; see
`contenders.py`.
"""

import functools
import json
import pathlib

from contenders import Contender, Result, Settings, main, train_ours, train_trl, trl_settings


def ours(folder: pathlib.Path, settings: Settings) -> Result:
    """This project's update, on packed rows, as `huatuo_jax.reward` compiles and feeds it."""
    from huatuo_jax.reward.stage import reward_loss

    return train_ours(
        folder,
        settings,
        lambda transformer, _: functools.partial(reward_loss, transformer),
        head="score",
        counted="pairs",
    )


def trl(folder: pathlib.Path, settings: Settings, *, checkpointing: bool) -> Result:
    """TRL's RewardTrainer on the same pairs, already tokenised.

    All that concerns speed is its default (but for the dtype, the pairs of a step and, where the
    contender's name says so, gradient checkpointing): it pads both answers of all pairs to the
    longest.
    """
    import datasets
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    by_step = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            folder / "model", dtype=torch.float32
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        train_dataset=datasets.Dataset.from_list([pair for step in by_step for pair in step]),
        args=RewardConfig(
            max_length=settings["max_length"],
            per_device_train_batch_size=settings["pairs_per_step"],
            gradient_checkpointing=checkpointing,
            **trl_settings(folder, settings),
        ),
    )
    return train_trl(trainer, settings, by_step[0], lambda pairs, _: len(pairs))


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "trl": functools.partial(trl, checkpointing=True),
    "trl_no_checkpointing": functools.partial(trl, checkpointing=False),
}


if __name__ == "__main__":
    main(CONTENDERS)

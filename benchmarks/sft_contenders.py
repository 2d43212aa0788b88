"""One contender of `benchmarks/sft.py`, in a process of its own.

    python benchmarks/sft_contenders.py NAME FOLDER THREADS

FOLDER holds `model/` (Hugging Face), `tokenizer/`, `batches.npz` (packed rows, `[steps, B, T]`) and
`settings.json`; see `contenders.py`.
"""

import functools
import gc
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from contenders import (
    Batch,
    Contender,
    Marks,
    Result,
    Settings,
    main,
    read_batches,
    train_ours,
    train_trl,
    trl_settings,
)

IGNORED = -100
PEAK_SIZES = (512, 1024, 2048, 3072)


def ours(folder: pathlib.Path, settings: Settings) -> Result:
    """This project's update, on packed rows, as `huatuo_jax.sft` compiles and feeds it."""
    from huatuo_jax.sft import token_loss

    return train_ours(
        folder,
        settings,
        lambda transformer, section: functools.partial(
            token_loss, transformer, chunk=section.loss_chunk
        ),
        head="lm",
        counted="num_terms",
    )


def torch_loop(folder: pathlib.Path, settings: Settings, *, packed: bool) -> Result:
    """A hand-written loop over transformers' model, with nothing in it that the step does not need.

    In bfloat16 it computes under PyTorch's autocast, with weights in float32, as ours does.

    Padded, the causal mask alone is right, as padding stands at the end, and it is the fast path of
    PyTorch's attention. The head reads the trained tokens only, as ours does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    optimizer = torch_adamw(model, settings["optimizer"])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings["dtype"] == "bfloat16")
    losses, trained = [], []
    marks = Marks(settings["num_warmup"])
    for batch in read_batches(folder):
        rows = batch if packed else padded(batch)
        ids_BT = torch.from_numpy(rows["token_ids"]).long()
        targets_BT = torch.from_numpy(labels_of(rows))[:, 1:]
        wanted_BT = targets_BT != IGNORED
        with autocast:
            hidden_BTD = model.model(
                input_ids=ids_BT,
                attention_mask=block_diagonal(rows) if packed else None,
                position_ids=torch.from_numpy(rows["positions"]).long() if packed else None,
                use_cache=False,
            ).last_hidden_state
            logits_nV = model.lm_head(hidden_BTD[:, :-1][wanted_BT])
        loss = torch.nn.functional.cross_entropy(logits_nV.float(), targets_BT[wanted_BT])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["optimizer"]["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        trained.append(len(logits_nV))
        marks.step_ended()
    return marks.report(losses, trained)


def trl(
    folder: pathlib.Path, settings: Settings, *, packed: bool, checkpointing: bool = True
) -> Result:
    """TRL's SFTTrainer on the same dialogues, already tokenised, with labels.

    All that concerns speed is its default, gradient checkpointing among it, but for the dtype and
    the rows of a step. Packed, it packs by itself (`bfd`, best-fit decreasing) and runs a step's
    rows as one row, "padding-free"; segments are told apart by their positions.
    """
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    by_batch = [examples_of(batch) for batch in read_batches(folder)]
    rows = settings["batch_size"] if packed else settings["dialogues_per_step"]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        train_dataset=datasets.Dataset.from_list([one for batch in by_batch for one in batch]),
        args=SFTConfig(
            packing=packed,
            max_length=settings["row_length"],
            per_device_train_batch_size=rows,
            gradient_checkpointing=checkpointing,
            **trl_settings(folder, settings),
        ),
    )
    first = datasets.Dataset.from_list(by_batch[0])
    if packed:
        first = pack_dataset(first, settings["row_length"])

    def count(_: list[Any], collated: Any) -> int:
        return int((collated["labels"][:, 1:] != IGNORED).sum())

    return train_trl(trainer, settings, list(first), count)


def labels_of(rows: Batch) -> np.ndarray:
    """The trained tokens' ids, `IGNORED` elsewhere."""
    return np.where(rows["trained_mask"], rows["token_ids"], IGNORED).astype(np.int64)


def examples_of(batch: Batch) -> list[dict[str, list[int]]]:
    """The dialogues of packed rows, one by one, as TRL takes them."""
    labels_BT = labels_of(batch)
    return [
        {"input_ids": ids_T[inside_T].tolist(), "labels": labels_T[inside_T].tolist()}
        for ids_T, labels_T, segments_T in zip(
            batch["token_ids"], labels_BT, batch["segment_ids"], strict=True
        )
        for inside_T in (segments_T == number for number in range(1, segments_T.max() + 1))
    ]


def padded(batch: Batch) -> Batch:
    """The same dialogues, one a row, as long as the longest."""
    examples = examples_of(batch)
    shape = (len(examples), max(len(one["input_ids"]) for one in examples))
    token_ids, trained_mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
    for row, one in enumerate(examples):
        length = len(one["input_ids"])
        token_ids[row, :length] = one["input_ids"]
        trained_mask[row, :length] = np.array(one["labels"]) != IGNORED
    return {"token_ids": token_ids, "trained_mask": trained_mask}


def block_diagonal(rows: Batch) -> Any:
    """Which key each query sees, `[B, 1, T, T]`: those of its segment, up to itself."""
    import torch

    segments_BT = torch.from_numpy(rows["segment_ids"])
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTT.tril()[:, None]


def torch_adamw(model: Any, hyper: dict[str, float]) -> Any:
    """AdamW in the faster of PyTorch's two implementations, tried on copies of a few layers.

    Of a few, so that the trial does not raise the peak of memory.
    """
    import torch

    def make(parameters: Any, **implementation: bool) -> Any:
        decayed = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim == 1]
        return torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": hyper["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=hyper["learning_rate"],
            betas=(hyper["beta1"], hyper["beta2"]),
            eps=hyper["epsilon"],
            **implementation,
        )

    def seconds(implementation: dict[str, bool]) -> float:
        copies = [
            torch.nn.Parameter(torch.zeros_like(p)) for p in model.model.layers[:4].parameters()
        ]
        for copy in copies:
            copy.grad = torch.zeros_like(copy)
        optimizer = make(copies, **implementation)
        return min(timed(optimizer.step) for _ in range(3))

    fastest = min(({"fused": True}, {"foreach": True}), key=seconds)
    gc.collect()
    print(f"AdamW: {fastest}", file=sys.stderr)
    return make(list(model.parameters()), **fastest)


def timed(call: Callable[[], Any]) -> float:
    """How many seconds a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_jax(_: pathlib.Path, settings: Settings) -> Result:
    """The most FLOPs per second of a matrix product in jax, over some sizes, sums in float32."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    return best_rate(
        lambda size: jnp.ones((size, size), settings["dtype"]),
        lambda matrix: product(matrix, matrix).block_until_ready(),
    )


def peak_torch(_: pathlib.Path, settings: Settings) -> Result:
    """The same in PyTorch."""
    import torch

    return best_rate(
        lambda size: torch.ones((size, size), dtype=getattr(torch, settings["dtype"])),
        lambda matrix: matrix @ matrix,
    )


def best_rate(make: Callable[[int], Any], multiply: Callable[[Any], Any]) -> Result:
    """FLOPs per second of the best of several products, by name."""
    rates = []
    for size in PEAK_SIZES:
        matrix = make(size)
        repeats = range(max(3, 2048**3 * 5 // size**3))
        rates += [2 * size**3 / timed(lambda matrix=matrix: multiply(matrix)) for _ in repeats]
    return {"flops": max(rates)}


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "torch_packed": functools.partial(torch_loop, packed=True),
    "torch_padded": functools.partial(torch_loop, packed=False),
    "trl_padded": functools.partial(trl, packed=False),
    "trl_packed": functools.partial(trl, packed=True),
    "trl_padded_no_checkpointing": functools.partial(trl, packed=False, checkpointing=False),
    "trl_packed_no_checkpointing": functools.partial(trl, packed=True, checkpointing=False),
}
PEAKS: dict[str, Contender] = {"peak_jax": peak_jax, "peak_torch": peak_torch}


if __name__ == "__main__":
    main(CONTENDERS | PEAKS)

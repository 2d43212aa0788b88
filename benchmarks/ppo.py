"""PPO beside TRL's PPOTrainer: seconds of an iteration and what they are spent on, in one run.

Each contender trains the same fresh Llama against the same reward model on the same prompts, with a
critic of the reward model's size, float32, AdamW, as many epochs over each rollout and one
minibatch, in a process of its own, on the same cores. TRL takes part as it comes (gradient
checkpointing) and without checkpointing. Contenders take turns; figures are medians over the
iterations of all turns, the ratio is the median of the rounds' ratios. The first iterations, in
which ours compiles, do not count.

A fresh model hardly ever ends an answer, so nearly all have the full length: TRL loses nothing by
decoding a batch until its last answer ends, and nothing by padding. With `--answer_tokens` answers
end as they do in use, at lengths that differ: at each token with the same chance.

TRL has this trainer up to release 1.12, which is named by the interpreter of its environment:

    python benchmarks/ppo.py --trl_python=DIR/bin/python --sizes=10m --steps=4 --rounds=3

Prompts are real ones where the folder of real data is (beside the checkout, or where
HUATUO_SHARED_DATA says), else the project's own samples.
"""

import json
import pathlib
import statistics
import tempfile
from typing import Any

import contenders
import contest
import jax
import jax.numpy as jnp
import ppo_contenders
import real_data
from absl import app, flags

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import Transformer, count_parameters, init_params
from huatuo_jax.core.files import write_rows
from huatuo_jax.data.chat import templates
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Prompt
from huatuo_jax.hf.export import export_model
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.ppo.prompts import PromptsConfig, open_prompts

_SIZES = flags.DEFINE_list("sizes", ["10m"], "Models: 50m, 10m, tiny.")
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 32, "Answers of an iteration.", lower_bound=2)
_PROMPT_LENGTH = flags.DEFINE_integer("prompt_length", 64, "Tokens of a prompt at most.")
_RESPONSE_LENGTH = flags.DEFINE_integer("response_length", 64, "Tokens of an answer at most.")
_ANSWER_TOKENS = flags.DEFINE_integer(
    "answer_tokens", None, "Mean length of answers, were they not cut; a fresh model's if not set."
)
_EPOCHS = flags.DEFINE_integer("epochs", 4, "Passes over each rollout.", lower_bound=1)
_TRL = flags.DEFINE_string("trl_python", None, "Interpreter that has TRL 1.12; without it, no TRL.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/ppo_cpu.json", "Where to.")

SAMPLE = contest.ROOT / "huatuo_jax" / "data" / "sample"
REAL_PROMPTS = (
    "1_sft_single_real/medicalgpt_medical_sft.jsonl",
    "2_sft_multi_real/CMtMedQA_test.json",
)
OPTIMIZER = {"learning_rate": 3e-6, "weight_decay": 0.0, **contest.ADAMW}
TEMPLATE = "chatml"
SEED = 0
LARGEST_DIFFERENCE = 5.0  # Of mean scores of the first answers, in standard errors.
COLUMNS = {
    "s/iteration": ("seconds_per_iteration", ".3f"),
    "generation": ("generation", ".3f"),
    "scoring": ("scoring", ".3f"),
    "log-probs": ("log_probs", ".3f"),
    "update": ("update", ".3f"),
    "in generation": ("generation_share", ".1%"),
    **contest.COLUMNS,
}


def main(_: list[str]) -> None:
    """Measures every size, prints tables, writes the result."""
    contest.check_names(_SIZES.value, (), ppo_contenders.CONTENDERS)
    real = (real_data.SHARED_DATA / "MANIFEST.json").is_file()
    contest.hold(
        _SIZES.value,
        pathlib.Path(_OUTPUT.value),
        "prompts of real dialogues" if real else "prompts of the project's sample dialogues",
        lambda size: measure(size, real=real),
        print_table,
        libraries=("jax", "jaxlib", "flax", "optax"),
    )


def measure(size: str, *, real: bool) -> contest.Result:
    """All contenders on models of one size."""
    tokenizer = SAMPLE / "tokenizer"
    if real:
        tokenizer = real_data.SHARED_DATA / "tokenizers" / "minimind_6400"
    cfg = contenders.backbone(
        # One id more than the tokenizer's, so that an id to pad with is free.
        size,
        vocab_size=len(load_tokenizer(tokenizer)) + 1,
        max_positions=_PROMPT_LENGTH.value + _RESPONSE_LENGTH.value,
    )
    template = TEMPLATE if real else "huatuogpt"
    (end,) = templates.by_name(template).stop_token_ids(load_tokenizer(tokenizer))
    settings = contest.settings(
        OPTIMIZER,
        template=template,
        stop_token_id=end,
        num_prompts=_NUM_PROMPTS.value,
        max_prompt_tokens=_PROMPT_LENGTH.value,
        response_length=_RESPONSE_LENGTH.value,
        answer_tokens=_ANSWER_TOKENS.value,
        num_epochs=_EPOCHS.value,
        temperature=1.0,
        kl_coef=0.05,
    )
    peers = [one for one in ppo_contenders.CONTENDERS if one != "ours"] if _TRL.value else []
    names = ["ours", *peers]
    policy, reward = (
        init_params(jax.random.key(SEED + number), cfg, ComputeConfig(), head=head)
        for number, head in enumerate(("lm", "score"))
    )
    if _ANSWER_TOKENS.value is not None:
        policy = let_answers_end(policy, cfg, end=end, mean_length=_ANSWER_TOKENS.value)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        export_model(policy, cfg, folder / "policy", head="lm", source_folder=tokenizer)
        export_model(reward, cfg, folder / "reward", head="score", source_folder=tokenizer)
        prompt_tokens = write_prompts(folder, settings, real=real)
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        turns = contest.take_turns(
            size,
            "ppo_contenders.py",
            folder,
            (),
            others=names,
            interpreters=dict.fromkeys(peers, _TRL.value),
        )
    check_scores({one: turns[one][0]["first_scores"] for one in names}, _NUM_PROMPTS.value)
    return {
        "parameters": count_parameters(policy),
        "backbone": cfg.to_dict(),
        "settings": settings,
        "prompt_tokens": prompt_tokens,
        "contenders": {one: figures(turns[one], turns["ours"]) for one in names},
    }


def let_answers_end(
    params: dict[str, Any], cfg: BackboneConfig, *, end: int, mean_length: int
) -> dict[str, Any]:
    """The fresh model with one number of every embedding the same, from which the end is likely.

    Layers of a fresh model add little to the embeddings, so that number reaches the last layer
    whatever the tokens, and a weight of the end token on it decides how often answers end.
    """
    params = {**params}
    params["embedding"] = {"table": params["embedding"]["table"].at[:, 0].set(1.0)}
    model, variables = Transformer(cfg, ComputeConfig()), {"params": params}
    ids_BT = jax.random.randint(jax.random.key(SEED), (8, 64), 0, cfg.vocab_size)
    hidden_BTD = model.apply(variables, ids_BT)
    logits_BTV = model.apply(variables, hidden_BTD, method="logits")
    others = jax.nn.logsumexp(logits_BTV[..., : cfg.vocab_size].at[..., end].set(-jnp.inf), axis=-1)
    wanted = (others.mean() - jnp.log(mean_length - 1.0)) / hidden_BTD[..., 0].mean()
    kernel_DV = params["lm_head"]["kernel"].at[:, end].set(0.0).at[0, end].set(wanted)
    return params | {"lm_head": {"kernel": kernel_DV}}


def write_prompts(folder: pathlib.Path, settings: contest.Result, *, real: bool) -> float:
    """The prompts of all iterations, as text and as tokens; the mean of their tokens.

    Raises:
        ValueError: there are too few.
    """
    if real:
        paths = [real_data.SHARED_DATA / one for one in REAL_PROMPTS]
    else:
        paths = sorted(SAMPLE.glob("*_instruction.jsonl"))
    wanted = settings["num_prompts"] * settings["num_steps"]
    file = folder / "prompts.jsonl"
    cfg = PromptsConfig(
        paths=(str(file),),
        template=settings["template"],
        max_prompt_tokens=settings["max_prompt_tokens"],
        drop_oldest_turns=False,
        max_left_out_share=1.0,  # Those that fit are what is looked for.
    )
    tokenizer = load_tokenizer(folder / "policy")
    records: dict[str, Prompt] = {}
    for path in paths:
        for dialogue in read_dialogues(str(path)):
            prompt = Prompt.of_dialogue(dialogue)
            records.setdefault(f"{path.stem}:{prompt.id}", prompt)
    named = [{**prompt.to_json(), "id": one} for one, prompt in records.items()]
    write_rows(file, named)
    fitting = open_prompts(
        cfg,
        tokenizer,
        max_new_tokens=settings["response_length"],
        stop_token_ids=cfg.chat_template.stop_token_ids(tokenizer),
    ).items
    if len(fitting) < wanted and real:
        raise ValueError(f"{wanted} prompts are wanted and {len(fitting)} fit; fewer --steps")
    # The sample's few prompts come again and again.
    taken = [fitting[number % len(fitting)] for number in range(wanted)]
    by_id = {row["id"]: row for row in named}
    write_rows(file, [{**by_id[one.id], "id": f"{n}:{one.id}"} for n, one in enumerate(taken)])
    ids = [list(one.token_ids) for one in taken]
    (folder / "prompts.json").write_text(json.dumps(ids), encoding="utf-8")
    return statistics.mean(map(len, ids))


def check_scores(first: dict[str, dict[str, float]], answers: int) -> None:
    """Raise RuntimeError unless all policies' first answers have scores alike."""
    ours = first["ours"]
    for found in first.values():
        error = (2 / answers) ** 0.5 * max(one["standard_deviation"] for one in (ours, found))
        if abs(found["mean"] - ours["mean"]) > LARGEST_DIFFERENCE * error:
            raise RuntimeError(f"not the same work: first answers score {first}")


def figures(turns: list[contest.Result], ours: list[contest.Result]) -> contest.Result:
    """A contender's medians."""
    found = contest.figures([turn | {"losses": []} for turn in turns], ours, unit="iterations")
    seconds = [second for turn in turns for second in turn["seconds"]]
    parts = {
        name: statistics.median(s for turn in turns for s in turn["parts"][name])
        for name in ppo_contenders.PARTS
    }
    shares = [
        part / whole
        for turn in turns
        for part, whole in zip(turn["parts"]["generation"], turn["seconds"], strict=True)
    ]
    tokens = [number for turn in turns for number in turn["answer_tokens"]]
    found.pop("first_losses")
    return found | {
        "seconds_per_iteration": statistics.median(seconds),
        **parts,
        "generation_share": statistics.median(shares),
        "answer_tokens_per_iteration": statistics.mean(tokens),
        "first_scores": turns[0]["first_scores"],
        "versions": turns[0]["versions"],
    }


def print_table(size: str, result: contest.Result) -> None:
    """What was trained on, then one line a contender."""
    settings = result["settings"]
    print(
        f"\n{size}: {result['parameters'] / 1e6:.1f}M parameters, {settings['num_prompts']} "
        f"answers of {settings['response_length']} tokens at most "
        f"({settings['answer_tokens'] or 'as a fresh model ends them'} if not cut) to prompts of "
        f"{result['prompt_tokens']:.0f}, {settings['num_epochs']} epochs"
    )
    contest.print_rows(COLUMNS, result["contenders"])


if __name__ == "__main__":
    app.run(main)

"""A tiny backbone, invented comparisons, and groups of token ids: what tests of rewards share."""

import dataclasses
import itertools

import numpy as np

from huatuo_jax.data.records import Comparison, Message, answer
from huatuo_jax.preferences.data import Answer, Group, Pair
from tests.tiny import backbone

BACKBONE = backbone(max_positions=128)
SMALL = dataclasses.replace(BACKBONE, vocab_size=50, hidden_size=16)

COMPLAINTS = ("头疼", "咳嗽", "胃胀", "失眠", "腰酸", "发烧", "耳鸣", "乏力")
GOOD, BAD = "建议先去医院检查，注意休息。", "没事。"


def token_group(draw, number, *, num_answers, soft=False, vocab_size=SMALL.vocab_size):
    """A group of random answers to one prompt, with all pairs of them."""
    prompt = draw.integers(3, vocab_size, draw.integers(1, 6))
    answers = []
    for _ in range(num_answers):
        ids = np.append(prompt, draw.integers(3, vocab_size, draw.integers(1, 9)))
        ids = np.append(ids, 2).astype(np.int32)
        answers.append(Answer(ids, len(ids) - 1, 1, np.arange(len(ids)) >= len(prompt)))
    pairs = tuple(
        Pair(
            chosen,
            rejected,
            float(draw.uniform()) if soft else 1.0,
            float(draw.uniform(0, 2)) if draw.uniform() < 0.7 else None,
            f"source{number % 2}",
        )
        for chosen, rejected in itertools.combinations(range(num_answers), 2)
    )
    return Group(f"group{number}", f"case{number // 2}", tuple(answers), pairs)


def token_groups(sizes, *, seed=0, **options):
    draw = np.random.default_rng(seed)
    return [token_group(draw, i, num_answers=n, **options) for i, n in enumerate(sizes)]


def comparisons(number, *, flipped=()):
    """Invented comparisons, of prompts in turn; the answer with advice is the better one."""
    made = []
    for index in range(number):
        complaint = COMPLAINTS[index % len(COMPLAINTS)]
        prompt = (Message("user", f"我{complaint}已经{index}天了，怎么办？"),)
        if index % 3 == 0:
            prompt = (*prompt, *answer("还有别的不舒服吗？"), Message("user", "没有。"))
        good, bad = answer(f"{complaint}，{GOOD}"), answer(f"{complaint}，{BAD}")
        chosen, rejected = (bad, good) if index in flipped else (good, bad)
        made.append(
            Comparison(
                id=f"c{index}",
                messages=prompt,
                chosen=chosen,
                rejected=rejected,
                source="odd" if index % 2 else "even",
                p_chosen=0.9,
                margin=1.0 + index % 4,
                extra={"case": f"case{index // 2}"},
            )
        )
    return made

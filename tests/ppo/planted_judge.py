"""A judge of the tiny world whose preference has an optimum that the reward goes past."""

from huatuo_jax.judge.judgements import NOTHING, JudgementFailed, Reply
from tests.ppo.tiny import Table, all_answers

WANTED = 3
REWARDS_BY_COUNT = (0.0, 1.0, 2.0, 3.0)
WORTH_BY_COUNT = (0, 2, 1, -1)
"""To the judge; by how often the wanted token stands in an answer."""


def goes_past_the_optimum():
    """Scores that rise with every one of the wanted tokens."""
    rewards = {one: REWARDS_BY_COUNT[one.count(WANTED)] for one in all_answers(longest=3)}
    return Table(rewards)


def count_wanted(text):
    return text.split().count(str(WANTED))


class PlantedJudge:
    """Prefers the answer of more worth; notes each question."""

    name = "planted"
    settings = {"judge": "planted"}

    def __init__(self, worth=lambda text: WORTH_BY_COUNT[count_wanted(text)]):
        self.worth, self.asked = worth, []
        self.fails = lambda prompt: False

    def template_hash(self, protocol):
        return protocol

    def estimate(self, prompt, texts):
        return NOTHING

    async def compare(self, prompt, first, second):
        self.asked.append((prompt.id, first, second))
        if self.fails(prompt):
            raise JudgementFailed("no verdict today")
        difference = self.worth(first) - self.worth(second)
        return Reply(p_first=0.5 if difference == 0 else float(difference > 0), cost=0.0)

    async def close(self):
        pass

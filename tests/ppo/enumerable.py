"""A world small enough to write down: 3 tokens, one of which ends, answers of at most 3 tokens.

Its policy is a table of logits, one row a state (the tokens so far). What is here is plain Python
and numpy, by recursion and by listing all answers; the code under test gets no part in it.
"""

import dataclasses
import itertools

import numpy as np

END, VOCABULARY, LONGEST = 0, 3, 3
NUM_SLOTS = LONGEST + 1  # One that no answer fills.

STATES = [
    prefix for length in range(LONGEST) for prefix in itertools.product((1, 2), repeat=length)
]


def _finished(prefix=()):
    for token in range(VOCABULARY):
        answer = (*prefix, token)
        if token == END or len(answer) == LONGEST:
            yield answer
        else:
            yield from _finished(answer)


ANSWERS = list(_finished())


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclasses.dataclass
class World:
    """A reference policy, a reward for each answer, and the weight of the KL penalty."""

    reference: np.ndarray  # logits, [7, 3]
    rewards: np.ndarray  # [15]
    beta: float

    def log_prob(self, logits, answer):
        table = log_softmax(logits)
        return sum(table[STATES.index(answer[:t]), answer[t]] for t in range(len(answer)))

    def probabilities(self, logits):
        return np.exp([self.log_prob(logits, answer) for answer in ANSWERS])

    def objective(self, logits):
        """The expected reward less beta times KL(policy, reference)."""
        total = 0.0
        for answer, reward in zip(ANSWERS, self.rewards, strict=True):
            log_prob = self.log_prob(logits, answer)
            penalty = log_prob - self.log_prob(self.reference, answer)
            total += np.exp(log_prob) * (reward - self.beta * penalty)
        return total

    def objective_gradient(self, logits, step=1e-5):
        """By finite differences."""
        gradient = np.zeros_like(logits)
        for place in np.ndindex(logits.shape):
            sides = []
            for sign in (1, -1):
                moved = logits.copy()
                moved[place] += sign * step
                sides.append(self.objective(moved))
            gradient[place] = (sides[0] - sides[1]) / (2 * step)
        return gradient

    def values(self, logits, beta):
        """What is to come in each state: reward less beta times the log-ratios from there on."""
        policy, reference = log_softmax(logits), log_softmax(self.reference)

        def value(prefix):
            row, total = STATES.index(prefix), 0.0
            for token in range(VOCABULARY):
                answer = (*prefix, token)
                is_over = token == END or len(answer) == LONGEST
                after = self.rewards[ANSWERS.index(answer)] if is_over else value(answer)
                penalty = policy[row, token] - reference[row, token]
                total += np.exp(policy[row, token]) * (after - beta * penalty)
            return total

        return np.array([value(prefix) for prefix in STATES])

    def best(self):
        """The logits in proportion to reference * exp(reward / beta), and beta log Z."""
        weights = self.probabilities(self.reference) * np.exp(self.rewards / self.beta)
        logits = np.zeros_like(self.reference)
        for row, prefix in enumerate(STATES):
            for token in range(VOCABULARY):
                start = (*prefix, token)
                below = [
                    weight
                    for answer, weight in zip(ANSWERS, weights, strict=True)
                    if answer[: len(start)] == start
                ]
                logits[row, token] = np.log(sum(below))
        return logits, self.beta * np.log(weights.sum())

    def best_with_k3_loss(self):
        """By backward induction: policy = beta * reference / (c - Q), c by bisection."""
        reference = np.exp(log_softmax(self.reference))
        logits, values = np.zeros_like(self.reference), {}
        for prefix in reversed(STATES):  # Longer ones first.
            ends = [(*prefix, token) for token in range(VOCABULARY)]
            ahead = np.array(
                [values[e] if e in values else self.rewards[ANSWERS.index(e)] for e in ends]
            )
            row = STATES.index(prefix)
            low, high = ahead.max(), ahead.max() + self.beta
            for _ in range(200):
                middle = (low + high) / 2
                total = (self.beta * reference[row] / (middle - ahead)).sum()
                low, high = (middle, high) if total > 1 else (low, middle)
            policy = self.beta * reference[row] / (high - ahead)
            logits[row], values[prefix] = np.log(policy), policy @ ahead
        return logits


def make_world(seed=0, *, beta=0.3):
    """A world of random numbers, and logits of a policy in it."""
    draw = np.random.default_rng(seed)
    shape = (len(STATES), VOCABULARY)
    world = World(draw.normal(size=shape), draw.normal(size=len(ANSWERS)), beta)
    return world, draw.normal(size=shape)


def answer_arrays(answers=ANSWERS):
    """Tokens, rows of the table and lengths of answers; slots past the end hold junk."""
    tokens_BT = np.full((len(answers), NUM_SLOTS), 2)
    rows_BT = np.full((len(answers), NUM_SLOTS), 5)
    lengths_B = np.array([len(answer) for answer in answers])
    for row, answer in enumerate(answers):
        tokens_BT[row, : len(answer)] = answer
        rows_BT[row, : len(answer)] = [STATES.index(answer[:t]) for t in range(len(answer))]
    return tokens_BT, rows_BT, lengths_B

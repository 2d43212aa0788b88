import itertools
import json

import pytest

from huatuo_jax.data.formats.disc import ALONE, NOT_SCORED, read_disc_comparisons
from huatuo_jax.data.formats.preferences import ALL_TIED, SOME_TIED


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def talk(case, model):
    roles = ("patient", "doctor")
    texts = (f"病例{case}", f"{model}问", "三天", f"{model}答")
    conversation = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"id": case, "model": model, "source": "SET", "conversation": conversation}


def score(case, model, accuracy, helpfulness):
    scores = f"Accuracy: {accuracy}\nHelpfulness: {helpfulness}"
    return {"id": case, "model": model, "source": "SET", "scores": scores, "prompt": "..."}


@pytest.fixture
def files(tmp_path):
    """Case 1: three models, two of them tied. 2: all tied. 3: one scored. 4: none scored."""
    dialogues = [
        write(tmp_path / f"{model}.jsonl", [talk(case, model) for case in "1234"])
        for model in ("x", "y", "z")
    ]
    given = {
        "x": {"1": (2, 3), "2": (4, 4), "3": (1, 1)},
        "y": {"1": (5, 4), "2": (3, 5)},
        "z": {"1": (3, 2)},
    }
    scores = [
        write(tmp_path / f"s_{model}.jsonl", [score(c, model, *s) for c, s in cases.items()])
        for model, cases in given.items()
    ]
    return dialogues, scores


@pytest.mark.parametrize("source", [None, "disc"])
def test_scores_join_their_dialogues_into_pairs_of_one_case(files, source):
    reading = read_disc_comparisons(*files, source=source)
    pairs = list(reading)
    found = {(pair.extra["chosen_model"], pair.extra["rejected_model"]) for pair in pairs}
    assert found == {("y", "x"), ("y", "z")} and len(pairs) == 2
    for pair in pairs:
        assert [message.content for message in pair.messages] == ["病例1"]
        assert [message.content for message in pair.chosen] == ["y问", "三天", "y答"]
        assert pair.margin == (5 + 4) / 2 - (2 + 3) / 2 and pair.source == (source or "SET")
    assert len({pair.group for pair in pairs}) == 1
    assert reading.rows == 12 + 6 == reading.rows_used + reading.exclusions.total()
    # Unscored: y and z of case 3, all of case 4, z of case 2.
    assert reading.exclusions == {NOT_SCORED: 6, ALL_TIED: 2, ALONE: 1}
    assert reading.repairs == {SOME_TIED: 1} and reading.errors == []


def test_scores_without_a_dialogue_and_second_scores_are_errors(files, tmp_path):
    dialogues, scores = files
    odd = [score("9", "x", 1, 1), score("1", "x", 1, 1), score("4", "x", "n", 9), {"id": 3}]
    scores.append(write(tmp_path / "odd.jsonl", odd))
    reading = read_disc_comparisons(dialogues, scores, max_error_share=0.5)
    assert len(list(reading)) == 2
    wanted = ["no dialogue for", "a second score for", "scores are not lines", "a score needs"]
    for (number, error), said in zip(enumerate(reading.errors, 1), wanted, strict=True):
        assert said in error.reason and error.line == number


def test_the_real_scores_pair_the_real_dialogues(shared_data):
    dialogues = sorted((shared_data / "3_distilled" / "disc_dialogues").glob("*.json"))
    scores = sorted((shared_data / "4_preference" / "disc_gpt4_scores").glob("*/*.jsonl"))
    reading = read_disc_comparisons(dialogues, scores)
    pairs = list(reading)
    assert reading.rows == 1236 + 1231 and reading.errors == []
    # Counted over again, from the files alone.
    means: dict[tuple[str, str], list[float]] = {}
    for path in scores:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            numbers = [float(part.split(":")[1]) for part in row["scores"].splitlines()]
            means.setdefault((row["source"], row["id"]), []).append(sum(numbers) / 4)
    expected = sum(a != b for case in means.values() for a, b in itertools.combinations(case, 2))
    assert len(pairs) == expected and len({pair.id for pair in pairs}) == expected
    assert all(pair.margin > 0 and pair.messages[0].role == "user" for pair in pairs)

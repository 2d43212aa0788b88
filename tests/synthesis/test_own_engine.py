"""A saved model as the teacher, in the same process: replies are kept and not computed again."""

import json

import pytest

from huatuo_jax import synthesize
from huatuo_jax.clinic.dialogues import dialogues as clinic_dialogues
from huatuo_jax.evaluation.respondents import SavedRespondent
from tests.api.tiny import save


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save(tmp_path_factory.mktemp("teacher") / "model", "lm"))


def flags(model, folder, kind, **given):
    source = folder / "source.jsonl"
    if kind.startswith("real"):
        rows = [one.to_json() for one in clinic_dialogues(kind, 3, seed=3)]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        source.write_text(text, encoding="utf-8")
        given["source"] = (str(source),)
    return synthesize.Flags(
        kind=kind,
        output=str(folder / "rows.jsonl"),
        teacher=model,
        asks="questions",
        num_rows=3,
        batch_size=2,
        per_request=1,
        max_new_tokens=8,
        slots=4,
        **given,
    )


@pytest.mark.parametrize(
    "kind",
    [
        "distilled_instruction",
        pytest.param("distilled_conversation", marks=pytest.mark.slow),
        pytest.param("real_instruction", marks=pytest.mark.slow),
        pytest.param("real_conversation", marks=pytest.mark.slow),
    ],
)
def test_replies_of_a_saved_model_are_kept_and_read_again(
    model, tmp_path, kind, monkeypatch, on_one_device
):
    monkeypatch.setattr("huatuo_jax.synthesis.runner._PATIENCE", 2)
    given = flags(model, tmp_path, kind)
    synthesize.main(given)
    first = [(tmp_path / f"rows.jsonl{end}").read_bytes() for end in ("", ".rejected.jsonl")]
    assert any(first)
    kept = sorted((tmp_path / "rows.jsonl.replies").rglob("*.jsonl"))
    assert kept and all(path.stat().st_size for path in kept)

    def computed(*arguments):
        raise AssertionError("a reply that is there is computed again")

    monkeypatch.setattr(SavedRespondent, "_answer", computed)
    synthesize.main(given)
    assert first == [
        (tmp_path / f"rows.jsonl{end}").read_bytes() for end in ("", ".rejected.jsonl")
    ]


def test_a_dry_run_of_a_saved_model_reads_no_weights(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SavedRespondent, "_loaded", lambda self: pytest.fail("weights are read"))
    synthesize.main(flags(model, tmp_path, "real_instruction", dry_run=True))
    assert "2 batches of 2 rows: 4 requests to answer" in capsys.readouterr().out


def test_bare_questions_are_for_saved_models_alone():
    with pytest.raises(ValueError, match="--asks=questions is for a saved model"):
        synthesize.main(
            synthesize.Flags(kind="distilled_instruction", output="x", asks="questions")
        )

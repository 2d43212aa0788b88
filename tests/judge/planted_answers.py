"""Answers files of invented texts with known utilities."""

import json


def make_answers(path, *, num_prompts, num_answers, utility=lambda prompt, answer: 0.0):
    """An answers file of invented texts; returns the utility of each text."""
    utilities = {}
    with path.open("w", encoding="utf-8") as file:
        for prompt in range(num_prompts):
            texts = [f"第{prompt}问的答复{answer}：多喝水，休息。" for answer in range(num_answers)]
            utilities |= {text: utility(prompt, index) for index, text in enumerate(texts)}
            record = {
                "id": f"q{prompt:03d}",
                "messages": [
                    {"role": "user", "content": f"医生，我头疼{prompt}天了。"},
                    {"role": "assistant", "content": "发烧吗？"},
                    {"role": "user", "content": "不发烧。"},
                ],
                "source": "invented",
                "reference": "先量血压，注意休息。",
                "prompt_token_ids": [1, 2],
                "answers": [{"text": text, "finish_reason": "stop"} for text in texts],
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return utilities

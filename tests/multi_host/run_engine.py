"""One process of an engine: `run_engine.py FOLDER FIELD=NUMBER`, fields being those of the mesh.

Each process writes the answers that it was given to FOLDER/PROCESS.json.
"""

import dataclasses
import json
import pathlib

import jax

from huatuo_jax.core import distributed
from huatuo_jax.core.sharding import MeshConfig
from tests.generation import tiny
from tests.multi_host.arguments import run


@distributed.joined()
def main(arguments):
    folder, *fields = arguments
    mesh = MeshConfig(**{name: int(size) for name, size in (one.split("=") for one in fields)})
    engine = tiny.engine(mesh=mesh.make(), page_size=8, steps_per_round=4)
    requests = [
        tiny.request(5, seed=1, num_answers=3, max_new_tokens=20, top_p=0.9),
        tiny.request(17, seed=2, num_answers=2, max_new_tokens=30, stop_token_ids=(3, 4, 5, 6)),
        tiny.request(9, seed=3, max_new_tokens=12, repetition_penalty=1.3, top_k=7),
        tiny.request(30, seed=4, max_new_tokens=6, temperature=0.0),
    ]
    answers = [dataclasses.asdict(answer) for answer in engine.generate(requests)]
    path = pathlib.Path(folder) / f"{jax.process_index()}.json"
    path.write_text(json.dumps(answers))


if __name__ == "__main__":
    run(main)

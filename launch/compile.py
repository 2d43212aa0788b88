"""Compile a config for TPUs or GPUs without one: does it fit, and how fast can it be at best?

python launch/compile.py --config=configs/huatuogpt_7b.py --topology=v5e:8x8 --output=FILE.json
python launch/compile.py --config=configs/huatuogpt_7b.py --topology=h100:8 --num_slices=2

From shapes alone: no weight and no data is read. Needs the extra of the hardware, and none of it:
pip install 'huatuo_jax[tpu]' or 'huatuo_jax[cuda]'.
Exit code 1 says that something does not fit; the fields that would help are named then.
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("compile")

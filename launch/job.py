"""Writes a run as a SkyPilot task, a Kubernetes JobSet or a Slurm script.

python launch/job.py --engine=kubernetes --accelerators=v5e-64 --image=IMAGE --disk=10.0.0.2:/runs \
    --command="python launch/train.py --config=configs/huatuogpt_7b.py" --workdir=/mnt/runs/7b \
    --output=jobset.yaml
"""

from huatuo_jax import cli

if __name__ == "__main__":
    cli.run("job")

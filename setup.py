"""Packages the folders moe/, kernels/ and launch/ as equimoe.moe, equimoe.kernels and equimoe.launch.

`equimoe` is a namespace package: a top-level package called `kernels` would overwrite another project's package of that
name. tests/ and benchmarks/ are not installed. Nothing is compiled.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
FOLDERS = ("moe", "kernels", "launch")
VERSION = re.findall(r'__version__ = "(.+)"', (HERE / "moe" / "version.py").read_text(encoding="utf-8"))[0]

# formats of data: datasets on disk, Parquet and Arrow, .zst
DATA = ["datasets>=4", "pyarrow>=20", "zstandard>=0.23"]
TRACKERS = ["alembic", "mlflow-skinny>=3.17", "sqlalchemy>=2", "wandb>=0.31"]
HF = ["accelerate>=1.15", "peft>=0.21", "tokenizers>=0.22", "transformers>=5"]
EXTRAS = {
    "data": [*DATA, "jinja2", "tokenizers>=0.22"],
    "deepspeed": ["deepspeed>=0.19"],
    "megatron": ["megatron-core>=0.16"],
    # what `make engines` tests
    "engines": ["deepspeed>=0.19", "lightning>=2.6", "megatron-core>=0.16", *HF, *TRACKERS],
    "hf": HF,
    # the trackers besides TensorBoard; MLflow without the packages of its server
    "trackers": TRACKERS,
    "dev": [
        *DATA,
        "build",
        "hypothesis",
        "mypy",
        "pytest>=8",
        "pytest-timeout",
        "ruff",
        "setuptools>=77",
        "tokenizers>=0.22",
        "types-PyYAML",
        "wheel",
    ],
}

setup(
    name="equimoe",
    version=VERSION,
    description="Mixture-of-Experts training for PyTorch with exact global-batch load balancing",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    package_dir={f"equimoe.{folder}": folder for folder in FOLDERS},
    packages=[
        name
        for folder in FOLDERS
        for name in (f"equimoe.{folder}", *(f"equimoe.{folder}.{sub}" for sub in find_packages(folder)))
    ],
    package_data={
        **{f"equimoe.{folder}": ["py.typed"] for folder in FOLDERS},
        "equimoe.kernels": ["py.typed", "auto.json"],
        "equimoe.launch": ["py.typed", "slurm/*.sbatch", "k8s/*.yaml"],
    },
    include_package_data=False,
    zip_safe=False,
    install_requires=[
        # tested versions; moe/parallel/torch_stage.py depends on how each of them runs pipelines
        "torch>=2.11,<2.16",
        'triton>=3.6; sys_platform == "linux"',
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "safetensors>=0.5",
        "matplotlib",
        "tensorboard",
        "tqdm",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["equimoe-train = equimoe.launch.train:main", "equimoe-report = equimoe.launch.report:main"]
    },
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
)

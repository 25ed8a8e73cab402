"""Training, evaluation and search of text-video retrieval with T-MASS (Wang et al., "Text Is MASS", CVPR 2024)."""

__version__ = "0.2.0"

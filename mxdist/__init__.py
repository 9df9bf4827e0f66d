"""mxdist: distributed reinforcement-learning post-training of language models in MXFP4."""

__version__ = "0.1.0"

"""memedit: bulk knowledge editing of language models with MEMIT (arXiv 2210.07229)."""

__version__ = "0.1.0"

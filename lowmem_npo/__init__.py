"""lowmem-npo: make a language model forget chosen data, on one GPU."""

__version__ = "0.1.0"

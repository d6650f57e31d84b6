"""`lowmem-npo X` is `main(arguments)` of X.py, or of X/__init__.py, in this folder."""

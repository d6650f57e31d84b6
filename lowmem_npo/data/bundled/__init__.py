"""The dataset that ships with the package: invented people, written by scripts/make_biographies.py."""

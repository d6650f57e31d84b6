"""Shared by the tests: tiny models, taught ones, dense reference steps, a small demo and a run to report on."""

"""The record of a run, for people and for machines."""

from lowmem_npo.report.picture import draw_picture
from lowmem_npo.report.table import Stages, markdown_table, save_table, text_table
from lowmem_npo.training.metrics import MetricsWriter, read_metrics

__all__ = ["MetricsWriter", "Stages", "draw_picture", "markdown_table", "read_metrics", "save_table", "text_table"]

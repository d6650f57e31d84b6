"""The files of a report, written into the directory of the run."""

from __future__ import annotations

import json
from pathlib import Path

from lowmem_npo.config import OutputConfig
from lowmem_npo.errors import UserError
from lowmem_npo.files import write_atomically
from lowmem_npo.report.content import Content, read_content
from lowmem_npo.report.model_card import model_card
from lowmem_npo.report.page import render_page
from lowmem_npo.run_directory import RunFiles


def write_report(directory: Path, examples: int | None = None) -> Content:
    """Writes report.html, report.json and README.md (the model card) from the files in `directory`.

    examples: rows of each set whose text is in report.html; None for the run's --report-examples. The other two files
    never contain text of a row.

    Raises UserError if there is no run, if one of its files is damaged, or if nothing can be written.
    """
    content = read_content(directory)
    if examples is None:
        examples = content.settings.get("report_examples", OutputConfig.report_examples)
    files = RunFiles(directory)
    texts = {
        files.report_html: render_page(content, examples),
        files.model_card: model_card(content),
        files.report_json: json.dumps(content.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",  # last
    }
    try:
        for path, text in texts.items():
            write_atomically(path, text, private=path == files.report_html and examples > 0)
    except OSError as error:
        raise UserError(f"The report cannot be written into '{directory}': {error.strerror or error}.") from error
    return content

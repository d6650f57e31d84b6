"""What is measured before and after, and where results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowmem_npo.ranges import Automatic, Checked, Count, CountOrNone, on_or_off


@dataclass
class AnswerOptions(Checked):
    """How a model is asked for its own answers: for every command that measures them."""

    max_new_tokens: Count | None = None
    """Tokens that a generated answer may have, where the model does not end it before. Default: 64, or 16 more than the
    longest true answer if that is more, but at most 256. The scores of LUME and TOFU have their own."""
    forms: Literal["all", "trained"] = "all"
    """How the forget rows are asked for. all: as they were trained, and, for a model with a chat template, in the chat
    form or the plain form, whichever was not trained, and in other words where a row has them (--paraphrase-column).
    The report goes by the form in which most is left. trained: as they were trained only."""
    generate_answers: Automatic = "auto"
    """Whether the model writes its answers when it is measured. off: they are read off the likelihoods, the most likely
    token after each true one, and leak tests that let the model write are left out. auto: on, unless --stream-weights
    is predicted to make it take more than an hour."""

    def __post_init__(self) -> None:
        self.generate_answers = on_or_off(self.generate_answers)
        super().__post_init__()

    @property
    def lets_write(self) -> bool:
        """Whether the model writes its answers, as far as that is decided; else they are read off the likelihoods."""
        return self.generate_answers != "off"


@dataclass
class OutputConfig(AnswerOptions):
    """Output: where results go and how much is measured."""

    output_dir: str = "lowmem-npo-output"
    """Directory of the adapter, the configuration, the metrics, the before/after table and the report."""
    resume: bool = False
    """Continue the run in --output-dir from its last checkpoint; without --model, with the settings of its run.yaml."""
    eval_rows: CountOrNone = 64
    """Rows of each set measured before and after (the same ones for every --seed); 0 measures nothing."""
    eval_batch_size: Count = 8
    """Rows per batch when measuring."""
    leaks: tuple[str, ...] = ("extraction", "membership")
    """Tests of what the model still gives away of the forget rows, before and after, on --eval-rows rows; all of
    them, or none."""
    preview: Count | None = None
    """Print N tokenised examples of each set, with the labelled tokens marked, and stop."""
    report_examples: CountOrNone = 3
    """Rows of each set whose text is in report.html, with the model's answers; 0 for none. No other part of the report
    ever contains text of a row."""
    dry_run: bool = False
    """Print the resolved configuration, check data, model and disk, and stop."""

    def __post_init__(self) -> None:
        self.leaks = (self.leaks,) if isinstance(self.leaks, str) else tuple(self.leaks)
        self.leaks = () if self.leaks == ("none",) else self.leaks
        super().__post_init__()

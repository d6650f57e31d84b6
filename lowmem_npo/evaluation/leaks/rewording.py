"""Whether an answer comes when the same is asked in other words, in another language, or in another form.

What was unlearned for one wording can stay for another (Lynch et al. 2024 ask in other languages and other forms).
Asked are the rows' paraphrases, and the form, through a chat template or without, that was not trained: the forms that
the answers are measured in as well, here beside the holdout's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lowmem_npo.evaluation.leaks.contract import Subject
from lowmem_npo.evaluation.leaks.prompting import Prompting

if TYPE_CHECKING:
    from lowmem_npo.evaluation.asking import Asked


class Rewording(Prompting):
    name = "rewording"
    summary = "ROUGE-L recall of greedy answers to the rows' paraphrases, with and without a chat template"
    in_words = "asking the same in other words or in another form"
    none = (
        "the rows bring no paraphrases (--paraphrase-column names a column of them), and there is no chat template to "
        "ask with or without"
    )

    def ways(self, subject: Subject, name: str) -> Mapping[str, Asked]:
        from lowmem_npo.evaluation.asking import other_forms

        assert subject.wording is not None
        wording, rows = subject.wording, subject.sets[name]
        how = (subject.scorer.tokenizer, wording.template, wording.max_length, wording.fit)
        return other_forms(rows, wording.examples[name], range(len(rows)), *how)


REWORDING = Rewording()

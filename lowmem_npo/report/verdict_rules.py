"""The rules by which a verdict is given: few, and stated in every report (`RULES`).

Each looks at the share that is left of what was there before, because no fixed number means the same for a model that
recited and for one that half remembered.
"""

from __future__ import annotations

from lowmem_npo.evaluation.leaks.attack import MARGIN, WHOLE_MARGIN

KNOWN = 0.5  # ROUGE-L recall before; with less, and hardly an answer said, there was little to forget
SAID, MOSTLY_SAID = 0.05, 0.5  # shares of answers: that may still appear, and of a set that is said on the whole
REMAINS = 0.5  # of recall and probability
UNTOUCHED = 0.9
KEPT, DAMAGED = 0.95, 0.75  # of recall, and of probability
GENERAL_KEPT = 0.85  # of the recall of general answers
BEYOND_CHANCE = 2  # standard errors of a change
OVERDONE = 1.3  # times the NLL of a model that never saw the rows

RULES = (
    f"“No longer says”: at most {SAID:.0%} of the measured forget answers appear in what the model says (or at most "
    f"{SAID:.0%} more than from a model that never saw them), answer probability is at most half of what it was, and "
    f"so is ROUGE-L recall, or recall is at most {SAID} above that of such a model. “Still says”: recall is above "
    f"{UNTOUCHED:.0%} of what it was, and so is either the share of answers that appear or the probability. “Still "
    "says as much as before”: the same, where under "
    f"{MOSTLY_SAID:.0%} of the answers appeared before and appear now, or at most {SAID:.0%} now. “In part”: anything "
    f"between. “Hardly said”: before, ROUGE-L recall was below {KNOWN} and at most {SAID:.0%} of the answers "
    "appeared, and no more do now; what else the model knows was not measured. “Hardly said an answer in full”: it "
    f"no longer says them, and at most {SAID:.0%} appeared before; their words may have been the questions' own, so "
    "such a result by itself is never called good. Texts that the model goes on with have no question, and are no "
    "longer said. "
    "“Recites” stands for “says” where all rows are such texts. Where the forget rows are asked in several forms, the "
    "one counts in which the most is "
    f"left. “Still says what it was to keep”: recall and probability on retain rows are at least {KEPT:.0%} of what "
    f"they were, and so many of the answers appear as before that {DAMAGED:.0%} are left, where most did; below "
    f"{DAMAGED:.0%} of recall or probability, much is lost, and the one that decided is named. Retain rows that were "
    f"“hardly said” before are “no less likely now” if the likelihood of a token, by the NLL, is at least "
    f"{DAMAGED:.0%} of what it was, and so is the answer probability, unless that fell by {SAID} or less; below "
    f"{REMAINS:.0%} they are “much less likely”; recall does not count there, and that what was hardly there is kept "
    "makes no result good. “General questions "
    f"as before”: the same of rows that nothing was trained on, with {GENERAL_KEPT:.0%} for recall, and without the "
    "answers that appear. Rows of which only some were measured, and general ones, stand for others, so that a fall "
    f"counts if it is over {BEYOND_CHANCE} times its standard error over the rows; else all is as before “as far as "
    f"the rows can tell”, or, below {DAMAGED:.0%}, “may” be lost. Where that error is not known, as of a single row, "
    "a fall counts on retain rows, and not on general questions. “Overdone”: no longer said, and less likely than a "
    f"uniform guess over the vocabulary, or their NLL is over {OVERDONE} times that of a model that never saw them. "
    "“Worst attack”: what brings back most of all that the leak tests try, beyond what it gives for rows that the "
    f"model never saw; a trace, if it is more than {MARGIN} above that, or above what it brings from a model that "
    f"never saw the forget rows, or if over {WHOLE_MARGIN:.0%} more of the answers come whole, and so few rows do not "
    "explain it by chance."
)

"""Every abbreviation of a page is explained on it."""

import re

import pytest
from helpers.reported_run import unexplained

from lowmem_npo.report.glossary import GLOSSARY, anchor, linked


def test_what_the_report_is_about_is_explained():
    assert {"NLL", "AUC", "KL", "KS", "ROUGE-L", "p-value", "holdout", "gold standard"} <= set(GLOSSARY)
    assert list(GLOSSARY) == sorted(GLOSSARY, key=str.lower)
    assert len({anchor(term) for term in GLOSSARY}) == len(GLOSSARY)
    assert all(re.fullmatch(r"term-[a-z0-9-]+", anchor(term)) for term in GLOSSARY)


def test_no_abbreviation_is_left_unexplained(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "NLL" in html.partition('id="glossary"')[0]
    assert unexplained(html) == set()
    assert unexplained("<p>An XYZ of 3</p><pre>ABC</pre>") == {"XYZ"}, "the search works"


def test_links_lead_to_entries_of_the_page(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    targets = set(re.findall(r'<a [^>]*href="#([^"]+)"', html))
    assert {anchor("NLL"), anchor("KL"), "glossary"} <= targets
    assert targets <= set(re.findall(r'\bid="([^"]+)"', html))
    assert {anchor(term) for term in GLOSSARY} <= set(re.findall(r'\bid="([^"]+)"', html))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the NLL, the NLL", 'the <a class="term" href="#term-nll">NLL</a>, the NLL'),
        ("<b>KL</b> & co", '&lt;b&gt;<a class="term" href="#term-kl">KL</a>&lt;/b&gt; &amp; co'),
        ("Min-K%++ AUC", '<a class="term" href="#term-min-k">Min-K%</a>++ <a class="term" href="#term-auc">AUC</a>'),
        ("ROUGE-L recall", '<a class="term" href="#term-rouge-l">ROUGE-L</a> recall'),
        ("AUCTION, xNLL, token", "AUCTION, xNLL, token"),
    ],
)
def test_an_abbreviation_leads_to_its_entry_once(text, expected):
    assert str(linked(text)) == expected

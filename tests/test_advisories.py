"""What scripts/advisories.py makes of a package index: here of one that a server on this machine plays."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.version import Version

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "advisories.py"


def page(version: str, *advisories: dict) -> dict:
    return {"info": {"version": version}, "vulnerabilities": list(advisories)}


def advisory(name: str, *aliases: str, withdrawn: str | None = None) -> dict:
    about = {"link": f"https://osv.dev/vulnerability/{name}", "fixed_in": ["9.9"], "withdrawn": withdrawn}
    return {"id": name, "aliases": list(aliases), **about}


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs the script for packages against an index of pages; its exit code and what it says."""
    spec = importlib.util.spec_from_file_location("advisories", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "advisories", script)  # for its dataclass
    spec.loader.exec_module(script)

    def run(installed: dict[str, str], pages: dict[str, dict | str]) -> tuple[int, str]:
        class Index(BaseHTTPRequestHandler):
            def do_GET(self):
                found = pages.get(self.path.removeprefix("/pypi/").removesuffix("/json"))
                self.send_response(404 if found is None else 200)
                self.end_headers()
                self.wfile.write((found if isinstance(found, str) else json.dumps(found)).encode())

            def log_message(self, *_):
                pass

        releases = [(name, Version(version)) for name, version in installed.items()]
        monkeypatch.setattr(script, "releases", lambda newest: releases)  # pip would ask the real index
        with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setattr(sys, "argv", ["advisories.py", "--index", f"http://127.0.0.1:{server.server_port}/"])
            code = script.main()
            server.shutdown()
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_a_release_without_advisories_passes_under_its_build_s_label_too(ask):
    code, said = ask({"torch": "2.13.0+cpu"}, {"torch/2.13.0": page("2.13.0"), "torch": page("2.15.0", advisory("X"))})
    assert code == 0 and "1 packages" in said and " 0 advisories" in said


def test_an_advisory_is_told_once_with_all_its_names_and_where_it_is_mended(ask):
    twice = advisory("PYSEC-1", "CVE-1", "GHSA-1"), advisory("GHSA-1", "CVE-1", "PYSEC-1")
    gone = advisory("PYSEC-2", withdrawn="2026-01-01T00:00:00Z")
    code, said = ask({"one": "1.0", "two": "2.0"}, {"one/1.0": page("1.0", *twice, gone), "two/2.0": page("2.0")})
    assert code == 1 and said.count("one 1.0") == 1 and "PYSEC-2" not in said and "two 2.0" not in said
    assert "one 1.0: CVE-1, GHSA-1, PYSEC-1; fixed in 9.9; https://osv.dev/vulnerability/PYSEC-1" in said


def test_the_newest_release_s_page_judges_that_release_alone(ask):
    pages = {"same": page("1.0", advisory("CVE-3")), "older": page("2.0")}
    code, said = ask({"same": "1.0"}, pages)
    assert code == 1 and "CVE-3" in said
    code, said = ask({"older": "1.0", "nowhere": "3.0"}, pages)
    assert code == 2 and "It says nothing of 2: older 1.0 (only of 2.0), nowhere 3.0\n" in said


def test_what_does_not_concern_us_is_told_with_its_reason_and_passes(ask):
    code, said = ask({"sqlitedict": "2.1.0"}, {"sqlitedict": page("2.1.0", advisory("PYSEC-9", "CVE-2024-35515"))})
    assert code == 0 and "harmless here: it unpickles" in said and " 0 advisories, 1 that" in said


@pytest.mark.parametrize(
    "answer", ["<html>log in first</html>", "[]", {"info": {"version": "1.0"}}, page("1.0", {"id": "CVE-1"})]
)
def test_an_index_that_is_none_is_an_error(ask, answer):
    code, said = ask({"one": "1.0"}, {"one/1.0": answer})
    assert code == 2 and "does not answer as a package index" in said

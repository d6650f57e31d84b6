"""Looks up known advisories of all that an installation of lowmem-npo brings along, in the package index's own JSON.

    python scripts/advisories.py [--newest] [--index https://pypi.org]

pip says what it would install: the releases in constraints.txt or, with --newest, what users get today. The page of a
release, /pypi/NAME/VERSION/json, lists the advisories that hold for it. Some mirrors keep pages of projects alone,
/pypi/NAME/json, which list those of the newest release and say nothing of others. Exit code 1: there are advisories; 2:
none is known, but the index does not tell of some releases, or does not answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "test,eval"
SECONDS = 60  # that a page may take
HARMLESS = {  # advisory -> why it does not concern us
    "CVE-2024-35515": "it unpickles the file of lm-eval's cache of answers, which is never asked for"
}


@dataclass(frozen=True)
class Told:
    """What an index says of a release. advisories: None where it says nothing. newest: the release that it tells of."""

    name: str
    version: Version
    advisories: list[dict[str, Any]] | None
    newest: str | None = None

    @property
    def lines(self) -> Iterator[tuple[str, str | None]]:
        """One for each advisory, and why it is harmless if it is; other databases' names for it are beside its own."""
        named: set[str] = set()
        for advisory in self.advisories or ():
            names = {advisory["id"], *advisory["aliases"]}
            if not names & named:
                fixed = ", ".join(advisory["fixed_in"]) or "no release"
                line = f"{self.name} {self.version}: {', '.join(sorted(names))}; fixed in {fixed}; {advisory['link']}"
                yield line, next((why for name, why in HARMLESS.items() if name in names), None)
            named |= names


def releases(newest: bool) -> list[tuple[str, Version]]:
    """What pip would install into a new environment, without installing it."""
    constraints = [] if newest else ["--constraint", str(ROOT / "constraints.txt")]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    report = subprocess.run([*command, *constraints, f"{ROOT}[{EXTRAS}]"], check=True, stdout=subprocess.PIPE).stdout
    found = [one["metadata"] for one in json.loads(report)["install"] if "dir_info" not in one["download_info"]]
    return sorted((canonicalize_name(one["name"]), Version(one["version"])) for one in found)


def ask(index: str, release: tuple[str, Version]) -> Told:
    """Raises OSError where the index cannot be reached, ValueError where it answers with something else."""
    name, version = release
    newest = Told.newest
    for page in (f"{name}/{version.public}", name):
        try:
            with urlopen(f"{index}/pypi/{page}/json", timeout=SECONDS) as answer:
                content = json.load(answer)
        except HTTPError as error:
            if error.code == 404:
                continue
            raise
        newest = content["info"]["version"]
        if Version(newest) == Version(version.public):  # without a build's label, such as +cpu
            return Told(name, version, [one for one in content["vulnerabilities"] if not one.get("withdrawn")])
    return Told(name, version, None, newest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newest", action="store_true")
    parser.add_argument("--index", default="https://pypi.org", help="default: %(default)s")
    options = parser.parse_args()
    index = options.index.rstrip("/")
    try:
        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(partial(ask, index), releases(options.newest)))
        lines = [line for one in told for line in one.lines]
    except subprocess.CalledProcessError:
        return 2  # pip has said why
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"advisories: {index} does not answer as a package index: {error!r}", file=sys.stderr)
        return 2
    harmful = [line for line, why in lines if why is None]
    unknown = [
        f"{one.name} {one.version}" + (f" (only of {one.newest})" if one.newest else "")
        for one in told
        if one.advisories is None
    ]
    for line, why in sorted(lines, key=lambda line: line[1] is not None):
        print(line if why is None else f"{line}; harmless here: {why}")
    harmless = len(lines) - len(harmful)
    print(f"{len(told)} packages at {index}: {len(harmful)} advisories, {harmless} that are harmless here")
    if unknown:
        print(f"It says nothing of {len(unknown)}: {', '.join(unknown)}")
    return 1 if harmful else 2 * bool(unknown)


if __name__ == "__main__":
    sys.exit(main())

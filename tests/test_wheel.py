"""What is built for others: the wheel has all that a run needs and nothing else, the sdist builds the same wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("setuptools", minversion="77")  # of the licence as pyproject.toml states it
PACKAGES = {"lowmem_npo": ROOT / "lowmem_npo", "lowmem_kernels": ROOT / "kernels" / "lowmem_kernels"}
BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def built(what: str, tree: Path, into: Path) -> Path:
    """As pip has it built, without its own environment for it, which it would fill from the package index."""
    into.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{what}", str(into)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return into / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, sdist) of the files that git knows or would add, as far as it knows any."""
    folder = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "src" / name)
    else:
        shutil.copytree(ROOT, folder / "src", ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build"))
    return built("wheel", folder / "src", folder / "dist"), built("sdist", folder / "src", folder / "dist")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_module_and_every_data_file(distributions):
    expected = {
        f"{name}/{file.relative_to(folder)}"
        for name, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names_in(distributions[0]) == expected
    assert {Path(name).suffix for name in expected} >= {".py", ".jsonl", ".json", ".jinja", ".css"}
    with zipfile.ZipFile(distributions[0]) as archive:
        about = [name for name in archive.namelist() if ".dist-info/" in name]
        (points,) = (archive.read(name).decode() for name in about if name.endswith("entry_points.txt"))
        (metadata,) = (archive.read(name).decode() for name in about if name.endswith("METADATA"))
    assert "lowmem-npo = lowmem_npo.cli:main" in points and any(name.endswith("LICENSE") for name in about)
    assert "Requires-Dist: torch>=" in metadata and "\n# lowmem-npo" in metadata  # README


def test_the_sdist_builds_the_same_wheel(distributions, tmp_path):
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert names_in(built("wheel", tree, tmp_path / "dist")) == names_in(wheel)


def test_what_is_in_the_wheel_runs(distributions, tmp_path):
    """From its own files alone: not from this directory."""
    with zipfile.ZipFile(distributions[0]) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import lowmem_npo, lowmem_kernels, sys; from lowmem_npo.cli import main; print(lowmem_npo.__file__, "
        "lowmem_kernels.__file__); sys.exit(main(['data', '--forget', 'builtin']))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**environment, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(str(tmp_path / "site")) == 2

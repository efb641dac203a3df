"""Which sources a result is of, told of a repository that is made up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from simulator.version import SIMULATED, version

WHO = ("-c", "user.name=t", "-c", "user.email=t@t")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file of what is simulated and one that is not, in one commit."""
    for name in (*SIMULATED, "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("1\n", encoding="utf-8")
    for words in (["init", "-q"], ["add", "."], [*WHO, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_two_edits_of_one_commit_are_two(root: Path) -> None:
    clean = version(root)
    told = {clean}
    for text in ("2\n", "3\n"):
        (root / "kvmd" / "a.py").write_text(text, encoding="utf-8")
        assert version(root).startswith(f"{clean}-")
        assert version(root) == version(root)
        told.add(version(root))
    assert len(told) == 3
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    assert version(root) in told, "whether it is staged is all the same"
    (root / "kvmd" / "a.py").write_text("1\n", encoding="utf-8")
    assert version(root) == clean


def test_what_is_not_simulated_is_no_part(root: Path) -> None:
    clean = version(root)
    (root / "docs" / "a.py").write_text("2\n", encoding="utf-8")
    assert version(root) == clean


def test_a_file_that_git_does_not_know_is_a_part_by_its_contents(root: Path) -> None:
    clean = version(root)
    told = {clean}
    for text in ("2\n", "3\n"):
        (root / "simulator" / "new_story.py").write_text(text, encoding="utf-8")
        assert version(root).startswith(f"{clean}-")
        told.add(version(root))
    assert len(told) == 3
    (root / "simulator" / "new_story.py").unlink()
    assert version(root) == clean


@pytest.mark.parametrize("git", ["no repository", "not installed", "refuses"])
def test_where_git_cannot_say_two_trees_are_two(
    git: str, root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if git == "no repository":
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
        (root / ".git").rename(root / "was.git")
    elif git == "not installed":
        monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("nothing")))
    else:
        (root / ".git" / "index").write_bytes(b"no index")
    told = {version(root)}
    assert version(root) in told
    (root / "kvmd" / "a.py").write_text("2\n", encoding="utf-8")
    told.add(version(root))
    assert len(told) == 2
    assert "no version" not in told, "as older records have it, of which nobody knows the sources"

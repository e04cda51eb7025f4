"""What a reader of a badge gets: a notebook on a fresh runtime that is like Colab's, with nothing
but its set-up cell's doing.

`make colab` runs it, in .venv-colab, on the last commit: what is not committed is not in the clone
that a set-up cell makes.
"""

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from hire.lab.figure_index import figure_entry, figures_with_notebook
from hire.lab.paths import OUT, ROOT

pytestmark = pytest.mark.skipif(
    "COLAB" not in os.environ, reason="`make colab` runs them: they take python3.12 and minutes"
)
RUNTIME = ROOT / ".venv-colab/bin/python"
NAMES = [figure_entry(number)["name"] for number in os.environ.get("ONLY", "").split()] or [
    entry["name"] for entry in figures_with_notebook()
]


def plain(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(python: Path) -> dict[str, str]:
    """Version of every package that an interpreter finds, wherever it is started; of two, the one
    that it imports.
    """
    program = (
        "import importlib.metadata as m, json; "
        "print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    )
    result = json.loads(
        subprocess.run([python, "-I", "-c", program], capture_output=True, check=True).stdout
    )
    return {plain(name): version for name, version in reversed(result)}


def pins() -> dict[str, str]:
    """The versions that constraints-colab.txt names."""
    lines = (ROOT / "constraints-colab.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.fixture
def fresh(tmp_path):
    """The interpreter of a runtime that nobody has used: it finds the packages of .venv-colab, and
    installs beside them.
    """
    subprocess.run([RUNTIME, "-m", "venv", "--without-pip", tmp_path / "runtime"], check=True)
    library = sysconfig.get_path(
        "purelib", vars=dict(base=str(tmp_path / "runtime"), py_version_short="3.12")
    )
    theirs = sysconfig.get_path(
        "purelib", vars=dict(base=str(ROOT / ".venv-colab"), py_version_short="3.12")
    )
    (Path(library) / "colab.pth").write_text(theirs)
    return tmp_path / "runtime/bin/python"


def test_the_runtime_is_like_colabs(fresh):
    result = installed(fresh)
    assert pins().items() <= result.items()
    assert not result.keys() & {"hire", "jaxtyping", "papermill", "nbval", "libtpu"}


@pytest.fixture
def repository(tmp_path):
    """A bare repository whose tag `release` is our last commit; its branch has moved on."""

    def git(*arguments: str, folder: Path) -> None:
        subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)

    bare, clone = tmp_path / "bare.git", tmp_path / "clone"
    git("clone", "-q", "--bare", str(ROOT), str(bare), folder=tmp_path)
    git("tag", "-f", "release", "HEAD", folder=bare)
    git("clone", "-q", str(bare), str(clone), folder=tmp_path)
    git("rm", "-rqf", "hire", folder=clone)
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    git(*identity, "commit", "-qm", "Remove the package", folder=clone)
    git("push", "-q", folder=clone)
    return bare


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_on_a_fresh_runtime(name, fresh, repository, tmp_path):
    content, before = tmp_path / "content", installed(fresh)
    content.mkdir()
    book = subprocess.run(
        ["git", "show", f"HEAD:notebooks/{name}.ipynb"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    ours = (
        "XLA_FLAGS",
        "PYTHONPATH",
        "VIRTUAL_ENV",
        "JUPYTER_PLATFORM_DIRS",
    )  # of the tests, and none of Colab's
    surroundings = {key: value for key, value in os.environ.items() if key not in ours}
    surroundings |= dict(
        HIRE_REPOSITORY=f"file://{repository}",
        HIRE_REFERENCE="release",
        HIRE_PROFILE="smoke",
        MPLBACKEND="module://matplotlib_inline.backend_inline",
    )
    command = [fresh, "-m", "nbconvert", "--to", "notebook", "--execute", "--stdin", "--stdout"]
    ran = subprocess.run(command, input=book, cwd=content, env=surroundings, capture_output=True)
    (OUT / "colab").mkdir(parents=True, exist_ok=True)
    (OUT / f"colab/{name}.ipynb").write_bytes(ran.stdout)
    assert ran.returncode == 0, ran.stderr.decode()[-4000:]
    assert [path.name for path in content.iterdir()] == ["hire-repository"]
    after = installed(fresh)
    touched = {
        key: (before.get(key), after.get(key))
        for key in (*pins(), "libtpu")
        if before.get(key) != after.get(key)
    }
    assert not touched, "the set-up cell must leave what the runtime has as it is"

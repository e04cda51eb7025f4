"""What a new user relies on: the README's code, generated pages, the notebooks' cells, imports,
environments.
"""

import ast
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement

import hire
import hire.models
from hire.lab import figure_index, records
from hire.lab.figure_index import COMMITTED_PROFILE, figures_with_notebook
from hire.lab.paths import NOTEBOOKS, ROOT
from hire.lab.report import pages
from hire.lab.studies import study

BOOKS = [entry["name"] for entry in figures_with_notebook()]
BOOKS_WITH_FIGURE = [
    entry["name"] for entry in figures_with_notebook() if entry.get("figure", True)
]


def python_blocks(page: str) -> list[str]:
    """The Python code of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_the_example_of_the_readme_runs(rng):
    code, *_ = python_blocks("README.md")
    states = rng.normal(size=(3000, 160)).astype(np.float32) * np.geomspace(
        1, 0.05, 160, dtype=np.float32
    )
    given = dict(embedding=jnp.asarray(rng.normal(size=(4000, 160)), np.float32))
    given |= dict(
        key=jax.random.key(0),
        hidden_states=states[:1500],
        more_hidden_states=states[1500:2900],
        hidden=states[2900:],
    )
    exec(code, given)
    assert given["top"].indices.shape == (100, 32)
    exact = given["hidden"] @ np.asarray(given["embedding"]).T
    assert float(hire.recall(given["top"].indices, exact, 32).mean()) > 0.97


def test_the_page_on_a_model_of_your_own_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {}
    exec("\n".join(python_blocks("docs/YOUR_MODEL.md")), given)
    assert given["simple"].recall.mean > 0.99 and given["int8_on_code"].recall.mean > 0.99
    choice = given["fitted"].tuned.choice
    assert choice.bound >= 0.95 and given["judged"].recall.high >= 0.95
    assert given["cheap"].tuned.choice.candidates <= choice.candidates
    assert given["judged"].bytes_fraction < given["simple"].bytes_fraction
    # The low rank that was fitted to prose fails on code, and one fitted to both does not.
    assert given["on_code"].recall.high < 0.7 < 0.94 < given["on_both"].recall.mean
    again = given["fitted"].softmax(given["unseen"])
    np.testing.assert_array_equal(given["top"].indices, again.indices)
    is_possible = np.isfinite(given["changed"].values)
    tokens = np.asarray(given["changed"].indices)[is_possible]
    assert len(tokens) and (tokens % 2 == 0).all() and (tokens >= 10).all()
    assert given["tokens"].shape == (2,)


def test_the_examples_of_contributing_run(rng, tmp_path, monkeypatch):
    estimator, figure, model = python_blocks("CONTRIBUTING.md")
    given = dict(hire=hire, profile="smoke", bits=None, prompt=np.full((1, 3), 7, np.int32))
    given |= dict(
        rows=rng.normal(size=(500, 24)).astype(np.float32),
        queries=rng.normal(size=(20, 24)).astype(np.float32),
    )
    exec(estimator, given)
    first_columns = given["FirstColumns"].fit(given["rows"], 16)
    assert isinstance(first_columns, hire.Estimator)
    top = hire.HireSoftmax(given["rows"], first_columns, k=8, candidates=400)(given["queries"])
    assert 0.9 < float(hire.recall(top.indices, given["queries"] @ given["rows"].T, 8).mean()) <= 1
    monkeypatch.setattr(study, "OUT", tmp_path)
    monkeypatch.setattr(study, "figure_entry", lambda number: dict(name=f"{number}_mine"))
    sizes = {"12_mine": dict(bits=4, candidates=[32, 64, 128, 256])}
    for module in (study, figure_index):
        monkeypatch.setattr(module, "sizes_by_notebook", lambda profile: sizes)
    exec(figure, given)
    made = {path.relative_to(tmp_path / "smoke").as_posix() for path in tmp_path.rglob("*.*")}
    assert made == {"figures/12_mine.png", "figures/12_mine.json", "records/12_mine.jsonl"}
    monkeypatch.setattr(hire.models.config, "PRESETS", dict(hire.models.config.PRESETS))
    exec(model, given)
    assert given["tokens"].shape == (1, 7)


def test_generated_pages_are_up_to_date():
    for path, text in pages.pages().items():
        assert path.read_text() == text, f"{path.name}: run `make pages`"
    with pytest.raises(ValueError, match="figures"):
        pages.with_generated_part("no markers", "figures", "text")


def test_badge_and_set_up_cell_name_the_same_branch_or_tag():
    repository = pages.address().removeprefix("https://github.com/")
    for name in BOOKS:
        cells = {cell.id: cell.source for cell in notebook_of(name).cells}
        badge = f"{repository}/blob/{pages.reference()}/notebooks/{name}.ipynb"
        assert badge in cells["title"]
        assert f'"{pages.address()}"' in cells["set-up"]
        assert f'"{pages.reference()}"' in cells["set-up"]


def notebook_of(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def lines_of_code(book: nbformat.NotebookNode) -> int:
    """Lines of a notebook's code cells, blank ones and comments left out."""
    lines = [
        line.strip()
        for cell in book.cells
        if cell.cell_type == "code"
        for line in cell.source.split("\n")
    ]
    return sum(bool(line) and not line.startswith("#") for line in lines)


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_has_its_form(name):
    book = notebook_of(name)
    cells = {cell.id: cell for cell in book.cells}
    first = ["title", "committed-figure", "set-up", "parameters"]
    if name not in BOOKS_WITH_FIGURE:
        first.remove("committed-figure")
    assert list(cells)[: len(first)] == first
    assert book.cells[-1].cell_type == "markdown"
    tagged = {tag: cell.id for cell in book.cells for tag in cell.metadata.get("tags", [])}
    assert tagged == {"parameters": "parameters", "nbval-check-output": "checks"}
    assert lines_of_code(book) <= 60
    assert book.metadata["accelerator"] == "TPU" and book.metadata["colab"]["gpuType"] == "V5E1"
    parameters = ast.parse(cells["parameters"].source).body
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in parameters}
    assert values.pop("profile") == "auto" and None in values.values()
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    if name in BOOKS_WITH_FIGURE:
        assert set(values.values()) == {None}
    assert code.count("study.publish(") == (name in BOOKS_WITH_FIGURE)
    assert not re.search(r'"install"[^\n]*\b(jax|jaxlib|libtpu|numpy)\b', cells["set-up"].source)


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_has_the_outputs_of_its_run(name):
    book = notebook_of(name)
    outputs = {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}
    assert outputs["checks"] and outputs["load"]
    assert f"profile {COMMITTED_PROFILE}," in outputs["load"][0].text
    for output in sum(outputs.values(), []):
        assert output.output_type == "display_data" or output.name == "stdout"
        assert "image/png" not in output.get("data", {})
    if name in BOOKS_WITH_FIGURE:
        assert pages.facts(name)["finding"] in "".join(
            output.text for output in outputs["publish"] if "text" in output
        )


def is_type_checking(node: ast.AST) -> bool:
    """Whether the node is an `if TYPE_CHECKING:`, whose imports never run."""
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def test_the_front_door_brings_no_flax():
    program = (
        "import sys, hire; assert 'flax' not in sys.modules; "
        "hire.generate; assert 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="nothing"):
        hire.nothing  # noqa: B018


# Names that the first release used for what now has the field's term (CHANGELOG.md).
RETIRED = set(
    """
    check_count OncePerArray at_most keep_groups kth_score taken scores_among sums_among
    row_sums row_sums_at in_pieces in_one_pass THIN FEW MANY PIECE SPLIT REDUCES foremost
    most_pooled buckets_of DEPTH log_ratio ranked best_winners best_set kth_key by_form
    check_form HELD TALL near_one covariance_of for_any_lead on_device Outliers best_of Words
    words_of fresh_bound STAKES masked members common_first common_path kernel_takes Axis
    dealt fair_share merged told_again with_filling Growing Keys Copied Split Rest WordSearch
    best_words words_found drawing LAST Told surprise words_told found_by gains give_back
    timed_rungs prefills pods
    found told held own whole each taken laid spread written wanted settle within instead off
    apart some best slack takes winners arrived near anywhere trunk CHUNK places words bytes_for
    together seen rungs easing holes lost every depths ORDER SAFE scores_by_halves always common
    shared at_once put Key margins judge_every asked_for promised of_stream nominated reached
    rounded stored rate both slots pool levels left over product search
    """.split()
)
# Where a library's name is one of them.
ALLOWED = {
    "slots": {"hire/models/config.py"},  # dataclass(slots=True)
    "pool": {"hire/lab/report/notebooks.py", "hire/timing.py"},  # an executor
    "levels": {"hire/lab/studies/plots.py"},  # of a contour
    "left": {"hire/lab/studies/plots.py"},  # of a bar
    "over": {"hire/lab/studies/adversary.py"},  # np.errstate(over=…)
    "product": {"hire/lab/studies/adversary.py"},  # itertools.product
    "words": {"hire/lab/studies/extensions.py"},  # of a file of word vectors
    "members": {"hire/lab/report/api.py"},  # of griffe's objects
    "Split": {"hire/models/tokenizer.py"},  # of the tokenizers library
    # re.search
    "search": {
        "hire/lab/report/api.py",
        "hire/lab/report/pages.py",
        "hire/lab/tpu/bundle_parser.py",
    },
}


def identifiers_of(tree: ast.AST) -> set[str]:
    """The names that a syntax tree defines, reads or passes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.keyword) and node.arg:
            names.add(node.arg)
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "hire").rglob("*.py")), ids=str)
def test_retired_names_do_not_come_back(path):
    name = path.relative_to(ROOT).as_posix()
    retired = identifiers_of(ast.parse(path.read_text())) & RETIRED
    assert {word for word in retired if name not in ALLOWED.get(word, ())} == set()


def documented_arguments(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """The arguments that a docstring lists below `Args:`."""
    docstring = ast.get_docstring(node) or ""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", docstring, re.M)
    lines = re.findall(r"^    ([*\w]+(?:, [*\w]+)*):", section[1], re.M) if section else []
    return {name.strip(" *") for line in lines for name in line.split(",")}


@pytest.mark.parametrize("path", sorted((ROOT / "hire").rglob("*.py")), ids=str)
def test_docstrings_list_arguments_that_exist(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        function = node
        if isinstance(node, ast.ClassDef):
            methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
            fields = {
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            }
            function = methods.get("__init__")
            if function is None:
                assert documented_arguments(node) <= fields, f"{path}: {node.name}"
                continue
        arguments = {part.arg for part in ast.walk(function.args) if isinstance(part, ast.arg)}
        assert documented_arguments(node) <= arguments, f"{path}: {node.name}"


# Imports go from a room to one above it in this list. Rooms of one line do not import each other.
LAYERS = (
    ("types", "pytrees", "timing", "storage"),
    ("ops",),
    ("estimators",),
    ("search", "sampling"),
    ("distributed", "tuning", "certify"),
    ("layers",),
    ("fitting", "saving"),
    ("",),  # hire/__init__.py
    ("models",),
    ("lab.paths",),
    ("lab.records", "lab.figure_index"),
    ("lab.data",),
    ("lab.rivals",),
    ("lab.metrics", "lab.timing"),
    ("lab.training",),
    ("lab.tpu",),
    ("lab.studies",),
    ("lab.report",),
    ("lab.__main__", "lab"),
)
ROOMS = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def room_of(module: str) -> str:
    """The room in LAYERS of a module, such as "lab.data" of "hire.lab.data.text"."""
    parts = module.split(".")[1:]
    for length in (2, 1):
        if ".".join(parts[:length]) in ROOMS:
            return ".".join(parts[:length])
    return ""


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, those for type checkers alone left out."""
    tree = ast.parse(path.read_text())
    for_checkers = {
        part for node in ast.walk(tree) if is_type_checking(node) for part in ast.walk(node)
    }
    result = set()
    for node in set(ast.walk(tree)) - for_checkers:
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            result |= {name if name in MODULES else node.module for name in names}
    return result


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted((ROOT / "hire").rglob("*.py"))}


def test_imports_point_one_way():
    for module, path in MODULES.items():
        room = room_of(module)
        for name in imports_of(path):
            part = name.split(".")[0]
            if part == "hire":
                target = room_of(name)
                assert target == room or ROOMS[target] < ROOMS[room], f"{path}: imports {name}"
            elif ROOMS[room] < ROOMS["models"]:
                allowed = {"jax", "numpy", "jaxtyping"} | sys.stdlib_module_names
                if module.startswith("hire.ops.cpu."):  # imported only where numba is
                    allowed |= {"numba", "llvmlite"}
                if module in ("hire.storage", "hire.saving"):  # imported where a file is written
                    allowed |= {"safetensors", "filelock", "platformdirs"}
                assert part in allowed, (
                    f"{path}: imports {name}, and the algorithm needs jax, numpy and jaxtyping only"
                )


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module: {name for name in imports_of(path) if name in MODULES}
        for module, path in MODULES.items()
    }
    order = graphlib.TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the circle


def test_the_public_names_are_there_and_documented_once():
    page = (ROOT / "docs/API.md").read_text()
    public_names = [*hire.__all__, *hire.models.__all__]
    for name in public_names:
        assert getattr(hire, name, None) or getattr(hire.models, name), name
        entry = rf"^### {name}\n\n```python\n[^`]+\n```\n\n\S"
        # `load` of hire and of hire.models are two functions; convert and generate are the same.
        homes = {getattr(home, name, None) for home in (hire, hire.models)} - {None}
        assert len(re.findall(entry, page, re.M)) == len(homes), (
            f"{name}: expected once for each object in docs/API.md, with a docstring"
        )


def test_environments_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda[:2] == ["python=3.12", "pip"] and conda[2]["pip"] == [
        "-c constraints.txt",
        "-e .[all]",
    ]
    assert "all" in project["optional-dependencies"] and project["requires-python"] == ">=3.11"
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    for file in ("constraints.txt", "constraints-floor.txt"):
        locked = {
            line.split("==")[0].lower().replace("_", "-")
            for line in (ROOT / file).read_text().split()
        }
        for requirement in project["dependencies"] + extras:
            name = re.split(r"[<>=\[]", requirement)[0].lower()
            assert name == "hire" or name in locked, (
                f"{requirement}: not in {file}; run `make lock`"
            )
    pinned = {
        "jax==0.7.2",
        "jaxlib==0.7.2",
        "flax==0.11.2",
        "numpy==2.1.3",
        "optax==0.2.8",
        "orbax-checkpoint==0.12.4",
    }
    for file in ("constraints-floor.txt", "constraints-colab.txt"):
        assert pinned <= set((ROOT / file).read_text().split()), (
            f"{file}: expected what Colab's TPU runtime ships"
        )


def test_nothing_of_this_machine_is_in_the_repository():
    here = [f"{folder}/".encode() for folder in (ROOT, Path.home()) if folder != Path("/")]
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, tracked.split("\0")):
        content = (ROOT / name).read_bytes()
        assert not any(path in content for path in here), f"{name}: names a path of this machine"


def test_notebooks_are_those_of_the_index():
    written = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    assert written == [entry["name"] for entry in figures_with_notebook()]
    for name in written:
        cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
        assert [cell["id"] for cell in cells] == list(dict.fromkeys(cell["id"] for cell in cells))


def needed(name: str) -> set[str]:
    """A package and what it depends on without extras, as installed here."""
    result, waiting = set(), [name]
    while waiting:
        package = waiting.pop()
        if package not in result:
            result.add(package)
            asked = [Requirement(text) for text in metadata.requires(package) or []]
            waiting += [
                each.name
                for each in asked
                if each.marker is None or each.marker.evaluate({"extra": ""})
            ]
    return result


def test_the_set_up_cell_clones_its_branch_or_tag(tmp_path):
    """A local bare repository stands for GitHub. pip is not called: `make colab` does that."""

    def git(*arguments: str, folder: Path = tmp_path) -> str:
        identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    source, bare, content = (tmp_path / name for name in ("source", "bare.git", "content"))
    git("init", "-q", "-b", "main", str(source))
    commits = []
    for name in ("of the badge", "after it"):
        (source / "hire").mkdir(exist_ok=True)
        (source / "hire/__init__.py").write_text(f"name = {name!r}")
        git("add", "-A", folder=source)
        git("commit", "-qm", name, folder=source)
        commits.append(git("rev-parse", "HEAD", folder=source))
    git("tag", "v0", commits[0], folder=source)
    git("clone", "-q", "--bare", str(source), str(bare))
    content.mkdir()
    program = f"""
import subprocess
run = subprocess.run
subprocess.run = lambda command, **rest: command[1] == "-m" or run(command, **rest)
{pages.set_up_cell()}
import hire
print(hire.name)"""

    def set_up(folder: Path, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-I", "-S", "-c", program]
        return subprocess.run(
            command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
        )

    variables = dict(HIRE_REPOSITORY=str(bare))
    assert set_up(content, **variables, HIRE_REFERENCE="v0").stdout == "of the badge\n"
    assert git("rev-parse", "HEAD", folder=content / "hire-repository") == commits[0]
    shutil.rmtree(content / "hire-repository")
    assert set_up(content, **variables).stdout == "after it\n"  # main
    # In a clone nothing is fetched.
    assert "No module named 'hire'" in set_up(NOTEBOOKS, HIRE_REPOSITORY="/nowhere").stderr
    assert not (NOTEBOOKS / "hire-repository").exists()


def test_the_installed_package_needs_its_base_dependencies_alone(tmp_path):
    """A wheel as `pip install .` builds it, from what git would commit, beside nothing but
    those.
    """
    source, site = tmp_path / "source", tmp_path / "site"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in tracked:
        if name.startswith("hire/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, source], check=True, cwd=tmp_path
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
        kinds = {
            Path(name).suffix
            for name in packed.namelist()
            if not name.split("/")[0].endswith(".dist-info")
        }
        assert kinds == {".py", ".typed"} and any(
            name.endswith("/licenses/LICENSE") for name in packed.namelist()
        )
    for package in set().union(*map(needed, ("jax", "numpy", "jaxtyping"))):
        for part in {
            file.parts[0]
            for file in metadata.files(package) or []
            if file.parts[0] not in ("..", "__pycache__")
        }:
            (site / part).symlink_to(metadata.distribution(package).locate_file(part))
    assert (site / "hire/models/decoder.py").exists() and not (
        site / "hire/lab"
    ).exists()  # which needs the repository around it
    program = f"""
import sys
sys.path.append({str(site)!r})
import numpy, hire
rows = numpy.eye(8, 4, dtype="float32")
quantized = hire.Quantized.fit(rows, 8)
print(hire.high_recall_top_k(rows[:1], rows, quantized, k=1, candidates=2).indices)
hire.generate"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "[[0]]\n"
    assert done.stderr.endswith(
        "ModuleNotFoundError: hire.generate needs flax: pip install 'hire[models]'\n"
    )


def test_the_workflow_runs_the_one_script():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (python,) = (step["with"] for step in job["steps"] if "python" in step.get("uses", ""))
    assert python["python-version"] == "3.12"


def test_the_citation_names_this_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (hire.__version__, project["license"])
    paper = cited["preferred-citation"]
    assert "2402.09360" in paper["url"] and len(paper["authors"]) == 7


HOSTILE = "x; touch ran; $(shell touch ran) `touch ran` $$(touch ran) \"'"


@pytest.fixture
def made(tmp_path):
    """make in a folder whose pythons say what they were called with, and do nothing."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "constraints-floor.txt",
        "constraints-colab.txt",
    ):
        (tmp_path / name).touch()
    for name in (".venv", ".venv-floor", ".venv-colab"):
        python = tmp_path / name / "bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(
            '#!/bin/sh\nfor each in "$@"; do echo "<$each>"; done\necho "only <$ONLY>"\n'
        )
        python.chmod(0o755)
        (tmp_path / name / ".ready").touch()

    def run(*arguments: str, **environment: str) -> str:
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ("MAKEFLAGS", "MAKELEVEL", "XLA_FLAGS")
        }
        done = subprocess.run(
            ["make", "-s", *arguments],
            cwd=tmp_path,
            env=kept | environment,
            capture_output=True,
            text=True,
        )
        assert not (tmp_path / "ran").exists(), "a value of a variable was run"
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    "name",
    [
        "VARIANT",
        "PROFILE",
        "ONLY",
        "FRESH",
        "PYTHON",
        "FLOOR_PYTHON",
        "XLA_FLAGS",
        "LAB",
        "WORKERS",
    ],
)
@pytest.mark.parametrize(
    "target", ["train", "figures", "figure-02", "colab", "floor", "test", "checks", "bench", "help"]
)
def test_no_variable_of_make_is_run_by_the_shell(made, name, target):
    made(target, f"{name}={HOSTILE}")
    made(target, **{name: HOSTILE})
    made("-e", target, **{name: HOSTILE})


def test_variables_of_make_reach_their_commands(made):
    assert "<figures>\n<--profile>\n<smoke>\n<--only>\n<02>\n<--fresh>" in made(
        "figure-02", "PROFILE=smoke", "FRESH=1"
    )
    assert f"<--profile>\n<{HOSTILE.replace('$$', '$')}>" in made(
        "figures", f"PROFILE={HOSTILE.replace('$$', '$')}"
    )
    assert "<--only>\n<02;touch ran>" in made("figure-02;touch ran")
    message = made("train", "VARIANT=dense groups8")
    assert message.index("<train>\n<dense>") < message.index("<train>\n<groups8>")
    assert "VARIANT" in made("train")
    assert "only <03 05>" in made("colab", "ONLY=03 05")
    for python in ("/no/such/python", HOSTILE):
        made("-W", "constraints-floor.txt", ".venv-floor/.ready", f"FLOOR_PYTHON={python}")
        made("-W", "constraints.txt", "env", f"PYTHON={python}")


def listing(folder: Path) -> list[tuple]:
    result = []
    for path in sorted(folder.rglob("*")):
        output = path.stat()
        result.append(
            (
                str(path),
                output.st_size,
                output.st_mtime_ns,
                path.read_bytes() if path.is_file() else b"",
            )
        )
    return result


def filled(folder):
    """Put something of every kind into a cache folder, and list it."""
    for name in ("hidden_states/one.npz", "evals/two.whl", "three.safetensors", "four.lock"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return listing(folder)


def test_tests_leave_the_users_cache_as_it_is(tmp_path):
    """A test run of a user whose cache holds hidden states, in which a test lets them be made anew
    and leaves something.
    """
    before = filled(tmp_path)
    program = """
import conftest
from hire.lab.data import hidden_state_cache
from hire.storage import cache_folder
hidden_state_cache.forget()
(cache_folder() / "evals/left").touch()
assert (cache_folder() / "three.safetensors").read_text() == "three.safetensors"
conftest.pytest_unconfigure()"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= dict(HIRE_CACHE=str(tmp_path), PYTHONPATH=f"{ROOT}/tests:{ROOT}")
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert listing(tmp_path) == before


def test_a_scratch_cache_has_the_users_files_and_none_of_its_changes(tmp_path):
    before = filled(tmp_path)
    program = """
import os, pathlib
folder = pathlib.Path(os.environ["HIRE_CACHE"])
print(sorted(str(path.relative_to(folder)) for path in folder.rglob("*")))
(folder / "evals/new").touch()
(folder / "three.safetensors").unlink()
raise SystemExit(3)"""
    command = [sys.executable, ROOT / "tests/scratch_cache.py", sys.executable, "-c", program]
    done = subprocess.run(
        command, env=os.environ | dict(HIRE_CACHE=str(tmp_path)), capture_output=True, text=True
    )
    assert done.returncode == 3 and ast.literal_eval(done.stdout) == [
        "evals",
        "evals/two.whl",
        "three.safetensors",
    ]
    assert listing(tmp_path) == before


def test_energy_at_an_assumed_power_is_no_measurement():
    known = {entry["id"]: entry for entry in records.read()}
    assert known["training-energy"]["kind"] == "simulated"
    assert known["training-energy"]["setting"]["assumed_watts"] == 60
    assert (
        "energy" not in known["sparsity"]["results"] and "watts" not in known["sparsity"]["setting"]
    )

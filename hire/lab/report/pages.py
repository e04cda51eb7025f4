"""The generated parts of README, gallery and notebooks.

Everything that a record or the figure index states is read from there and never typed by hand.
"""

import json
import re
import tomllib

import nbformat

from hire import storage
from hire.lab import records
from hire.lab.figure_index import COMMITTED_PROFILE, figure_entry, figures_with_notebook, load
from hire.lab.paths import FIGURES, NOTEBOOKS, OUT, ROOT
from hire.lab.report.api import api
from hire.lab.report.scorecard import scorecard_markdown, write_scorecard
from hire.lab.report.templates import render

# A clone and not a wheel, since hire.lab is in the repository alone.
SET_UP = """\
# Set-up. Outside a clone, as on Colab, this clones the repository at this notebook's branch or tag
# and installs it. jax and numpy stay as they are.
import os
import subprocess
import sys

if not os.path.isdir("../hire/lab") and not os.path.isdir("hire-repository"):
    source = os.environ.get("HIRE_REPOSITORY", "{address}")
    reference = os.environ.get("HIRE_REFERENCE", "{reference}")
    clone = ["git", "clone", "-q", source, "hire-repository"]
    checkout = ["git", "-C", "hire-repository", "checkout", "-q", reference]
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    for command in (clone, checkout, [*pip, "-e", "hire-repository[{extras}]"]):
        subprocess.run(command, check=True)
    sys.path.insert(0, os.path.abspath("hire-repository"))"""


def pyproject() -> dict:
    """Return the content of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def address() -> str:
    """Return the public address of the repository; pyproject.toml is its only source."""
    return pyproject()["project"]["urls"]["Repository"]


def reference() -> str:
    """Return the branch or tag that badges open and that set-up cells clone.

    pyproject.toml is its only source.
    """
    return pyproject()["tool"]["hire"]["notebook-reference"]


def badge(name: str) -> str:
    """Return the Colab badge of a notebook."""
    path = address().removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{path}/blob/{reference()}/notebooks/{name}"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({link}.ipynb)"


def set_up_cell(extras: str = "notebooks,gemma") -> str:
    """Return the source of a notebook's set-up cell.

    Args:
        extras: Extras of pyproject.toml that the notebook needs.
    """
    return SET_UP.format(address=address(), reference=reference(), extras=extras)


def facts(name: str) -> dict | None:
    """Return the series and the finding of a committed figure, or None without a figure."""
    path = FIGURES / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def picture(name: str, above: str = "") -> str:
    """Return a committed figure with its finding as Markdown.

    Args:
        name: Name of the figure.
        above: Path from the page's folder to the root, such as "../".
    """
    return render("picture.md.j2", name=name, figure=facts(name), above=above)


def index_table() -> str:
    """Return the figure index as a table: figure, question, claims, notebook."""
    return render(
        "index.md.j2",
        entries=load("index")["figures"],
        with_notebook={entry["name"] for entry in figures_with_notebook()},
        facts=facts,
        badge=badge,
    )


def gallery() -> str:
    """Return the text of figures/README.md."""
    return render(
        "gallery.md.j2",
        entries=load("index")["figures"],
        facts=facts,
        picture=picture,
        scorecard=scorecard_markdown(),
        questions=answers(),
    )


def answers() -> list[dict]:
    """Return the ten questions with their answers and the notebooks that measure them.

    The numbers in the answers are read from the records.
    """
    by_id = {entry["id"]: entry for entry in records.read()}
    names = {entry["name"][:2]: entry["name"] for entry in figures_with_notebook()}

    def number(match: re.Match) -> str:
        record, field, format_specification = match.groups()
        if record not in by_id:
            return "*not measured yet*"
        return format(records.value(by_id[record], field), format_specification)

    return [
        dict(
            question=entry["question"],
            answer=re.sub(r"\{([^|{}]+)\|([^|{}]+)\|([^|{}]+)\}", number, entry["answer"]),
            notebooks=[names[notebook] for notebook in entry["notebooks"] if notebook in names],
        )
        for entry in load("questions")["questions"]
    ]


def with_generated_part(text: str, name: str, content: str) -> str:
    """Return the text with new content between the `name` markers.

    Raises:
        ValueError: If the text lacks the markers.
    """
    pattern = re.compile(rf"(<!-- {name} -->).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"no <!-- {name} --> … <!-- end --> in the page")
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n{match[2]}", text)


def commands_table() -> str:
    """Return the table of the two main commands, with their last measured minutes."""
    minutes = {
        entry["id"]: f"{entry['results']['minutes']:.1f} minutes (at {entry['commit']})"
        for entry in records.read(topic="budgets")
    }
    setup, figures, test = (
        minutes.get(name, "not timed yet")
        for name in ("make env", "make figures FRESH=1", "make test")
    )
    return render("commands.md.j2", setup=setup, figures=figures, test=test)


def readme(text: str) -> str:
    """Return README.md with up-to-date generated parts."""
    text = with_generated_part(text, "commands", commands_table())
    text = with_generated_part(text, "first figure", picture("08_ladder"))
    return with_generated_part(text, "figures", index_table())


def notebook(name: str, text: str) -> str:
    """Return a notebook with up-to-date generated cells.

    They are the badge below the title, the committed figure with its finding if there is one, and
    the set-up cell.
    """
    book = nbformat.reads(text, as_version=4)
    cells = {cell.id: cell for cell in book.cells}
    title, _, question = cells["title"].source.split("\n\n", 2)
    cells["title"].source = f"{title}\n\n{badge(name)}\n\n{question}"
    entry = figure_entry(name[:2])
    if entry.get("figure", True):
        cells["committed-figure"].source = picture(name, "../")
    cells["set-up"].source = set_up_cell(entry.get("extras", "notebooks,gemma"))
    return nbformat.writes(book, indent=1) + "\n"


def keep_outputs() -> None:
    """Copy texts and tables of the last runs at the committed profile into the notebooks.

    Pictures are left out: the committed figure is shown above them. A notebook whose last run did
    not end well keeps its outputs.
    """
    folder = OUT / COMMITTED_PROFILE
    for entry in figures_with_notebook():
        path, executed_path = (parent / f"{entry['name']}.ipynb" for parent in (NOTEBOOKS, folder))
        if not executed_path.with_suffix(".done").exists():
            continue
        book = nbformat.read(path, as_version=4)
        executed = {cell.id: cell for cell in nbformat.read(executed_path, as_version=4).cells}
        for cell in book.cells:
            ran = executed.get(cell.id)
            # Cells that changed since then keep nothing.
            if cell.cell_type == "code":
                is_same = ran is not None and ran.source == cell.source
                cell.outputs = texts_and_tables(ran.outputs) if ran and is_same else []
                # nbval refuses outputs of a cell that does not count as executed.
                cell.execution_count = ran.execution_count if ran and cell.outputs else None
        with storage.replacing(path) as [scratch]:
            scratch.write_text(nbformat.writes(book, indent=1) + "\n")


def texts_and_tables(outputs: list) -> list:
    """Return the outputs of a cell without pictures, warnings and run-specific metadata."""
    text_outputs = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stdout":
            text_outputs.append(nbformat.v4.new_output("stream", name="stdout", text=output.text))
        elif output.output_type in ("execute_result", "display_data"):
            data = {
                key: output.data[key] for key in ("text/html", "text/plain") if key in output.data
            }
            if "image/png" not in output.data and data:
                text_outputs.append(nbformat.v4.new_output("display_data", data=data))
    return text_outputs


def pages() -> dict:
    """Return the up-to-date text of each generated page, by path."""
    texts = {
        FIGURES / "README.md": gallery() + "\n",
        ROOT / "README.md": readme((ROOT / "README.md").read_text()),
    }
    texts[ROOT / "docs/API.md"] = api() + "\n"
    for entry in figures_with_notebook():
        path = NOTEBOOKS / f"{entry['name']}.ipynb"
        texts[path] = notebook(entry["name"], path.read_text())
    return texts


def write_pages() -> None:
    """Update every generated page."""
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            with storage.replacing(path) as [scratch]:
                scratch.write_text(text)
    write_scorecard()

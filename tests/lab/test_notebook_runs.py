"""The notebooks' runner: parameters, failures and kills."""

import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from papermill.iorw import papermill_io

from hire.lab import figure_index
from hire.lab.__main__ import main
from hire.lab.report import notebooks, pages
from hire.storage import cache_folder


def test_profiles_have_the_sizes_of_the_parameters_cells():
    for profile in figure_index.PROFILES:
        notebooks.check_sizes(profile, {})


PROFILE = "01_good: {{steps: {}}}\n02_bad: {{steps: 1}}\n"
# What `Study` does with the sizes, without its imports.
LOAD_SIZES = """
import yaml
steps = steps or yaml.safe_load(open(f"profiles/{profile}.yaml"))["01_good"]["steps"]
"""


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A register of two toy notebooks, the second of which can be made to fail."""
    monkeypatch.setattr(
        papermill_io.get_handler("local"), "_cwd", None
    )  # one for all threads: kept
    for module in (notebooks, figure_index):
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(notebooks, "OUT", tmp_path / "out")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(
        figure_index, "load", lambda name: {"figures": [{"name": "01_good"}, {"name": "02_bad"}]}
    )
    (tmp_path / "notebooks/profiles").mkdir(parents=True)

    def write(name, *sources, **parameters):
        cells = [
            nbformat.v4.new_code_cell(source)
            for source in ('profile = "auto"\nsteps = None', LOAD_SIZES, *sources)
        ]
        for parameter, value in parameters.items():
            cells[0].source += f"\n{parameter} = {value!r}"
        cells[0].metadata["tags"] = ["parameters"]
        kernel = dict(name="python3", display_name="Python 3", language="python")
        book = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
        nbformat.write(book, tmp_path / f"notebooks/{name}.ipynb")

    write(
        "01_good", "from pathlib import Path\nPath('../ran').open('a').write(f'{profile} {steps};')"
    )
    write("02_bad", "print('fine')", "raise KeyError('the third cell')")
    (tmp_path / "notebooks/profiles/smoke.yaml").write_text(PROFILE.format(7))
    return tmp_path, write


def test_a_failing_notebook_is_named_and_the_others_still_run(workshop, capsys):
    folder, write = workshop
    write("01_good", "raise ValueError('first')")
    write("02_bad", "from pathlib import Path\nPath('../ran').write_text(profile)")
    assert notebooks.run_notebooks("smoke") == ["01_good"]
    assert (
        "01_good: FAILED" in (message := capsys.readouterr().out)
        and "ValueError: first" in message
        and "cell" in message
    )
    assert (folder / "ran").read_text() == "smoke"


def test_a_run_goes_on_where_it_was(workshop, capsys):
    folder, write = workshop
    assert notebooks.run_notebooks("smoke") == ["02_bad"]
    write("02_bad", "pass")
    assert notebooks.run_notebooks("smoke") == []
    assert (folder / "ran").read_text() == "smoke 7;"  # not run again
    assert "01_good: up to date" in capsys.readouterr().out
    (folder / "notebooks/profiles/smoke.yaml").write_text(PROFILE.format(8))
    assert notebooks.run_notebooks("smoke") == []
    assert (folder / "ran").read_text() == "smoke 7;smoke 8;"  # its parameters changed
    assert notebooks.run_notebooks("smoke", "01", fresh=True) == []
    assert (folder / "ran").read_text() == "smoke 7;smoke 8;smoke 8;"


def test_a_fresh_run_makes_hidden_states_anew(workshop):
    kept = cache_folder() / "hidden_states"
    kept.mkdir(exist_ok=True)
    (kept / "one.npz").touch()
    assert notebooks.run_notebooks("smoke", "01", fresh=True) == []
    assert not (kept / "one.npz").exists()


@pytest.mark.parametrize("stale", ["cells", "package", "cut short", "another profile"])
def test_a_stale_stamp_runs_the_notebook_again(workshop, monkeypatch, capsys, stale):
    folder, write = workshop
    assert notebooks.run_notebooks("smoke", "01") == []
    stamp = folder / "out/smoke/01_good.done"
    if stale == "cells":
        write("01_good", "from pathlib import Path\nPath('../ran').open('a').write('changed;')")
    elif stale == "package":
        monkeypatch.setattr(notebooks.hidden_state_cache, "code", lambda: "another")
    elif stale == "cut short":
        stamp.write_text(stamp.read_text()[:-1])
    else:
        (folder / "notebooks/profiles/cpu.yaml").write_text(PROFILE.format(7))
        (folder / "out/cpu").mkdir()
        shutil.copy(stamp, folder / "out/cpu/01_good.done")
        monkeypatch.setattr(notebooks, "compared", lambda name: "")
    profile = "cpu" if stale == "another profile" else "smoke"
    for _ in range(2):  # and once only
        assert notebooks.run_notebooks(profile, "01") == []
    again = "changed;" if stale == "cells" else f"{profile} 7;"
    assert (folder / "ran").read_text() == f"smoke 7;{again}"
    assert capsys.readouterr().out.count("running") == 2


def test_a_dead_kernel_is_said_to_be_one(workshop, capsys):
    workshop[1]("02_bad", "import os\nos.kill(os.getpid(), 9)")
    assert notebooks.run_notebooks("smoke", "02") == ["02_bad"]
    assert "the kernel died, nearly always of too little memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "profile, value",
    [
        ("01_good: {stepz: 7}\n02_bad: {steps: 1}", "stepz"),
        ("01_good: {steps: 7}", "02_bad"),
        ("01_good: {steps: 7}\n02_bad: {steps: 1}\n03_none: {}", "03_none"),
    ],
)
def test_a_misspelt_parameter_is_refused_before_anything_runs(workshop, profile, value):
    folder, _ = workshop
    (folder / "notebooks/profiles/smoke.yaml").write_text(profile)
    with pytest.raises(ValueError, match=value):
        notebooks.run_notebooks("smoke")
    assert not (folder / "ran").exists()


def test_a_size_can_be_changed_and_then_writes_elsewhere(workshop, capsys):
    folder, _ = workshop
    assert notebooks.run_notebooks("smoke", "01", overrides=dict(steps=9)) == []
    assert (folder / "ran").read_text() == "smoke 9;"
    assert (folder / "out/smoke-changed/01_good.done").exists()
    assert not (folder / "out/smoke").exists()
    for arguments, value in (
        (("smoke", "01", dict(stepz=9)), "stepz"),
        (("smoke", None, dict(steps=9)), "steps"),
    ):
        profile, only, overrides = arguments
        with pytest.raises(ValueError, match=value):
            notebooks.run_notebooks(profile, only, overrides=overrides)
    assert main(["figures", "--only", "01", "--set", "steps"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_value_of_the_parameters_cell_can_be_changed_and_is_not_in_the_profile(workshop):
    folder, write = workshop
    write(
        "01_good",
        "from pathlib import Path\nPath('../ran').write_text(f'{steps} {word}')",
        word="a",
    )
    assert notebooks.run_notebooks("smoke", "01") == []
    assert (folder / "ran").read_text() == "7 a"
    assert notebooks.run_notebooks("smoke", "01", overrides=dict(word="b")) == []
    assert (folder / "ran").read_text() == "7 b"
    with pytest.raises(ValueError, match="profile"):
        notebooks.run_notebooks("smoke", "01", overrides=dict(profile="cpu"))
    (folder / "notebooks/profiles/smoke.yaml").write_text(
        "01_good: {steps: 7, word: c}\n02_bad: {steps: 1}"
    )
    with pytest.raises(ValueError, match="word"):
        notebooks.run_notebooks("smoke", "01")


def test_errors_of_the_command_are_one_line(capsys):
    assert main(["figures", "--profile", "fast"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "fast" in message and message.count("\n") == 1
    assert main(["figures", "--only", "77"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "77" in message and message.count("\n") == 1


def test_a_run_killed_in_a_notebook_starts_with_that_notebook_again():
    """A real kill of `make figures` at smoke: nothing half-done is taken for done."""
    out = notebooks.OUT / "smoke"
    stamp = out / "01_bottleneck.done"
    kept = stamp.read_text() if stamp.exists() else None
    command = [
        sys.executable,
        "-m",
        "hire.lab",
        "figures",
        "--profile",
        "smoke",
        "--only",
        "01",
        "--fresh",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and "running" in process.stdout.readline()
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not stamp.exists()
        process.stdout.close()
        again = [*command[:-1]]  # without --fresh: it is not up to date
        process = subprocess.Popen(
            again,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None and "running" in process.stdout.readline()
        process.kill()
        process.wait()
    finally:
        subprocess.run(["pkill", "-9", "-s", str(process.pid)])
        process.stdout.close()
        if kept is not None:
            stamp.write_text(kept)


def test_texts_and_tables_of_a_run_are_kept_and_pictures_are_not(tmp_path, monkeypatch):
    text = nbformat.v4.new_output("stream", name="stdout", text="recall 0.99\n")
    warning = nbformat.v4.new_output("stream", name="stderr", text="a warning\n")
    table = {"text/html": "<table>", "text/plain": "table"}
    result = nbformat.v4.new_output("execute_result", data=table, execution_count=7)
    picture = {"image/png": "aGlyZQ==", "text/plain": "<Image>"}
    shown = nbformat.v4.new_output("display_data", data=picture, metadata={"image/png": {}})

    def write(folder, sources, outputs):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        for number, (cell, cell_outputs) in enumerate(zip(cells, outputs, strict=True)):
            cell.id, cell.outputs, cell.execution_count = f"cell-{number}", cell_outputs, number
        folder.mkdir(parents=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "01_toy.ipynb")

    executed = tmp_path / "out/cpu"
    write(executed, ["judge()", "plot()", "changed()"], [[text, warning, result], [shown], [text]])
    write(tmp_path / "notebooks", ["judge()", "plot()", "new()"], [[], [], [text]])
    monkeypatch.setattr(pages, "OUT", tmp_path / "out")
    monkeypatch.setattr(pages, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(pages, "figures_with_notebook", lambda: [{"name": "01_toy"}])
    path = tmp_path / "notebooks/01_toy.ipynb"
    before = path.read_text()
    pages.keep_outputs()
    assert path.read_text() == before  # the run did not end well
    (executed / "01_toy.done").touch()
    pages.keep_outputs()
    first, second, third = nbformat.read(path, as_version=4).cells
    assert [output.output_type for output in first.outputs] == ["stream", "display_data"]
    assert first.outputs[0].text == "recall 0.99\n" and first.outputs[1].data == table
    assert second.outputs == third.outputs == []

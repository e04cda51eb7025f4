"""Runs the notebooks with papermill, each with the parameters of a profile; an interrupted run goes on where it was."""

import hashlib
import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir

import papermill
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from hire.lab import prefills
from hire.lab.figures import differences
from hire.lab.paths import FIGURES, NOTEBOOKS, OUT, ROOT
from hire.lab.register import parameters, ready, register


def fingerprint(name: str, chosen: dict) -> str:
    """What an executed notebook depends on: its own cells, its parameters, and the package."""
    state = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    state.update("".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").encode())
    state.update(prefills.code().encode())
    return state.hexdigest()


def check_parameters(profile: str) -> dict[str, dict]:
    """The parameters of a profile, or ValueError when one names a notebook or a parameter that does not exist."""
    chosen = parameters(profile)
    names = [entry["name"] for entry in ready()]
    for name, values in chosen.items():
        if name not in names:
            raise ValueError(f"profiles/{profile}.yaml: notebook {name!r}: expected one of {', '.join(names)}")
        known = papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb"))
        for key in values or {}:
            if key not in known:
                raise ValueError(f"profiles/{profile}.yaml: {name} has no parameter {key!r}: expected one of {', '.join(known)}")
    return chosen


def run_notebooks(profile: str, only: str | None = None, *, fresh: bool = False) -> list[str]:
    """Execute every notebook, or the one numbered `only`, into out/<profile>/; the names of those that failed.

    Toys run two at a time; others alone, since they measure time and want both cores. One that already ran unchanged (cells,
    parameters, package) is left as it is unless `fresh`. A failure is named (notebook, cell, error) and the others still run.
    Raises ValueError for an unknown profile, figure or parameter before anything runs.
    """
    chosen = check_parameters(profile)
    entries = ready() if only is None else [register(only)]
    (OUT / profile).mkdir(parents=True, exist_ok=True)
    if fresh:
        prefills.forget()
    names = [entry["name"] for entry in entries]

    def run(name: str) -> bool:
        return run_notebook(name, profile, chosen.get(name) or {}, fresh)

    with chdir(NOTEBOOKS), ThreadPoolExecutor(2 if profile == "smoke" else 1) as pool:  # kernels begin where this process is
        done = dict(zip(names, pool.map(run, names), strict=True))
    return [name for name, fine in done.items() if not fine]


def run_notebook(name: str, profile: str, values: dict, fresh: bool) -> bool:
    """Whether it ran, now or before."""
    target, values = OUT / profile / f"{name}.ipynb", {"profile": profile} | values
    stamp, mark = target.with_suffix(".done"), fingerprint(name, values)
    if not fresh and stamp.exists() and stamp.read_text() == mark:
        print(f"{name}: up to date ({stamp.relative_to(ROOT)}; FRESH=1 runs it again)", flush=True)
        return True
    print(f"{name}: running at profile {profile} …", flush=True)
    stamp.unlink(missing_ok=True)
    start = time.monotonic()
    error = execute(name, values, target)
    seconds = time.monotonic() - start
    if error:
        print(f"{name}: FAILED after {seconds:.0f} s: {error}", flush=True)
        return False
    stamp.write_text(mark)
    print(f"{name}: done in {seconds:.0f} s{'' if profile == 'smoke' else compared(name)}", flush=True)
    return True


def execute(name: str, values: dict, target) -> str | None:
    """Run one notebook; None, or one line that says which cell failed and why."""
    how: dict = dict(kernel_name="python3", progress_bar=False, extra_arguments=["--log-level=ERROR"])
    try:
        papermill.execute_notebook(str(NOTEBOOKS / f"{name}.ipynb"), str(target), values, **how)
    except PapermillExecutionError as error:
        reason = error.evalue.strip().splitlines()[0] if error.evalue.strip() else ""
        return f"cell {error.cell_index}, {error.ename}: {reason} (see {target.relative_to(ROOT)})"
    except DeadKernelError:
        return f"the kernel died, nearly always of too little memory (see {target.relative_to(ROOT)})"
    except RuntimeError as error:
        return f"the kernel did not start: {error}"
    finally:
        ensure_event_loop().close()  # this thread's, which papermill leaves open
    return None


def compared(name: str) -> str:
    """How the figure's series stand against the committed ones."""
    shown = subprocess.run(["git", "show", f"HEAD:figures/{name}.json"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        return "; no committed figure to compare with"
    new = json.loads((FIGURES / f"{name}.json").read_text())
    apart = differences(json.loads(shown.stdout), new)
    few = ", ".join(apart[:3]) + ", …" * (len(apart) > 3)
    within = f"; {len(new['series']) - len(apart)} of {len(new['series'])} series within tolerance of the committed ones"
    return within + (f", not: {few}" if apart else "")

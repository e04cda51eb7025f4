"""Runner of the notebooks: papermill with the parameters of a profile.

An interrupted run continues where it stopped.
"""

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

from hire.lab.data import hidden_state_cache
from hire.lab.figure_index import (
    COMMITTED_PROFILE,
    figure_entry,
    figures_with_notebook,
    resolve_profile,
    settings,
    sizes_by_notebook,
)
from hire.lab.paths import FIGURES, NOTEBOOKS, OUT, ROOT
from hire.lab.studies.figure_files import differences


def fingerprint(name: str, chosen: dict) -> str:
    """Return a hash of a notebook's code cells, its parameters and the package."""
    state = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    state.update(
        "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").encode()
    )
    state.update(hidden_state_cache.code().encode())
    return state.hexdigest()


def check_sizes(profile: str, overrides: dict) -> None:
    """Check that a profile gives every notebook exactly the sizes that its parameters cell lacks.

    The cell lacks a size where it says None.

    Args:
        profile: Name of the profile.
        overrides: Sizes by notebook that replace those of the profile.

    Raises:
        ValueError: A notebook or a size is missing or unknown.
    """
    sizes = sizes_by_notebook(profile)
    names = [entry["name"] for entry in figures_with_notebook()]
    if list(sizes) != names:
        raise ValueError(
            f"profiles/{profile}.yaml: notebooks {', '.join(sizes)}: expected {', '.join(names)}"
        )
    for name in names:
        parameters = papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb"))
        values = {size for size, cell in parameters.items() if cell["default"] != "None"}
        differing = set(sizes[name]) ^ (set(parameters) - values)
        if differing:
            raise ValueError(
                f"profiles/{profile}.yaml, {name}: {', '.join(sorted(differing))}: in one of the "
                "profile and the notebook's parameters cell only; add it to the other"
            )
        changeable = values - {"profile"}
        others = {
            size: value for size, value in overrides.get(name, {}).items() if size not in changeable
        }
        settings(name, profile, others)


def run_notebooks(
    profile: str, only: str | None = None, *, fresh: bool = False, overrides: dict | None = None
) -> list[str]:
    """Execute every notebook, or one of them, into out/<profile>/.

    The smoke profile runs two notebooks at a time. Other profiles run one at a time, because their
    notebooks measure time and need both cores. A failure prints notebook, cell and error, and the
    other notebooks still run.

    Args:
        profile: Name of the profile, or "auto".
        only: Number of the only figure to run. Default: all.
        fresh: Also run notebooks that already ran with the same cells, sizes and package.
        overrides: Sizes of the only figure that replace those of the profile.

    Returns:
        The names of the notebooks that failed.

    Raises:
        ValueError: If the profile, the figure or a size is unknown. Nothing runs then.
    """
    profile = resolve_profile(profile)
    entries = figures_with_notebook() if only is None else [figure_entry(only)]
    names = [entry["name"] for entry in entries]
    if overrides and only is None:
        raise ValueError(f"sizes {', '.join(overrides)}: name the figure that they are for")
    check_sizes(profile, {name: overrides or {} for name in names})
    if fresh:
        hidden_state_cache.forget()

    def run(name: str) -> bool:
        return run_notebook(name, profile, overrides or {}, fresh)

    # Kernels start in the working directory of this process.
    with chdir(NOTEBOOKS), ThreadPoolExecutor(2 if profile == "smoke" else 1) as pool:
        succeeded = dict(zip(names, pool.map(run, names), strict=True))
    return [name for name, success in succeeded.items() if not success]


def run_notebook(name: str, profile: str, overrides: dict, fresh: bool) -> bool:
    """Execute one notebook unless it is up to date.

    Returns:
        Whether the notebook succeeded, now or before.
    """
    folder = OUT / (f"{profile}-changed" if overrides else profile)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.ipynb"
    sizes = sizes_by_notebook(profile)[name] | overrides
    stamp, digest = target.with_suffix(".done"), fingerprint(name, {"profile": profile} | sizes)
    if not fresh and stamp.exists() and stamp.read_text() == digest:
        print(f"{name}: up to date ({stamp.relative_to(ROOT)}; FRESH=1 runs it again)", flush=True)
        return True
    print(f"{name}: running at profile {profile} …", flush=True)
    stamp.unlink(missing_ok=True)
    start = time.monotonic()
    error = execute(name, {"profile": profile} | overrides, target)
    seconds = time.monotonic() - start
    if error:
        print(f"{name}: FAILED after {seconds:.0f} s: {error}", flush=True)
        return False
    stamp.write_text(digest)
    comparison = compared(name) if profile == COMMITTED_PROFILE and not overrides else ""
    print(f"{name}: done in {seconds:.0f} s{comparison}", flush=True)
    return True


def execute(name: str, values: dict, target) -> str | None:
    """Execute one notebook.

    Returns:
        None, or one line that states the failed cell and the reason.
    """
    options: dict = dict(
        kernel_name="python3", progress_bar=False, extra_arguments=["--log-level=ERROR"]
    )
    try:
        papermill.execute_notebook(str(NOTEBOOKS / f"{name}.ipynb"), str(target), values, **options)
    except PapermillExecutionError as error:
        reason = error.evalue.strip().splitlines()[0] if error.evalue.strip() else ""
        return f"cell {error.cell_index}, {error.ename}: {reason} (see {target.relative_to(ROOT)})"
    except DeadKernelError:
        return (
            f"the kernel died, nearly always of too little memory (see {target.relative_to(ROOT)})"
        )
    except RuntimeError as error:
        return f"the kernel did not start: {error}"
    finally:
        ensure_event_loop().close()  # papermill leaves the event loop of this thread open
    return None


def compared(name: str) -> str:
    """Compare the series of a new figure with the committed ones, as a phrase for the log."""
    if not figure_entry(name[:2]).get("figure", True):
        return ""
    committed = subprocess.run(
        ["git", "show", f"HEAD:figures/{name}.json"], cwd=ROOT, capture_output=True, text=True
    )
    if committed.returncode:
        return "; no committed figure to compare with"
    figure = json.loads((FIGURES / f"{name}.json").read_text())
    differing = differences(json.loads(committed.stdout), figure)
    examples = ", ".join(differing[:3]) + ", …" * (len(differing) > 3)
    all_names = set(figure["series"]) | set(json.loads(committed.stdout)["series"])
    num_equal = len(all_names) - len(differing)
    summary = f"; {num_equal} of {len(all_names)} series within tolerance of the committed ones"
    return summary + (f", not: {examples}" if differing else "")

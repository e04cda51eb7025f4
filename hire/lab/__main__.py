"""`python -m hire.lab …`: the commands that the Makefile calls.

An error prints one line and exits with status 1.
"""

import argparse
import pkgutil
import sys

import yaml

# command -> (function without arguments, help text)
PLAIN = {
    "demo": (
        "hire.lab.studies.demo:demo",
        "the first minute: dense against HiRE on Gemma's softmax",
    ),
    "bench": (
        "hire.lab.studies.bench:bench",
        "softmax and decode step, dense and HiRE, as a table and records",
    ),
    "pages": (
        "hire.lab.report.pages:write_pages",
        "bring the generated parts of README, gallery and notebooks up to date",
    ),
    "compiler": (
        "hire.lab.tpu.compiler:install",
        "install the TPU compiler that goes with this jax",
    ),
    "questions": (
        "hire.lab.metrics.lm_eval_tasks:judge_questions",
        "Gemma on multiple-choice sets and a cloze, exact and searched, as a record",
    ),
    "certify-adversary": (
        "hire.lab.studies.adversary:certify_adversary",
        "attack proofs with a million drawn queries, as a record",
    ),
    "robustness": (
        "hire.lab.studies.robustness:judge_robustness",
        "damaged files, concurrent writers and killed runs, as a record",
    ),
    "fits": (
        "hire.lab.studies.estimator_fits:judge_fits",
        "recall of fitted estimators by queries, ridge and kind of text, as a record",
    ),
    "kv-search": (
        "hire.lab.studies.kv_search:judge_kv_search",
        "Gemma at long contexts with its attention keys searched, as a record",
    ),
}
# command -> (function that returns a table and whether the check passed, help text)
TABLES = {
    "verify": ("hire.lab.report.scorecard:verify", "every target: obtained, threshold, met or not")
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command and return the exit status.

    Args:
        arguments: Command-line arguments; those of the process by default.

    Returns:
        0 on success. 1 when the command failed; an error is printed to stderr in one line.
    """
    parser = argparse.ArgumentParser(prog="python -m hire.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, purpose) in (PLAIN | TABLES).items():
        commands.add_parser(name, help=purpose)
    figures = commands.add_parser("figures", help="execute the notebooks and write figures/")
    figures.add_argument("--profile", default="cpu")
    figures.add_argument("--only", help="one figure, such as 02")
    figures.add_argument("--fresh", action="store_true")
    figures.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SIZE=VALUE",
        help="a size of the one figure, such as chosen_rank=96; its files go below out/",
    )
    commands.add_parser(
        "weights", help="put Gemma's weights and the tasks' data into the cache folder"
    )
    commands.add_parser(
        "v5e", help="estimate the headline and the published programs for a TPU v5e, as records"
    )
    train = commands.add_parser("train", help="train a model and keep what came of it")
    train.add_argument("variant")
    bench_against = commands.add_parser(
        "bench-against",
        help="the benchmark at another commit and at this one in turns, as a record",
    )
    bench_against.add_argument("commit")
    budget = commands.add_parser("budget", help="time a make target and keep the time as a record")
    budget.add_argument("target", nargs="+")
    distributed = commands.add_parser(
        "distributed", help="DA-TOP-k on several processes against gathering all scores, as a table"
    )
    distributed.add_argument("--processes", type=int, default=4)
    distributed.add_argument(
        "--port", type=int, default=0, help="where they meet on 127.0.0.1; a free one by default"
    )
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_size(text: str) -> tuple[str, object]:
    """Return the name and the value of a size such as "chosen_rank=96".

    Raises:
        ValueError: The text has no "=", or its value is not YAML.
    """
    name, sign, value = text.partition("=")
    try:
        if sign:
            return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise ValueError(f"size {text!r}: expected NAME=VALUE, such as chosen_rank=96")


def run(chosen: argparse.Namespace) -> int:
    """Run one command and return its exit status.

    Each command imports only what it needs: `verify` imports no notebook.
    """
    if chosen.command in PLAIN:
        pkgutil.resolve_name(PLAIN[chosen.command][0])()
    elif chosen.command in TABLES:
        table, passed = pkgutil.resolve_name(TABLES[chosen.command][0])()
        print(table)
        return 0 if passed else 1
    elif chosen.command == "figures":
        from hire.lab.figure_index import COMMITTED_PROFILE, resolve_profile
        from hire.lab.report import notebooks, pages

        overrides = dict(parse_size(text) for text in chosen.set)
        failed = notebooks.run_notebooks(
            chosen.profile, chosen.only, fresh=chosen.fresh, overrides=overrides
        )
        if resolve_profile(chosen.profile) == COMMITTED_PROFILE and not overrides:
            pages.keep_outputs()
            pages.write_pages()
        if failed:
            print(f"{len(failed)} of the notebooks failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0
    elif chosen.command == "weights":
        from hire.models import load

        for name in ("gemma3_270m", "smollm2_135m"):
            print(f"{name}: {load(name).weights_precision}, ready")
        from hire.lab.data.questions import evals_wheel

        print(f"multiple-choice sets: {evals_wheel().name}, ready")
    elif chosen.command == "v5e":
        from hire.lab.tpu import multichip, programs, published

        programs.estimate_all(
            published.programs() | programs.headline() | programs.steps() | multichip.programs()
        )
    elif chosen.command == "train":
        from hire.lab.training.trainer import train_variant

        train_variant(chosen.variant)
    elif chosen.command == "bench-against":
        from hire.lab.timing.commits import compare_commits

        compare_commits(chosen.commit)
    elif chosen.command == "budget":
        from hire.lab.report.budgets import timed

        return timed(chosen.target)
    elif chosen.command == "distributed":
        from hire.lab.studies.multiprocess import launch, table

        print(table(launch(chosen.processes, port=chosen.port)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

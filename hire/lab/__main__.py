"""`python -m hire.lab …`: what the Makefile calls. An error is one line, and its exit status 1."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hire.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    figures = commands.add_parser("figures", help="execute the notebooks and write figures/")
    figures.add_argument("--profile", default="cpu")
    figures.add_argument("--only", help="one figure, such as 02")
    figures.add_argument("--fresh", action="store_true")
    commands.add_parser("verify", help="every target: obtained, threshold, met or not")
    commands.add_parser("demo", help="the first minute: dense against HiRE on Gemma's softmax")
    commands.add_parser("bench", help="softmax and decode step, dense and HiRE, as a table and records")
    commands.add_parser("pages", help="bring the generated parts of README, gallery and notebooks up to date")
    commands.add_parser("checks", help="take the check cells' outputs of the last smoke run into the notebooks")
    commands.add_parser("weights", help="put Gemma's weights and the tasks' data into the cache folder")
    commands.add_parser("compiler", help="install the TPU compiler that goes with this jax")
    commands.add_parser("v5e", help="estimate the headline and the published programs for a TPU v5e, as records")
    commands.add_parser("questions", help="Gemma on multiple-choice sets and a cloze, exact and searched, as a record")
    commands.add_parser("fits", help="recall of fitted copies by queries, ridge and kind of text, as a record")
    commands.add_parser("keys", help="Gemma at long contexts with its keys searched, as a record")
    commands.add_parser("size", help="lines of code by room against their budget")
    train = commands.add_parser("train", help="train a model and keep what came of it")
    train.add_argument("variant")
    budget = commands.add_parser("budget", help="time a make target and keep the time as a record")
    budget.add_argument("target", nargs="+")
    distributed = commands.add_parser("distributed", help="DA-TOP-k on several processes against gathering all scores, as a table")
    distributed.add_argument("--processes", type=int, default=4)
    distributed.add_argument("--port", type=int, default=0, help="where they meet on 127.0.0.1; a free one by default")
    chosen = parser.parse_args(arguments)
    try:
        return run(chosen)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(chosen: argparse.Namespace) -> int:
    """Each command imports what it needs: `size` takes no jax, `verify` no notebook."""
    if chosen.command == "figures":
        from hire.lab import notebooks, pages

        failed = notebooks.run_notebooks(chosen.profile, chosen.only, fresh=chosen.fresh)
        if chosen.profile != "smoke":
            pages.write_pages()
        if failed:
            print(f"{len(failed)} of the notebooks failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0
    if chosen.command == "verify":
        from hire.lab.scorecard import verify

        table, good = verify()
        print(table)
        return 0 if good else 1
    if chosen.command == "demo":
        from hire.lab.demo import demo

        demo()
    elif chosen.command == "bench":
        from hire.lab.bench import bench

        bench()
    elif chosen.command == "pages":
        from hire.lab.pages import write_pages

        write_pages()
    elif chosen.command == "checks":
        from hire.lab.pages import keep_checks

        keep_checks()
    elif chosen.command == "weights":
        from hire.models import load_gemma

        print(f"Gemma 3 270M: {load_gemma().stored}, ready")
        from hire.lab.tasks import evals_wheel

        print(f"multiple-choice sets: {evals_wheel().name}, ready")
    elif chosen.command == "compiler":
        from hire.lab.tpu import install

        install()
    elif chosen.command == "v5e":
        from hire.lab import pods, programs, published

        programs.estimate_all(published.programs() | programs.headline() | programs.steps() | pods.programs())
    elif chosen.command == "questions":
        from hire.lab.tasks import judge_questions

        judge_questions()
    elif chosen.command == "fits":
        from hire.lab.beyond import judge_fits

        judge_fits()
    elif chosen.command == "keys":
        from hire.lab.keys import judge_keys

        judge_keys()
    elif chosen.command == "size":
        from hire.lab.budgets import size

        table, good = size()
        print(table)
        return 0 if good else 1
    elif chosen.command == "train":
        from hire.lab.training import train_variant

        train_variant(chosen.variant)
    elif chosen.command == "budget":
        from hire.lab.budgets import timed

        return timed(chosen.target)
    elif chosen.command == "distributed":
        from hire.lab.processes import launch, table

        print(table(launch(chosen.processes, port=chosen.port)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

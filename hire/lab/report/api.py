"""Generator of docs/API.md: the public names of `hire` and `hire.models`, and ExactRowsEstimator.

griffe reads the source and parses the docstrings; nothing is imported.
"""

import ast
import functools
import re
import subprocess
import sys
from typing import Any

import griffe

from hire.lab.paths import ROOT
from hire.lab.report.templates import render

# A module, class, function or attribute of griffe; they have no common type with what is read.
Item = Any
PACKAGES = ("hire", "hire.models")
# A public class that no package exports: users name it, and few need it.
FURTHER = ("hire.estimators.exact_rows.ExactRowsEstimator",)


def api() -> str:
    """Return the text of the page.

    The page states the axes, and for each module its public names and the classes that these
    take or return.
    """
    package = griffe.load(
        "hire", search_paths=[ROOT], docstring_parser="google", allow_inspection=False
    )
    exported = [
        f"{name}.{export}" for name in PACKAGES for export in member_of(package, name).exports or []
    ]
    by_module: dict[str, dict[str, Item]] = {}
    for path in [*exported, *FURTHER]:
        item = member_of(package, path)
        item = item.final_target if item.is_alias else item
        by_module.setdefault(item.parent.path, {})[item.path] = item
    modules = [
        dict(item=member_of(package, path), members=with_related(list(members.values())))
        for path, members in sorted(by_module.items())
    ]
    axes = package["types"]
    aliases = [
        attribute.lines[0]
        for attribute in axes.attributes.values()
        if attribute.value is not None and not str(attribute.value).startswith("[")
    ]
    return render(
        "api.md.j2",
        axes=axes.docstring.value,
        aliases=aliases,
        modules=modules,
        members_of=documented_members,
        signature=signature,
        escape=escape,
    )


def member_of(package: Item, path: str) -> Item:
    """Return the member of the package at a path such as "hire.search"."""
    return package if path == "hire" else package[path.removeprefix("hire.")]


def with_related(members: list[Item]) -> list[Item]:
    """Return members of a module in source order, with the classes that they take or return."""
    module = members[0].parent
    functions = [item for item in members if item.is_function]
    for item in members:
        functions += item.functions.values() if item.is_class else []
    annotations = " ".join(
        str(annotation)
        for function in functions
        for annotation in (
            function.returns,
            *(parameter.annotation for parameter in function.parameters),
        )
    )
    related = [
        item
        for name, item in module.classes.items()
        if not item.is_alias and item not in members and re.search(rf"\b{name}\b", annotations)
    ]
    return sorted([*members, *related], key=lambda item: item.lineno)


def documented_members(item: Item) -> list[Item]:
    """Return `__init__` and the methods and properties of a class that have a docstring."""
    if not item.is_class:
        return []
    return [
        member
        for name, member in item.members.items()
        if not member.is_alias
        and (member.is_function or "property" in member.labels)
        # The fields of a dataclass already say what its `__init__` takes.
        and ((name == "__init__" and "dataclass" not in item.labels) or member.docstring)
        and is_public(name)
    ]


def is_public(name: str) -> bool:
    """Return whether a method is part of the API: `f` and `__call__` are, `_f` is not."""
    return not name.startswith("_") or name.startswith("__")


def signature(item: Item) -> str:
    """Return how an item is declared, without its body.

    A class shows its base classes and its annotated fields, a property its type.
    """
    if item.is_class:
        bases = ", ".join(str(base) for base in item.bases)
        fields = [
            f"    {name}: {attribute.annotation}{default_text(attribute)}"
            for name, attribute in item.attributes.items()
            if attribute.annotation and "property" not in attribute.labels
        ]
        return "\n".join([f"class {item.name}{f'({bases})' if bases else ''}:", *fields])
    if item.is_attribute:
        return f"{item.name}: {item.annotation}  # property"
    decorators = [
        f"@{label}\n" for label in ("classmethod", "staticmethod") if label in item.labels
    ]
    return "".join(decorators) + wrapped(item.signature())


def default_text(attribute: Item) -> str:
    """Return " = …" with the default of a dataclass field, or nothing without one."""
    if attribute.value is None:
        return ""
    value = ast.parse(str(attribute.value), mode="eval").body
    # Readers need the default of a static field, but not how it is declared.
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
        defaults = [keyword.value for keyword in value.keywords if keyword.arg == "default"]
        return f" = {ast.unparse(defaults[0])}" if defaults else ""
    return f" = {attribute.value}"


@functools.cache
def wrapped(declaration: str) -> str:
    """Return the declaration of a function, wrapped as ruff does it."""
    function = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--isolated", "-"],
        input=f"def {declaration}: ...",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return function.strip().removesuffix(": ...")


def escape(text: str) -> str:
    """Escape "<" where Markdown would take it for a tag."""
    return text.replace("<", "&lt;")

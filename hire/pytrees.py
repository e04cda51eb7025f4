"""Frozen dataclasses that are JAX pytrees and validate only what a user builds."""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax

Class = TypeVar("Class", bound=type)


@dataclass_transform(frozen_default=True, eq_default=False)
def pytree(cls: Class) -> Class:
    """Make a class a frozen dataclass and register it as a JAX pytree.

    `__post_init__` runs when a user calls the class or `dataclasses.replace`. It does not run when
    JAX rebuilds an object from its leaves, which may be tracers, shapes or placeholders. So
    `jax.tree.map`, `jax.jit` and `jax.vmap` never validate and never fail.

    Args:
        cls: A class with dataclass fields. Fields are children of the pytree. Fields with
            `metadata=dict(static=True)` are part of its structure.

    Returns:
        The class as a registered dataclass.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    children = [field.name for field in fields if not field.metadata.get("static")]
    static = [field.name for field in fields if field.metadata.get("static")]
    keys = [jax.tree_util.GetAttrKey(name) for name in children]

    def flatten(value):
        return [getattr(value, name) for name in children], tuple(
            [getattr(value, name) for name in static]
        )

    def flatten_with_keys(value):
        parts, structure = flatten(value)
        return list(zip(keys, parts, strict=True)), structure

    def unflatten(structure, parts):
        value = object.__new__(cls)
        for name, part in zip((*children, *static), (*parts, *structure), strict=True):
            object.__setattr__(value, name, part)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls

"""Sphinx's roles in docstrings as links: griffe reads docstrings through this for the API pages."""

from __future__ import annotations

from typing import Any

from griffe import Extension, GriffeLoader, NameResolutionError, Object
from site_links import with_links


class SphinxRoles(Extension):
    """Rewrites every docstring once its package is read."""

    def on_object(self, *, obj: Object, loader: GriffeLoader, **_: Any) -> None:
        """See griffe."""
        if obj.docstring is not None:
            obj.docstring.value = with_links(obj.docstring.value, lambda name: full_path(name, obj))


def full_path(name: str, scope: Object) -> str:
    """The path of a name in an object's scope; the name itself where nothing there is called so."""
    first, dot, rest = name.partition(".")
    try:
        return scope.resolve(first) + dot + rest
    except NameResolutionError:
        return name

"""Sphinx configuration. `make docs` builds the manual; every warning is an error, unknown references too."""

from docutils import nodes
from sphinx.roles import XRefRole

import kvcache

project = "kvcache"
author = "the kvcache maintainers"
release = version = kvcache.__version__
copyright = "the kvcache maintainers, Apache License 2.0"  # noqa: A001 (Sphinx's name)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "kvcache"
html_static_path = ["_static"]
html_css_files = ["kvcache.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "name"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_param = False  # types are words ("hashable", "array"), not references
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]  # likewise


properties = {}  # name -> docstring lines, while napoleon has them


class Name(XRefRole):
    """What docstrings put between single backticks: a link where there is a target, else just code."""

    def __init__(self):
        super().__init__(innernodeclass=nodes.literal)

    def create_xref_node(self):
        self.refdomain, self.reftype = "py", "obj"
        found, messages = super().create_xref_node()
        found[0]["is_name"] = True
        for context in ("py:module", "py:class"):
            found[0][context] = self.env.ref_context.get(context)
        return found, messages


def resolve_name(app, env, node, content):
    """A name that its own module does not have: one of the package's, or just code."""
    if not node.get("is_name"):
        return None
    target = f"kvcache.{node['reftarget']}"
    python = env.domains.python_domain
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content) or content


def keep_property(app, what, name, obj, options, lines):
    """Napoleon takes what stands before a colon in a property's docstring for its type: ours have none."""
    if what in ("attribute", "property"):
        properties[name] = list(lines)


def restore_property(app, what, name, obj, options, lines):
    if name in properties:
        lines[:] = properties.pop(name)


def without_empty_ends(app, doctree):
    """An exception with nothing said about it loses the dash that would lead to it."""
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if len(paragraph) > 1 and paragraph.children[-1].astext() in (" -- ", " \N{EN DASH} "):
            paragraph.remove(paragraph.children[-1])


def setup(app):
    app.add_role("name", Name())
    app.connect("autodoc-process-docstring", keep_property, priority=400)  # before napoleon, at 500
    app.connect("autodoc-process-docstring", restore_property, priority=600)
    app.connect("doctree-read", without_empty_ends)
    app.connect("missing-reference", resolve_name)


# what the annotations of a protocol name is of Python
nitpick_ignore = [("py:class", "collections.abc.Sequence")]

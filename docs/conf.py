"""Settings of the reference documentation: ``make docs`` builds it, offline and with warnings as errors."""

project = "segloss + segattr"
author = "The segprims authors"
copyright = "the segprims authors, Apache-2.0"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
]
exclude_patterns = ["_build", "_*.md"]  # _*.md: parts that a page includes
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = project
html_show_sourcelink = False
html_copy_source = False

# API entries: the docstrings, under the name that users write.
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False  # nn.Module has a text for forward
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]  # free text: titles of papers have colons
maximum_signature_line_length = 88
nitpicky = True
# Types of other libraries, and the protocol of a rule of LRP.
nitpick_ignore_regex = [("py:class", r"(torch|collections\.abc)\..*|Tensor|Figure|segattr\.lrp\.rules\.Rule")]

# Pictures: the code that a page shows is the code that drew them.
plot_include_source = True
plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("png", 110)]
plot_rcparams = {
    "figure.figsize": (6.4, 3.0),
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.interpolation": "nearest",
}
plot_apply_rcparams = True

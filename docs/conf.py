"""Sphinx settings; docs/build.py writes the pages and calls Sphinx."""
from configparser import ConfigParser
from pathlib import Path

settings = ConfigParser()
settings.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

project, author, copyright, release = cfg["title"], cfg["author"], cfg["copyright"], cfg["version"]
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinx_design",
              "sphinx-mathjax-offline"]  # the pages bring MathJax along and need no network
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_dmath_double_inline = True  # display formulas may stand in a paragraph, as in Jupyter
myst_heading_anchors = 3
nb_execution_mode = "off"  # the committed outputs are shown
nb_code_prompt_show = nb_code_prompt_hide = "Source"
nitpicky = True  # a link to a name that is not documented is an error ...
nitpick_ignore_regex = [("py:(class|exc)", ".*")]  # ... but types of other libraries need none
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 88
html_title = cfg["title"]
html_context = dict(default_mode="auto")  # light or dark, as the reader's system
html_static_path, html_css_files, html_favicon = ["static"], ["dip_uq.css"], "static/icon.svg"
html_theme = "sphinx_book_theme"
html_theme_options = dict(repository_url=cfg["git_url"], use_repository_button=True, show_toc_level=2,
                          navbar_persistent=[])  # one search field is enough

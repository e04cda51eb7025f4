"""Jinja templates of the generated pages."""

from pathlib import Path

import jinja2

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, /, **values) -> str:
    """Fill a template.

    Args:
        template: File name in hire/lab/report/templates/.
        values: What the template refers to.

    Raises:
        jinja2.UndefinedError: The template refers to something that `values` lacks.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, of our own text
    )
    return environment.get_template(template).render(**values).rstrip("\n")

"""Templates to pages. Whatever a template is given is escaped; only `Markup` goes in as it is."""

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from vitrim.reporting import charts
from vitrim.reporting.figures import FORMS, Result, figure, lookup

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def _environment() -> "Environment":
    from jinja2 import (  # a tenth of a second, which --help need not wait for
        Environment,
        PackageLoader,
        StrictUndefined,
    )

    return Environment(
        loader=PackageLoader("vitrim.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def fill(template: str, result: Result, **values: Any) -> str:
    """A page from its template, which may ask for `at(path)`, a value, and `fig(path, form)`, a figure of the result."""
    own = {"at": partial(lookup, result), "fig": partial(figure, result), "charts": charts, "forms": FORMS}
    return _environment().get_template(template).render(own | values)

"""An audit and a run as one HTML file that people can read, without network or scripts.

In: an `Audit` and, if there is one, the record of the run. Out: the page, and the audit as JSON
beside it. Read ``page.py`` first; ``page.html.j2`` is its template, ``charts.py`` draws the SVG
charts and ``pictures.py`` encodes the impressions.
"""

from .page import render, write_report

__all__ = ["render", "write_report"]

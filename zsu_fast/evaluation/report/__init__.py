"""An audit and a run as one HTML file that people can read, without network or scripts."""

from .page import render, write_report

__all__ = ["render", "write_report"]

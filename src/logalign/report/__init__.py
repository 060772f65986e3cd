"""Figures and the self-contained HTML page of one or several runs; made from readings alone, with no tensor framework.

`figures` draws, `page` writes HTML, `run_report` puts both together for `logalign report`. They need the extra
`report` (matplotlib and jinja2), which is imported only when one of these modules is.
"""

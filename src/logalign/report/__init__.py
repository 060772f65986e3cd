"""Figures and self-contained HTML pages of one or several runs, made from readings alone, with no tensor framework.

`run_report` makes the report of `logalign report`: `shown` reads and judges a run (`folded`) and thins it (`thin`),
`panels` describes the charts, `figures` and `signal_figures` draw them for paper, `interactive` writes the page. `page`
writes static pages for the demos. All need the extra `report`, which loads only when one of these modules does.
"""

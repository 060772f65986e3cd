"""Figures and self-contained HTML pages of one or several runs; made from readings alone, with no tensor framework.

`run_report` makes the report of `logalign report`: `shown` reads and judges a run (`folded`) and thins it (`thin`),
`panels` says what is drawn, `figures` and `signal_figures` draw it for paper, `interactive` writes the page. `page`
writes static pages, as the demos have them. All need the extra `report`, imported only when one of these modules is.
"""

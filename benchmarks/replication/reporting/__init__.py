"""From the pieces of all sets to a results file and a page.

tables.py      the pieces' results as arrays over sets and documents
paired.py      paired differences between methods
claims.py      the paper's claims, and the verdict on each
predictions.py what was predicted before the runs, and what came out
targets.py     our own targets
summary.py     one results file
merging.py     the figures of a run and of the one that it goes on from
cells.py       how figures are written into cells, and tables that several pages have
advice.py      the report's first page: what to use when
report.py      the results file as Markdown
plots.py       the report's plots
quote.py       the results' figures in other pages
"""

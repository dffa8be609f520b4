"""From the pieces of all sets to a results file and a page.

tables.py      the pieces' results as arrays over sets and documents
claims.py      the paper's claims, and the verdict on each
summary.py     one results file
report.py      the results file as Markdown
plots.py       the report's plots
quote.py       the results' figures in other pages
"""

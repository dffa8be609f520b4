"""Real text, pinned and offline, split so that nothing which is tested was trained on.

sources.py     releases on the package index, pinned by hash, from which all text comes
documents.py   what everything is made of: documents, items, passages
pages.py       documentation: prose alone, and pages that go from prose to code and back
programs.py    Python, JavaScript, docstrings with sums
catalogues.py  messages in English, French and German
problems.py    sums and word problems of graded difficulty, in English and French
splits.py      splits by name, near duplicates and verbatim stretches across them
tasks.py       all tasks; questions about found text
corpora.py     what the corpora are
building.py    from archives to corpora
loading.py     the corpora, built once: `load_corpora(cache)`
__main__.py    `python -m benchmarks.replication.text` builds them, and prints the tables of README.md
"""

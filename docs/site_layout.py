"""A hook of MkDocs: the site is laid out as the repository is, so that one link works in both.

MkDocs publishes one folder, but the pages here link to the README, the benchmarks and the examples, too.
"""

from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = [
    "*.md",
    "CITATION.cff",
    "docs/**/*.md",
    "docs/*.css",
    "docs/**/*.png",
    "benchmarks/README.md",
    "benchmarks/replication/README.md",
    "benchmarks/results/**/*.*",
    "examples/**/*.*",
    "recipes/*.yaml",
]


def on_files(files, config):
    """Put the published files of the whole repository in the place of those in `docs/`."""
    for file in list(files.documentation_pages()) + list(files.media_files()):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for pattern in PUBLISHED for path in ROOT.glob(pattern) if path.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files

"""`python -m peft_bts.toy FOLDER`: the toy's models and documents as folders and files, for `recipes/toy.yaml`.

FOLDER/seed, FOLDER/code, FOLDER/math, FOLDER/lang        checkpoints with their tokenizer
FOLDER/data/code.jsonl, FOLDER/data/code-test.jsonl       documents of a domain, to train on and to test on
"""

import argparse
import json
import shutil
from pathlib import Path

from .models import EXPERTS, Toy


def write(folder: Path, smoke: bool = False) -> None:
    """Train the models if that has not been done, and write everything into `folder`."""
    toy = Toy(folder / "cache", smoke=smoke)
    for name in ("seed", *EXPERTS):
        shutil.copytree(toy.folder(name), folder / name, dirs_exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    for split, ending in (("train", ""), ("test", "-test")):
        for domain, documents in toy.documents[split].items():
            rows = [json.dumps({"text": prompt + answer}) + "\n" for prompt, answer in documents]
            (folder / "data" / f"{domain}{ending}.jsonl").write_text("".join(rows), encoding="utf-8")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m peft_bts.toy", description="Write the toy's models and data.")
    parser.add_argument("folder", type=Path, help="where to, such as .cache/toy")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.smoke)


if __name__ == "__main__":
    main()

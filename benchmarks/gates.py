"""Whom the quickstart's stitches listen to: the table and the pictures of docs/gates.md.

    make quickstart
    python -m benchmarks.gates

Takes the adapter of `examples/quickstart.py`. Prints mean gates, domains x models, over validation documents that the
stitches were not trained on; draws the gates over a generated text of each domain and over one text that switches
between domains (the paper's figures 2 and 3); and writes a page to browse them.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser

from peft_bts import toy, trace_gates

from .measuring import set_up


PROMPTS = {
    "docstrings": "Return True if the path is",
    "code": "    def __init__(self, name):\n        self.name =",
    "arithmetic": "47+8=",
    "translation": "the small cats see a big tree =",
}
SWITCHES = toy.END.join(  # documents, one after another as in a training block
    [
        "58-9=940",
        "the big dog sees a small cat = la granda hundo vidas malgrandan katon",
        "31+6=730",
        "    def get(self, key):\n        return self._data[key]\n",
    ]
)


@dataclass
class Arguments:
    adapter: str = field(default=".cache/quickstart/stitched-quickstart", metadata={"help": "the adapter's folder"})
    docs: str = field(default="docs", metadata={"help": "folder for the pictures"})
    page: str = field(default=".cache/gates.html", metadata={"help": "the page to write"})
    documents: int = field(default=64, metadata={"help": "validation documents of each domain"})
    threads: int = field(default=2, metadata={"help": "PyTorch's"})
    smoke: bool = field(default=False, metadata={"help": "read a few documents only, to see that it runs"})


@torch.no_grad()
def main():
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_up(arguments.threads)
    model = AutoPeftModelForCausalLM.from_pretrained(arguments.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)

    def encode(texts):
        options = {"padding": True, "truncation": True, "max_length": toy.LENGTH, "return_token_type_ids": False}
        return tokenizer(texts, return_tensors="pt", **options)

    documents = toy.make_documents(arguments.smoke)["validation"]
    documents = {domain: documents[domain][: arguments.documents] for domain in toy.DOMAINS}
    with trace_gates(model) as trace, tqdm(total=sum(map(len, documents.values())), desc="documents") as bar:
        for domain, name in toy.DOMAINS.items():
            texts = ["".join(parts) for parts in documents[domain]]
            with trace.domain(name):
                for start in range(0, len(texts), 16):
                    model(**encode(texts[start : start + 16]))
                    bar.update(len(texts[start : start + 16]))
    Console(width=130).print(trace.table())
    trace.plot(by="domain").savefig(Path(arguments.docs) / "gates-domains.png", dpi=80)

    with trace_gates(model) as trace:
        for name, prompt in PROMPTS.items():
            with trace.domain(name):
                model.generate(**encode(prompt), max_new_tokens=20, do_sample=False)
        with trace.domain("switching"):
            model(**encode(SWITCHES))
    trace.plot(tokenizer=tokenizer, sequences=[2, 3, 4]).savefig(Path(arguments.docs) / "gates-tokens.png", dpi=80)
    Path(arguments.page).parent.mkdir(parents=True, exist_ok=True)
    trace.to_html(arguments.page, tokenizer=tokenizer)
    print(f"Every token's gates: {arguments.page}")


if __name__ == "__main__":
    main()

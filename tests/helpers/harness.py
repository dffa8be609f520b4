"""Tasks for lm-evaluation-harness over a small file of its own: no data set is downloaded."""

import json
import random


TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_text": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["never"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder, count=6):
    """Write both tasks, of `count` documents each, where `include_path` finds them."""
    rng = random.Random(0)

    def words(count):
        return " ".join(f"w{rng.randrange(3, 60)}" for _ in range(count))

    docs = [
        {"question": words(3 + i), "choices": [words(1), words(2), words(3)], "answer": i % 3} for i in range(count)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
        task = {"task": name, **data, "test_split": "test", "doc_to_text": "{{question}}", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML

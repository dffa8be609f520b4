"""A tiny seed, two experts, data of three domains, and the recipe that stitches them."""

from tests.helpers.text import save_model, write_documents


def write_recipe(root):
    """Make all of it in a folder; return the recipe's path as a string. Its adapter's folder is `out`."""
    for number, name in enumerate(("seed", "code", "math")):
        save_model(root / name, seed=number, layers=2)
    for number, name in enumerate(("general", "code", "math"), start=1):
        write_documents(root / f"{name}.jsonl", number)
    write_documents(root / "math-test.jsonl", 3, count=8)
    (root / "recipe.yaml").write_text(
        f"""
        hub: {root}/seed
        experts: {{code: {root}/code, math: {{model: {root}/math}}}}
        datasets:
          code: {{source: {root}/code.jsonl, weight: 2}}
          math: {root}/math.jsonl
          general: {root}/general.jsonl:0
        evaluation: {{math: {root}/math-test.jsonl}}
        held_out: 6
        block_size: 32
        num_stitches: 2
        gate: token
        gate_dropout: 0.1
        r: 4
        output_dir: {root}/out
        max_steps: 6
        save_steps: 2
        logging_steps: 1
        per_device_train_batch_size: 4
        learning_rate: 1e-2
        use_cpu: true
        disable_tqdm: true
        """
    )
    return str(root / "recipe.yaml")

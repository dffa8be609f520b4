"""What `plan` says of the recipes for families of models, whose configs are made here from their published sizes.

python -m tests.helpers.families [FAMILY...]    # writes the lines `# plan: ...` of recipes/*.yaml anew
"""

import json
import os
import re
import sys
import tempfile
import textwrap
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig
from transformers import LlamaConfig, Olmo2Config, Qwen2Config
from typer.testing import CliRunner

from peft_bts.formatting import human
from peft_bts_cli import app
from tests import ROOT


def qwen(**options):
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **options,
    )


def olmo():
    return Olmo2Config(
        vocab_size=100352,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        pad_token_id=100277,
        eos_token_id=100257,
    )


CONFIGS = {
    "Qwen/Qwen2.5-1.5B": qwen(max_position_embeddings=131072),
    "Qwen/Qwen2.5-Coder-1.5B": qwen(max_position_embeddings=32768),
    "Qwen/Qwen2.5-Math-1.5B": qwen(max_position_embeddings=4096),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "allenai/OLMo-2-1124-7B": olmo(),
    "allenai/OLMo-2-1124-7B-Instruct": olmo(),
    "experts/code": olmo(),
    "experts/math": olmo(),
}
LORAS = [f"your-org/llama-3.1-8b-{name}-lora" for name in ("code", "math", "law")]
FAMILIES = ["qwen2.5-1.5b", "llama3.1-8b-loras", "olmo2-7b"]


@contextmanager
def configs():
    """A working directory with all configs, under the names that recipes have for them, and no weights."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name, config in CONFIGS.items():
                config.save_pretrained(name)
            lora = LoraConfig(
                task_type="CAUSAL_LM",
                r=16,
                target_modules="all-linear",
                base_model_name_or_path="meta-llama/Llama-3.1-8B",
            )
            for name in LORAS:
                lora.save_pretrained(name)
            yield
        finally:
            os.chdir(before)


def _plan(family, *options):
    result = CliRunner().invoke(app, ["plan", str(ROOT / "recipes" / f"{family}.yaml"), *options, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def plan_lines(family):
    """The comment on what `plan` says; within `configs`."""
    plan, checkpointed = _plan(family), _plan(family, "--gradient-checkpointing")
    less = checkpointed["memory"]["bfloat16"]["training"]
    memory, together = plan["memory"]["bfloat16"], plan["together"]
    text = (
        f"plan: {human(together['parameters'])} parameters, {human(together['trained'])} of them trained; adapter "
        f"file {human(plan['adapter_bytes'], 'B')}. Models in bfloat16: {human(memory['weights'], 'B')} of weights, "
        f"{human(memory['inference'], 'B')} with a cache of {plan['sequence_length']:,} tokens. Training on "
        f"{plan['batch_size']} x {plan['sequence_length']:,} tokens: {human(memory['training'], 'B')}, of which "
        f"{human(memory['activations'], 'B')} are activations; {human(less, 'B')} with gradient checkpointing. "
        f"A token costs {together['flops'] / plan['hub']['flops']:.2f} times the FLOPs of the hub alone."
    )
    return textwrap.fill(text, 117, initial_indent="# ", subsequent_indent="# ")


_PLAN = re.compile(r"^# plan: .*(?:\n# .+)*", re.MULTILINE)


def written_lines(family):
    """The comment as the recipe has it."""
    return _PLAN.search((ROOT / "recipes" / f"{family}.yaml").read_text())[0]


def main():
    with configs():
        for family in sys.argv[1:] or FAMILIES:
            path = Path(ROOT / "recipes" / f"{family}.yaml")
            lines = plan_lines(family)
            path.write_text(_PLAN.sub(lambda _, lines=lines: lines, path.read_text()))
            print(family, lines, sep="\n")


if __name__ == "__main__":
    main()

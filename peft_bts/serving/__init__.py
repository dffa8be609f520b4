"""Exported compositions in vLLM: `pip install "peft_bts[vllm]"`, `model.export("folder")`, `vllm serve folder`.

vLLM finds this room by the entry point `vllm.general_plugins` and calls `plugin.register` in each of its processes.
Only `plugin` may be imported without vLLM.
"""

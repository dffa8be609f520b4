"""Text in, text out: streamers and pipelines give the words of generate()."""

import threading
from functools import cache, partial

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline

from tests.helpers.generation import NEW, check_like_plain, error_of, everyone, model_of, tokens, uncached
from tests.helpers.models import fresh


@cache
def tokenizer():
    """A word per token: `w3` is token 3."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Metaspace(" ")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'user': 'w10', 'assistant': 'w11'}[m['role']] + ' ' + m['content'] + ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}w11 {% endif %}"
    )
    return tokenizer


TEXTS = ["w3 w4 w5 w6 w7 w8 w9", "w20 w21 w22"]
TALKING = ["llama", "mistral", "bloom", "llama<mistral+gpt2", "gemma3_text<qwen3_next+llama", "llama@0", "gpt2@2"]


def answer(model, text):
    ids = tokenizer()(text, return_tensors="pt").input_ids
    return tokenizer().decode(uncached(model, ids)[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", TALKING)
def test_streamer(name, capsys):
    model = model_of(name)
    ids = tokenizer()(TEXTS[0], return_tensors="pt").input_ids
    tokens(model, ids, streamer=TextStreamer(tokenizer(), skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out.strip() == answer(model, TEXTS[0]).strip()


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}], ids=["greedy", "lookup"])
@pytest.mark.parametrize("name", ["llama", "llama<mistral+gpt2"])
def test_iterator_streamer(name, options):
    """The usual server: one thread generates, another sends the words on."""
    ids = tokenizer()(TEXTS[0], return_tensors="pt").input_ids

    def check(model):
        streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, skip_special_tokens=True, timeout=10)
        thread = threading.Thread(target=partial(error_of, partial(tokens, model, ids, streamer=streamer, **options)))
        thread.start()
        try:
            pieces = list(streamer)
        finally:
            thread.join()
        assert "".join(pieces).strip() == answer(model, TEXTS[0]).strip()
        assert len(pieces) > 2

    check_like_plain(check, model_of(name), everyone(name))


@pytest.fixture
def quiet():
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize("name", TALKING)
def test_pipeline(name, quiet):
    """One text, a padded batch, and a conversation by the chat template."""
    model = model_of(name)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer())
    options = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    assert [out["generated_text"].strip() for out in pipe(TEXTS[0], **options)] == [answer(model, TEXTS[0]).strip()]
    batch = pipe(TEXTS, batch_size=2, **options)
    assert [out[0]["generated_text"].strip() for out in batch] == [answer(model, text).strip() for text in TEXTS]

    chat = [{"role": "user", "content": TEXTS[1]}]
    for _ in range(2):
        prompt = tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        reply = pipe(chat, **options)[0]["generated_text"]
        assert reply.strip() == answer(model, prompt).strip()
        chat += [{"role": "assistant", "content": reply}, {"role": "user", "content": "w30 w31"}]


@pytest.mark.parametrize("name", ["llama", "llama<mistral+gpt2"])
def test_pipeline_with_an_assistant(name, quiet):
    model = model_of(name)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer(), assistant_model=fresh("llama", seed=5))
    reply = pipe(TEXTS[0], max_new_tokens=NEW, do_sample=False, return_full_text=False)
    assert reply[0]["generated_text"].strip() == answer(model, TEXTS[0]).strip()

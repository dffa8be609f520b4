"""The demo as a Gradio app: panels, switches, and what they do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Optional

from peft import PeftModel

from .._compat.peft import base_model
from ..forward.decoder import text_config
from ..gates.extras import needs
from ..gates.labels import colours, stitch_name
from ..model import stitch_tuner
from ..stitch import HUB
from .generation import Choice, stitches_of, stream
from .page import Look, Turn, answer_texts, legend_html, panel_html


if TYPE_CHECKING:
    import gradio

STITCHED, ALONE = "stitched", "hub"  # the panels
_BETWEEN_UPDATES = 0.1  # seconds: a page that is sent for every token would be most of the work


def make_demo(model: PeftModel, tokenizer: Any, *, title: str = "A stitched model") -> gradio.Blocks:
    """Make an app that generates in the browser, and shows by colours which model chose every token.

    `launch()` serves it, as any Gradio app; on Hugging Face Spaces, an `app.py` that does so is all there is. One text
    is generated at a time, whoever asks: switching experts off switches them off in the model.

    Args:
        model: A model with a stitch adapter, in eval mode.
        tokenizer: Its tokenizer. With a chat template, the app can chat.
        title: What stands above.

    Raises:
        ModuleNotFoundError: If Gradio is not installed (`peft_bts[demo]`).
        TypeError: If the model has no stitches.
    """
    gr = needs("gradio", extra="demo")
    made = Demo(model, tokenizer)
    names = list(made.experts)
    stitches = [(stitch_name(stitch), place) for place, stitch in enumerate(made.stitches)]

    def show(turns: list[Turn], mode: str, experts: list[str], shown: int) -> tuple[str, str, str]:
        return made.html(turns, experts, shown, mode == "Chat")

    def answer(
        prompt: str,
        turns: list[Turn],
        mode: str,
        experts: list[str],
        most: int,
        shown: int,
        tokens: int,
        temperature: float,
        compare: bool,
    ) -> Iterator[tuple[list[Turn], str, str, str]]:
        choice = Choice(
            sorted(experts), max_active_experts=int(most), max_new_tokens=int(tokens), temperature=temperature
        )
        try:
            for now in made.answer(prompt, turns, choice, chat=mode == "Chat", compare=compare):
                yield now, *show(now, mode, experts, shown)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as app:
        turns = gr.State([])
        gr.Markdown(f"## {title}", elem_id="title")
        with gr.Row():
            with gr.Column(scale=4):
                legend = gr.HTML(elem_id="legend")
                with gr.Row():
                    with gr.Column():
                        gr.Markdown("**Stitched**")
                        stitched = gr.HTML(elem_id="stitched")
                    with gr.Column(visible=False) as beside:
                        gr.Markdown("**The hub alone**")
                        alone = gr.HTML(elem_id="alone")
                prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt")
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
                    clear = gr.Button("Clear", elem_id="clear")
            with gr.Column(scale=1, min_width=280):
                modes = ["Complete", "Chat"] if tokenizer.chat_template else ["Complete"]
                mode = gr.Radio(modes, value=modes[-1], label="Mode", visible=len(modes) > 1, elem_id="mode")
                experts = gr.CheckboxGroup(names, value=names, label="Experts", elem_id="experts")
                most = gr.Slider(
                    0, len(names), value=len(names), step=1, label="At most so many of them per token", elem_id="most"
                )
                shown = gr.Dropdown(stitches, value=len(stitches) - 1, label="Colours: the gates of", elem_id="shown")
                compare = gr.Checkbox(label="The hub alone beside it", elem_id="compare")
                tokens = gr.Slider(
                    1, made.longest, value=min(128, made.longest), step=1, label="New tokens", elem_id="tokens"
                )
                temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature (0: the likeliest token)")

        pages = [legend, stitched, alone]
        look = [turns, mode, experts, shown]
        app.load(show, look, pages)
        gr.on([experts.change, shown.change], show, look, pages, show_progress="hidden")
        compare.change(lambda on: gr.Column(visible=on), compare, beside)
        running = gr.on(
            [generate.click, prompt.submit],
            answer,
            [prompt, turns, mode, experts, most, shown, tokens, temperature, compare],
            [turns, *pages],
            concurrency_limit=1,
            show_progress="hidden",
        )
        stop.click(None, cancels=running)
        gr.on([clear.click, mode.change], lambda: [], None, turns, cancels=running).then(show, look, pages)
    return app


class Demo:
    """What the app does, without the app.

    Attributes:
        experts: Names of the adapter's experts.
        stitches: Its stitches.
        longest: How many tokens can be asked for.
    """

    def __init__(self, model: PeftModel, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        attached = stitch_tuner(model).experts[model.active_adapter]
        self.experts = sorted(attached)
        self.stitches = stitches_of(model)
        self._colours = colours(self.stitches)
        models = [base_model(model), *(expert.model for expert in attached.values())]
        limits = [getattr(text_config(one), "max_position_embeddings", None) for one in models]
        self._positions: Optional[int] = min((limit for limit in limits if limit), default=None)
        self.longest = min(1024, self._positions or 1024)

    def html(self, turns: Sequence[Turn], experts: Sequence[str], shown: int, chat: bool) -> tuple[str, str, str]:
        """The legend and both panels."""
        look = Look(self.stitches, self._colours, shown, chat)
        active = [HUB, *experts]
        return legend_html(look, active), panel_html(turns, STITCHED, look), panel_html(turns, ALONE, look)

    def answer(
        self, prompt: str, turns: Sequence[Turn], choice: Choice, *, chat: bool, compare: bool
    ) -> Iterator[list[Turn]]:
        """Yield the turns with one more, whose answers grow.

        Args:
            prompt: What to continue, or the next message.
            turns: Those before. They stay, and in a chat the models read them.
            choice: How to generate.
            chat: Whether the prompt is a message of a chat.
            compare: Whether the hub alone answers after the stitched model.

        Raises:
            ValueError: If there is no prompt, if it is too long, or for what `generate` refuses.
        """
        if not prompt:
            raise ValueError("There is no prompt: write something to continue.")
        turn = Turn(prompt)
        shown = [*turns, turn]
        for panel in (STITCHED, ALONE) if compare else (STITCHED,):
            prompt_ids = self._prompt_ids(shown, panel, chat)
            most = choice.max_new_tokens
            if self._positions is not None:
                most = min(most, self._positions - len(prompt_ids))
                if most < 1:
                    raise ValueError(
                        f"The prompt has {len(prompt_ids)} tokens, and the models take {self._positions}; shorten it."
                    )
            updated = 0.0
            for answer in stream(
                self._model, prompt_ids, replace(choice, stitched=panel == STITCHED, max_new_tokens=most)
            ):
                turn.answers[panel] = answer
                turn.texts[panel] = []
                if time.perf_counter() - updated >= _BETWEEN_UPDATES:
                    turn.texts[panel] = answer_texts(answer, self._tokenizer, finished=False)
                    yield shown
                    updated = time.perf_counter()
            turn.texts[panel] = answer_texts(turn.answers[panel], self._tokenizer)
            yield shown

    def _prompt_ids(self, turns: Sequence[Turn], panel: str, chat: bool) -> list[int]:
        if not chat:
            ids: list[int] = self._tokenizer(turns[-1].prompt)["input_ids"]
            return ids[:-1] if ids[-1:] == [self._tokenizer.eos_token_id] and len(ids) > 1 else ids
        messages = []
        for turn in turns:
            messages.append({"role": "user", "content": turn.prompt})
            said = turn.texts.get(panel) or turn.texts.get(STITCHED)  # the hub was not asked every time
            if said and turn is not turns[-1]:
                messages.append({"role": "assistant", "content": "".join(said)})
        encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

"""The demo in a real browser without a window: Chromium, driven by Selenium. Nothing is downloaded.

python -m tests.helpers.browser ADAPTER PICTURE PROMPT...    # a picture of the demo, as in the README
"""

import shutil
import sys
import time
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from tests import ROOT


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@contextmanager
def served(app):
    """Serve a Gradio app on a free port of this machine; its address."""
    _, address, _ = app.launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True)
    try:
        yield address
    finally:
        app.close()


@contextmanager
def page_at(address, width=1360, height=1060):
    """A fresh browser that shows a page."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    with TemporaryDirectory() as profile:
        for flag in (
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "disable-dev-shm-usage",
            "disable-quic",
            "disable-background-networking",
            "force-device-scale-factor=1",
            f"window-size={width},{height}",
            f"user-data-dir={profile}",
        ):
            options.add_argument(f"--{flag}")
        driver = Chrome(options, ChromeService(DRIVER))
        try:
            driver.get(address)
            yield Page(driver)
        finally:
            driver.quit()


class Page:
    """The demo's page, as somebody uses it."""

    def __init__(self, driver):
        self.driver = driver
        self.wait("#prompt textarea")

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def until(self, condition, seconds=30):
        """Wait until something is so; an error has the page's text."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > end:
                raise AssertionError(f"Still not so after {seconds} s: {self.all('body')[0].text}")
            time.sleep(0.05)
        return found

    def wait(self, selector):
        return self.until(lambda: self.all(selector))

    def ask(self, text):
        """Type a prompt and generate."""
        (field,) = self.all("#prompt textarea")
        field.clear()
        field.send_keys(text)
        self.click("#generate")

    def set(self, slider, value):
        """Write a number beside a slider."""
        (field,) = self.all(f"{slider} input[type=number]")
        self.driver.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('blur', {bubbles: true}))",
            field,
            value,
        )

    def rest(self):
        """Wait until the page has not changed for a second."""
        seen = []

        def is_at_rest():
            seen.append(self.driver.page_source)
            time.sleep(1)
            return seen[-2:-1] == seen[-1:]

        self.until(is_at_rest)

    def click(self, selector):
        (element,) = self.all(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'nearest'})", element)
        element.click()

    def switch(self, expert):
        """Switch an expert on or off."""
        self.click(f'#experts input[name="{expert}"]')

    def watch(self, panel="stitched"):
        """Begin to note how many tokens there are whenever the page changes."""
        self.driver.execute_script(
            "const panel = document.querySelector(arguments[0]); window.counts = [];"
            "new MutationObserver(() => window.counts.push(panel.querySelectorAll('.bts-token').length))"
            ".observe(panel, {childList: true, subtree: true})",
            f"#{panel}",
        )

    def watched(self):
        """The numbers of tokens that were seen since then."""
        return self.driver.execute_script("return window.counts")

    def tokens(self, panel="stitched"):
        """The model and the colour of every coloured token of the last text, the latter as the browser paints it."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map("
            "t => [t.dataset.model, getComputedStyle(t).backgroundColor])",
            f"#{panel} .bts-turn:last-child .bts-token",
        )

    def figures(self, panel="stitched"):
        return [element.text for element in self.all(f"#{panel} .bts-figures")]

    def point_at(self, number, panel="stitched"):
        """Move the mouse to a token of the last text; what appears."""
        from selenium.webdriver import ActionChains

        token = self.all(f"#{panel} .bts-turn:last-child .bts-token")[number]
        ActionChains(self.driver).move_to_element(token).perform()
        return token.find_element("css selector", ".bts-gates").text


def main():
    from peft_bts.demo import make_demo
    from peft_bts_cli.texts import load

    adapter, picture, *prompts = sys.argv[1:]
    model, tokenizer = load(adapter, "auto", "cpu")
    with served(make_demo(model, tokenizer, title="Three experts and a hub")) as address, page_at(address) as page:
        page.click("#compare input")
        page.set("#tokens", 48)
        for number, prompt in enumerate(prompts, start=1):
            page.ask(prompt)
            page.until(lambda number=number: len(page.figures("alone")) == number)
            page.rest()
        page.point_at(len(page.tokens()) - 25)
        page.driver.save_screenshot(str(ROOT / picture))


if __name__ == "__main__":
    main()
